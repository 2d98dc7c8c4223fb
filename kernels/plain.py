"""The fastest plain-PyTorch implementation: SDPA for attention, and a loss in chunks of unmasked positions."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

# Logits in memory at once, in elements: 8 Mi, 32 MiB in float32. They are read and written five times, which a cache
# speeds up if they fit; smaller chunks make the products slow.
CHUNK_ELEMENTS = 1 << 23


def _visible(bounds: Tensor) -> bool:
    """Whether the values can be inspected without a device synchronisation or a graph break."""
    cpu = bounds.device.type == "cpu" and type(bounds) is Tensor
    return cpu and bounds.numel() > 0 and not torch.compiler.is_compiling()


class Part(NamedTuple):
    """A group of queries and the keys that they attend to, first ≤ s < last.

    causal: plain causal mask among these keys. mask: otherwise SDPA's attn_mask [B, 1, T, last - first], additive or
    bool, or None if all keys are attended to. empty: bool [B, T], queries with an empty interval; None if none."""

    first: int
    last: int
    causal: bool
    mask: Tensor | None
    empty: Tensor | None


# Masked key elements per sequence above which the sequences of a batch are computed separately: about one call's cost.
WASTE = 1 << 17
# The dimension to split along, the number of queries and of keys of each part, and the parts. Dimension −1: packed
# documents of equal length become the sequences of a batch.
Parts = tuple[int, list[int], list[int], list[Part]]


def _whole(lo: Tensor, hi: Tensor, S: int) -> Part:
    """One part with a dense mask, if the bounds cannot be inspected."""
    empty, s = hi <= lo, torch.arange(S, device=hi.device, dtype=hi.dtype)
    # SDPA gives NaN for a query without keys, forward and backward: it attends to the first key and is zeroed later.
    mask = ((lo[..., None] <= s) & (s < hi[..., None])) | (empty[..., None] & (s == 0))
    return Part(0, S, False, mask[:, None], empty)


def _part(lo: np.ndarray | None, hi: np.ndarray, dtype: torch.dtype) -> Part:
    """The part without keys that no query attends to, such as unused cache slots, and without a mask if it would be all
    visible or plain causal. The mask is additive in `dtype`: SDPA would convert a bool mask in every call."""
    # Neither bound decreases along t.
    (lo_min, lo_max), (hi_min, hi_max) = (
        (0, 0) if x is None else (min(x[:, 0].tolist()), max(x[:, -1].tolist())) for x in (lo, hi)
    )
    last = max(hi_max, 1)
    first = min(lo_min, last - 1)
    causal = 1 < hi.shape[1] == last - first and lo_max <= first and bool((hi == np.arange(first, last) + 1).all())
    if causal or (lo_max <= first and hi_min >= last):
        return Part(first, last, causal, None, None)
    s = np.arange(first, last, dtype=np.int32)
    hides, empty = s >= hi[..., None], None
    if lo_max > first:
        hides = hides | (s < lo[..., None])
    if lo_max >= hi_min and (none := hi <= (0 if lo is None else lo)).any():
        hides = hides & ~(none[..., None] & (s == first))
        empty = torch.from_numpy(none)
    mask = torch.from_numpy(np.where(hides, np.float32(-np.inf), np.float32(0)))
    return Part(first, last, False, mask[:, None].to(dtype), empty)


def _within(S: int, bounds: Tensor) -> np.ndarray:
    """Bounds clamped to [0, S], as int32 NumPy array: in a decode step each torch operation would take 10 μs. tolist
    also works under torch.func."""
    return np.minimum(np.maximum(bounds.tolist(), 0), S).astype(np.int32)


def parts_of(q: Tensor, k: Tensor, lo: Tensor | None, hi: Tensor | None) -> Parts:
    """Divide attention into parts: packed documents, or prompts in a cache, that share no keys; sequences of a batch
    with very different numbers of keys; or everything as one part. Plain causal attention needs no mask in memory;
    other intervals need a dense one, on a CPU one per part."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    if lo is None and hi is None and T in (1, S):
        return 0, [B], [B], [Part(0, S, True if 1 < T else False, None, None)]  # with a dynamic T, 1 < T is a SymBool
    n = B if lo is not None or hi is not None else 1  # number of different masks
    hi = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=q.device)[None] if hi is None else hi
    if not (n and S and _visible(hi)):
        lo = torch.zeros(1, T, dtype=torch.int32, device=q.device) if lo is None else lo
        return 0, [B], [B], [_whole(lo.expand(n, T).clamp(0, S), hi.expand(n, T).clamp(0, S), S)]
    if T == 1 and lo is None:
        ends = hi.flatten().tolist()
        if 0 < ends[0] <= S and ends.count(ends[0]) == len(ends):  # sequences of one length, or just one
            return 0, [B], [B], [Part(0, ends[0], False, None, None)]
    lo, hi = None if lo is None else _within(S, lo), _within(S, hi.expand(n, T))
    if lo is not None and T > 1:
        # A part begins at a query with keys, none of which an earlier query attends to.
        ends = hi[:, :-1].max(0)
        (begins,) = ((lo[:, 1:].min(0) >= ends) & (ends > 0) & (lo < hi).any(0)[1:]).nonzero()
        if len(begins):
            t = int(begins[0]) + 1
            if T == S and not T % t and (lo == np.arange(T) // t * t).all() and (hi == np.arange(T) + 1).all():
                return -1, [t], [t], [Part(0, t, True, None, None)]
            t, s = (0, *(begins + 1).tolist(), T), (0, *ends[begins].tolist(), S)
            parts = [_part(lo[:, i:j] - key, hi[:, i:j] - key, q.dtype) for (i, j), key in zip(pairwise(t), s)]
            return 1, [j - i for i, j in pairwise(t)], [j - i for i, j in pairwise(s)], parts
    if (G if T == 1 else H) >= 2 * torch.get_num_threads():  # one sequence's heads, or groups, occupy every thread
        ends = hi[:, -1].tolist()
        if (n * max(ends) - sum(ends)) * G * D > n * WASTE:
            rows = [None] * n if lo is None else np.split(lo, n)
            return 0, [1] * n, [1] * n, [_part(*row, q.dtype) for row in zip(rows, np.split(hi, n))]
    return 0, [B], [B], [_part(lo, hi, q.dtype)]


def _attend(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> Tensor:
    if part.last - part.first < k.shape[1]:
        k, v = (x.narrow(1, part.first, part.last - part.first) for x in (k, v))
    (B, T, H, D), G = q.shape, k.shape[2]
    # With one query per sequence, the heads of a group become queries of one head, so that its keys are read once.
    group = T == 1 and G < H
    out = F.scaled_dot_product_attention(
        q.reshape(B, G, H // G, D) if group else q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=part.mask, is_causal=part.causal, scale=scale, enable_gqa=G < H and not group,
    )  # fmt: skip
    out = out.reshape(B, T, H, D) if group else out.transpose(1, 2)
    return out if part.empty is None else out.masked_fill(part.empty[..., None, None], 0)


def attention(q: Tensor, k: Tensor, v: Tensor, parts: Parts, scale: float) -> Tensor:
    """See kernels.attention. parts: from parts_of."""
    dim, of_queries, of_keys, parts = parts
    if dim < 0:
        documents = [x.unflatten(1, (-1, of_queries[0])).flatten(0, 1) for x in (q, k, v)]
        return _attend(*documents, parts[0], scale).reshape(q.shape)
    if len(parts) == 1:
        return _attend(q, k, v, parts[0], scale)
    # split, not slices: the gradient of a slice is as large as the sliced tensor.
    pieces = zip(q.split(of_queries, dim), k.split(of_keys, dim), v.split(of_keys, dim), parts)
    return torch.cat([_attend(*piece, scale) for piece in pieces], dim)


def _sum_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the unmasked losses, dx and dweight (empty without with_grad). The gradients are computed together with
    the loss from each chunk's logits: three products per chunk, without recomputation."""
    live = (targets != ignore_index).nonzero()[:, 0]
    loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    # dweight accumulates over chunks in float32 or wider: every addition in bfloat16 would be rounded.
    dx, dweight = x.new_zeros(x.shape if with_grad else 0), loss.new_zeros(weight.shape if with_grad else 0)
    for rows in live.split(max(1, CHUNK_ELEMENTS // weight.shape[0])):
        x_rows, target = x[rows], targets[rows, None]
        # In place: one buffer of logits becomes their exponentials, then their gradient.
        logits = (x_rows @ weight.T).to(loss.dtype)
        logits -= logits.amax(1, keepdim=True)
        own = logits.gather(1, target)
        total = logits.exp_().sum(1, keepdim=True)
        loss += (total.log() - own).sum()
        if with_grad:
            dlogits = logits.div_(total).scatter_add_(1, target, torch.full_like(total, -1)).to(x.dtype)
            dx[rows] = dlogits @ weight
            if dweight.dtype == x.dtype:
                torch.addmm(dweight, dlogits.T, x_rows, out=dweight)
            else:
                dweight += dlogits.T @ x_rows
            del dlogits
        del logits  # free the memory before the next chunk
    return loss, dx, dweight.to(weight.dtype)


# A custom operator, as the number of unmasked positions depends on data, which torch.compile cannot trace.
_library = torch.library.Library("nanopause", "FRAGMENT")
_library.define("chunked_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool with_grad) "
                "-> (Tensor, Tensor, Tensor)")  # fmt: skip
_library.impl("chunked_cross_entropy", _sum_and_gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("nanopause::chunked_cross_entropy", lib=_library)
def _(x, weight, targets, ignore_index, with_grad):
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, x.new_empty(x.shape if with_grad else 0), weight.new_empty(weight.shape if with_grad else 0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _scaled(ctx, dloss, *_):
    dx, dweight = ctx.saved_tensors
    return (dx * dloss).to(dx.dtype), (dweight * dloss).to(dweight.dtype), None, None, None


torch.library.register_autograd("nanopause::chunked_cross_entropy", _scaled, setup_context=_save, lib=_library)


@register_flop_formula(torch.ops.nanopause.chunked_cross_entropy, get_raw=True)
def _(x, weight, targets, ignore_index, with_grad, **_):
    return (6 if with_grad else 2) * int((targets != ignore_index).sum()) * weight.numel()


def _losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = x @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="none")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, by_rows: bool) -> Tensor:
    """The sum of the unmasked losses, or with by_rows the loss of every position; see kernels.linear_cross_entropy.
    Finding the unmasked positions synchronises with a GPU."""
    if by_rows:  # the factors of the gradients are unknown in the forward pass, so the logits are recomputed
        live = (targets != ignore_index).nonzero()[:, 0]
        chunks = live.split(max(1, CHUNK_ELEMENTS // weight.shape[0]))
        losses = [checkpoint(_losses, x[rows], weight, targets[rows], use_reentrant=False) for rows in chunks]
        losses = torch.cat(losses)
        return losses.new_zeros(len(x)).index_put((live,), losses)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return torch.ops.nanopause.chunked_cross_entropy(x, weight, targets, ignore_index, with_grad)[0]
