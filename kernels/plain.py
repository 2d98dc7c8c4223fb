"""The fastest way that plain PyTorch has: SDPA for attention, a loss in chunks of live rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits in memory at once, in elements: 16 Mi in float32 are 64 MiB.
CHUNK_ELEMENTS = 1 << 24


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, scale: float) -> Tensor:
    """See kernels.attention. Plain causal needs no mask in memory; intervals take a dense [B, 1, T, S] one."""
    T, S = q.shape[1], k.shape[1]
    mask, empty = None, None
    if lo is not None or hi is not None or 1 < T != S:
        s = torch.arange(S, device=q.device)
        lo = torch.zeros(1, T, dtype=torch.int32, device=q.device) if lo is None else lo
        hi = torch.arange(S - T + 1, S + 1, device=q.device)[None] if hi is None else hi
        empty = hi <= lo
        # SDPA turns a row without keys into NaN, forward and backward: it reads key 0 instead and is zeroed after.
        mask = (((lo[..., None] <= s) & (s < hi[..., None])) | (empty[..., None] & (s == 0)))[:, None]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return out if empty is None else out.masked_fill(empty[..., None, None], 0)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the live rows' losses. The gradients are computed with the loss, while a chunk's logits are at hand:
    three products a chunk, as many as with all logits kept, and none repeated."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, with_grad):
        live = (targets != ignore_index).nonzero()[:, 0]
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        # dw sums over chunks: in bfloat16 every sum would round.
        dx, dw = (torch.zeros_like(x), torch.zeros_like(weight, dtype=loss.dtype)) if with_grad else (None, None)
        for rows in live.split(max(1, CHUNK_ELEMENTS // weight.shape[0])):
            x_rows, target = x[rows], targets[rows, None]
            logits = (x_rows @ weight.T).to(loss.dtype)
            log_z = logits.logsumexp(-1, keepdim=True)
            loss += (log_z - logits.gather(1, target)).sum()
            if with_grad:
                dlogits = logits.sub_(log_z).exp_()
                dlogits.scatter_add_(1, target, torch.full_like(log_z, -1))
                dlogits = dlogits.to(x.dtype)
                dx[rows] = (dlogits @ weight).to(dx.dtype)
                dw += dlogits.T @ x_rows
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See kernels.linear_cross_entropy. Finding the live rows synchronises with a GPU."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss = _LinearCrossEntropy.apply(x, weight, targets, ignore_index, with_grad)
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss
