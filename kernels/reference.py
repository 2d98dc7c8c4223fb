"""The oracle: what the kernels compute, written to be obviously right.

Computes in float64 when given float64, else in float32. Dense, slow, and used by every test.
"""

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys lo ≤ s < hi of each query, zeros where there is none: kernels.attention."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (repeat(x, "b s g d -> b s (g r) d", r=q.shape[2] // k.shape[2]).to(dtype) for x in (k, v))
    scores = einsum(q.to(dtype), k, "b t h d, b s h d -> b h t s") * scale
    s = torch.arange(k.shape[1], device=q.device)
    visible = ((lo[..., None] <= s) & (s < hi[..., None]))[:, None]  # [B, 1, T, S]
    # An empty row is softmaxed over -1e30s rather than -infs, which gives no NaN, and is zeroed after.
    probability = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    return einsum(probability, v, "b h t s, b s h d -> b t h d").to(q.dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, by_rows: bool) -> Tensor:
    """The sum of the live rows' losses or every row's, all logits in memory. See kernels.linear_cross_entropy."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ weight.to(dtype).T
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none" if by_rows else "sum")
