"""The fastest plain-PyTorch implementation: SDPA for attention, and a loss in chunks of unmasked positions."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

# Logits in memory at once, in elements: 8 Mi, 32 MiB in float32. They are read and written five times, which a cache
# speeds up if they fit; smaller chunks make the products slow.
CHUNK_ELEMENTS = 1 << 23


def _visible(bounds: Tensor) -> bool:
    """Whether the host can use their values without synchronisation or a graph break."""
    cpu = bounds.device.type == "cpu" and type(bounds) is Tensor
    return cpu and bounds.numel() > 0 and not torch.compiler.is_compiling()


class Part(NamedTuple):
    """A run of queries, and the run of keys that they share with no other part."""

    n_queries: int
    n_keys: int
    first: int  # the queries attend to keys first … last − 1 of the run
    last: int
    is_causal: bool  # plain causal among these
    mask: Tensor | None  # otherwise what SDPA adds to the scores, or bool, [B, 1, n_queries, last − first]; None: all
    empty: Tensor | None  # bool [B, n_queries], queries that attend to nothing
    n_documents: int = 1  # of one length, which become the sequences of a batch


def _whole(lo: Tensor, hi: Tensor, S: int) -> Part:
    """One part with a dense mask, where the values of the bounds are not known on the host."""
    empty = hi <= lo
    s = torch.arange(S, device=hi.device, dtype=hi.dtype)
    # SDPA turns a row without keys into NaN, forward and backward: it attends to the first key and is zeroed after.
    mask = ((lo[..., None] <= s) & (s < hi[..., None])) | (empty[..., None] & (s == 0))
    return Part(hi.shape[1], S, 0, S, False, mask[:, None], empty)


def _part(lo: np.ndarray, hi: np.ndarray, n_keys: int, dtype: torch.dtype) -> Part:
    """One part, without keys that no query attends to, such as the free slots of a cache, and without a mask that would
    hide nothing or that is plain causal. The mask is in `dtype`: SDPA would convert a bool mask at every call."""
    # Bounds do not decrease along t.
    lo_min, lo_max, hi_min, hi_max = lo[:, 0].min(), lo[:, -1].max(), hi[:, 0].min(), hi[:, -1].max()
    T, last = hi.shape[1], int(max(hi_max, 1))
    first = int(min(lo_min, last - 1))
    is_causal = 1 < T == last - first and lo_max <= first and bool((hi == np.arange(first, last) + 1).all())
    if is_causal or (lo_max <= first and hi_min >= last):
        return Part(T, n_keys, first, last, is_causal, None, None)
    s = np.arange(first, last, dtype=np.int32)
    is_hidden = (s >= hi[..., None]) | (s < lo[..., None])
    is_empty, empty = hi <= lo, None
    if is_empty.any():
        is_hidden &= ~(is_empty[..., None] & (s == first))  # as in _whole
        empty = torch.from_numpy(is_empty)
    mask = torch.from_numpy(np.where(is_hidden, np.float32(-np.inf), np.float32(0)))
    return Part(T, n_keys, first, last, False, mask[:, None].to(dtype), empty)


def parts_of(q: Tensor, k: Tensor, lo: Tensor | None, hi: Tensor | None) -> list[Part]:
    """What queries attend to: the documents of packed rows, or prompts in a cache, which share no keys; otherwise one
    part. Plain causal needs no mask in memory, other intervals take a dense one."""
    (B, T), S = q.shape[:2], k.shape[1]
    if lo is None and hi is None and T in (1, S):
        return [Part(T, S, 0, S, True if 1 < T else False, None, None)]  # compiled for any T, 1 < T is not a bool
    n = B if lo is not None or hi is not None else 1  # sequences whose masks differ
    hi = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=q.device)[None] if hi is None else hi
    lo = torch.zeros(1, T, dtype=torch.int32, device=q.device) if lo is None else lo
    lo, hi = lo.expand(n, T), hi.expand(n, T)
    if not (n and S and _visible(hi)):
        return [_whole(lo.clamp(0, S), hi.clamp(0, S), S)]
    # NumPy: an operation of torch on so few numbers takes 10 μs. tolist also works under torch.func.
    lo, hi = (np.clip(bounds.tolist(), 0, S).astype(np.int32) for bounds in (lo, hi))
    # A part begins with a query that attends to something, and to nothing that a query before it does.
    ends = hi[:, :-1].max(0)
    (begins,) = ((lo[:, 1:].min(0) >= ends) & (ends > 0) & (lo < hi).any(0)[1:]).nonzero()
    if not len(begins):
        return [_part(lo, hi, S, q.dtype)]
    length = int(begins[0]) + 1
    every = np.arange(T)
    if T == S and T % length == 0 and (lo == every // length * length).all() and (hi == every + 1).all():
        return [Part(T, S, 0, length, True, None, None, T // length)]
    t, s = (0, *(begins + 1).tolist(), T), (0, *ends[begins].tolist(), S)
    return [
        _part(lo[:, i:j] - start, hi[:, i:j] - start, stop - start, q.dtype)
        for (i, j), (start, stop) in zip(pairwise(t), pairwise(s))
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> Tensor:
    shape = q.shape
    if part.n_documents > 1:
        q, k, v = (x.unflatten(1, (part.n_documents, -1)).flatten(0, 1) for x in (q, k, v))
    if part.last - part.first < k.shape[1]:
        k, v = (x.narrow(1, part.first, part.last - part.first) for x in (k, v))
    (B, T, H, D), G = q.shape, k.shape[2]
    # One query per sequence: the query heads of a group become queries of one head, so that its keys are loaded once.
    is_grouped = T == 1 and G < H
    out = F.scaled_dot_product_attention(
        q.reshape(B, G, H // G, D) if is_grouped else q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=part.mask, is_causal=part.is_causal, scale=scale, enable_gqa=G < H and not is_grouped,
    )  # fmt: skip
    out = out.reshape(shape) if is_grouped else out.transpose(1, 2).reshape(shape)
    return out if part.empty is None else out.masked_fill(part.empty[..., None, None], 0)


def attention(q: Tensor, k: Tensor, v: Tensor, parts: list[Part], scale: float) -> Tensor:
    """See kernels.attention. parts: from parts_of."""
    if len(parts) == 1:
        return _attend(q, k, v, parts[0], scale)
    n_keys = [part.n_keys for part in parts]
    # The gradient of a piece of a split is as large as the piece; that of a slice as large as the whole tensor.
    pieces = zip(q.split([part.n_queries for part in parts], 1), k.split(n_keys, 1), v.split(n_keys, 1), parts)
    return torch.cat([_attend(*piece, scale) for piece in pieces], 1)


def _sum_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the unmasked losses, dx and dweight (empty without with_grad). The gradients are computed together with
    the loss from each chunk's logits: three products per chunk, without recomputation. dweight is float32 or wider, as
    the sum over all positions can be out of float16's range where the mean is not."""
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
            if x.dtype == torch.bfloat16:
                dweight += dlogits.T @ x_rows
            else:  # a sum over a chunk can be out of float16's range too
                torch.addmm(dweight, dlogits.T.to(dweight.dtype), x_rows.to(dweight.dtype), out=dweight)
            del dlogits
        del logits  # free the memory before the next chunk
    return loss, dx, dweight


# A custom operator, as the number of unmasked positions depends on data, which torch.compile cannot trace.
_library = torch.library.Library("nanopause", "FRAGMENT")
_library.define("chunked_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool with_grad) "
                "-> (Tensor, Tensor, Tensor)")  # fmt: skip
_library.impl("chunked_cross_entropy", _sum_and_gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("nanopause::chunked_cross_entropy", lib=_library)
def _(x, weight, targets, ignore_index, with_grad):
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, x.new_empty(x.shape if with_grad else 0), loss.new_empty(weight.shape if with_grad else 0)


def _save(ctx, inputs, output):
    ctx.weight_dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])


@once_differentiable  # a second derivative would silently be 0
def _scaled(ctx, dloss, *_):
    dx, dweight = ctx.saved_tensors
    return (dx * dloss).to(dx.dtype), (dweight * dloss).to(ctx.weight_dtype), None, None, None


torch.library.register_autograd("nanopause::chunked_cross_entropy", _scaled, setup_context=_save, lib=_library)


@register_flop_formula(torch.ops.nanopause.chunked_cross_entropy, get_raw=True)
def _(x, weight, targets, ignore_index, with_grad, **_):
    return (6 if with_grad else 2) * int((targets != ignore_index).sum()) * weight.numel()


def _losses(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, by_rows: bool) -> Tensor:
    """The sum of the unmasked losses, or with by_rows the loss of every position; see kernels.linear_cross_entropy.
    Finding the unmasked positions synchronises with a GPU."""
    if by_rows:  # the factors of the gradients are unknown in the forward pass, so the logits are recomputed
        if torch.compiler.is_compiling() or targets.is_meta:  # the number of unmasked positions is unknown
            live = torch.arange(len(targets), device=targets.device)
        else:
            live = (targets != ignore_index).nonzero()[:, 0]
        chunks = live.split(max(1, CHUNK_ELEMENTS // weight.shape[0]))
        losses = [
            checkpoint(_losses, x[rows], weight, targets[rows], ignore_index, use_reentrant=False) for rows in chunks
        ]
        losses = torch.cat(losses)
        return losses.new_zeros(len(x)).index_put((live,), losses)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return torch.ops.nanopause.chunked_cross_entropy(x, weight, targets, ignore_index, with_grad)[0]
