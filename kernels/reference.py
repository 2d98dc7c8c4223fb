"""The reference implementation, the oracle of all tests: dense, slow, and simple enough to be obviously correct.

Computes in float64 for float64 inputs, otherwise in float32.
"""

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over each query's keys lo ≤ s < hi; zero if there are none. See kernels.attention."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (repeat(x, "b s g d -> b s (g r) d", r=q.shape[2] // k.shape[2]).to(dtype) for x in (k, v))
    scores = einsum(q.to(dtype), k, "b t h d, b s h d -> b h t s") * scale
    s = torch.arange(k.shape[1], device=q.device)
    visible = ((lo[..., None] <= s) & (s < hi[..., None]))[:, None]  # [B, 1, T, S]
    # -1e30 instead of -inf: the softmax of a query without keys is then not NaN, and is multiplied by zero.
    probability = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    return einsum(probability, v, "b h t s, b s h d -> b t h d").to(q.dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, by_rows: bool) -> Tensor:
    """The sum of the unmasked losses, or with by_rows the loss of every position, with all logits in memory; see
    kernels.linear_cross_entropy."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ weight.to(dtype).T
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none" if by_rows else "sum")
