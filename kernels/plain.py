"""The fastest way that plain PyTorch has: SDPA for attention, a loss in chunks of live rows."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

# Logits in memory at once, in elements: 8 Mi in float32 are 32 MiB. They are read and written five times, in a cache if
# they fit; with fewer rows the products are slow.
CHUNK_ELEMENTS = 1 << 23


def _visible(bounds: Tensor) -> bool:
    """Whether they can be looked at without waiting for a device, or breaking a graph."""
    cpu = bounds.device.type == "cpu" and type(bounds) is Tensor
    return cpu and bounds.numel() > 0 and not torch.compiler.is_compiling()


class Part(NamedTuple):
    """Queries, and the keys that they read, from `first` to before `last`.

    causal: plain causal among them. mask: otherwise what SDPA adds to their scores, or in bool what they read,
    [B, 1, T, last - first], or None where they read all. empty: bool [B, T], queries that read nothing, or None."""

    first: int
    last: int
    causal: bool
    mask: Tensor | None
    empty: Tensor | None


KEPT_ELEMENTS = 1 << 22  # of masks, at most
WASTE = 1 << 17  # elements of keys that a row reads in vain before rows are parted: about what another call costs
Layout = tuple[int, list[int], list[Part]]  # along which dimension, of what sizes, the parts
_last: tuple[tuple[Tensor, Tensor], tuple, Layout] | None = None


def _whole(lo: Tensor, hi: Tensor, S: int) -> Part:
    """All of it, where the bounds cannot be looked at."""
    empty, s = hi <= lo, torch.arange(S, device=hi.device, dtype=hi.dtype)
    # SDPA turns a row without keys into NaN, forward and backward: it reads the first and is zeroed after.
    mask = ((lo[..., None] <= s) & (s < hi[..., None])) | (empty[..., None] & (s == 0))
    return Part(0, S, False, mask[:, None], empty)


def _part(lo: Tensor, hi: Tensor, S: int, dtype: torch.dtype) -> Part:
    """Without the keys that nobody reads, such as a cache's unused slots, and without a mask that would hide nothing,
    or what plain causal hides. The mask is in `dtype`: SDPA would turn one in bool into that every time."""
    (lo_min, lo_max), (hi_min, hi_max) = ([int(x) for x in bound.aminmax()] for bound in (lo, hi))
    last = min(max(hi_max, 1), S)
    first = min(max(lo_min, 0), last - 1)
    causal = 1 < hi.shape[1] == last - first and lo_max <= first and bool((hi == torch.arange(first, last) + 1).all())
    if causal or (lo_max <= first and hi_min >= last):
        return Part(first, last, causal, None, None)
    empty, s = hi <= lo, torch.arange(first, last, dtype=hi.dtype)
    hides = s >= hi[..., None]
    if lo_max > first:
        hides = hides | (s < lo[..., None])
    if empty.any():
        hides = hides & ~(empty[..., None] & (s == first))
    else:
        empty = None
    mask = torch.zeros(hides.shape, dtype=dtype).masked_fill_(hides, -torch.inf)[:, None]
    return Part(first, last, False, mask, empty)


def _layout(lo: Tensor, hi: Tensor, S: int, dtype: torch.dtype, width: int) -> Layout:
    """What intervals [B, T] fall into: the documents of packed rows, sequences of a cache whose lengths differ by much,
    or one part. width: elements of a key of all heads, or 0: rows stay together. The layers of a model ask one after
    the other for the same: the last answer is kept, if its masks are small."""
    global _last
    (last_lo, last_hi), last_case, layout = _last or ((lo, hi), (), None)  # read once: another thread may write it
    case = S, dtype, width
    if case == last_case and torch.equal(hi, last_hi) and torch.equal(lo, last_lo):
        return layout
    B, T = hi.shape
    borders = []
    if 1 < T == S:
        # Nothing crosses t where all from it on read from t on, and all before it read up to t.
        t = torch.arange(1, T)
        borders = (((lo[:, 1:] >= t) & (hi[:, :-1] <= t)).all(0).nonzero()[:, 0] + 1).tolist()
    ends = hi.amax(1)
    with torch.inference_mode(False):  # it may be asked for in training next
        if borders:
            places = list(pairwise((0, *borders, T)))
            parts = [_part(lo[:, i:j] - i, hi[:, i:j] - i, j - i, dtype) for i, j in places]
            layout = 1, [j - i for i, j in places], parts
        elif T < S and int((ends.amax() - ends).sum()) * width > B * WASTE:
            layout = 0, [1] * B, [_part(*bounds, S, dtype) for bounds in zip(lo.split(1), hi.split(1))]
        else:
            layout = 0, [B], [_part(lo, hi, S, dtype)]
        if sum(part.mask.numel() for part in layout[2] if part.mask is not None) <= KEPT_ELEMENTS:
            _last = (lo.clone(), hi.clone()), case, layout
    return layout


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, scale: float) -> Tensor:
    """See kernels.attention. Plain causal needs no mask in memory; other intervals take a dense one, [B, 1, T, S], on a
    CPU one for each of their parts."""
    (B, T), (S, G, D) = q.shape[:2], k.shape[1:]
    if lo is None and hi is None and T in (1, S):
        parts = [Part(0, S, 1 < T, None, None)]
    else:
        n = B if lo is not None or hi is not None else 1  # whose masks differ
        lo = torch.zeros(1, T, dtype=torch.int32, device=q.device) if lo is None else lo
        hi = torch.arange(S - T + 1, S + 1, device=q.device)[None] if hi is None else hi
        lo, hi = lo.expand(n, T), hi.expand(n, T)
        if S and _visible(hi):
            alone = G * D if q.shape[2] >= 2 * torch.get_num_threads() else 0  # a row's heads must occupy every thread
            dim, sizes, parts = _layout(lo, hi, S, q.dtype, alone)
        else:
            parts = [_whole(lo, hi, S)]
    # A piece's gradient is as large as the piece; that of a slice as large as what it is cut from.
    pieces = [(q, k, v)] if len(parts) == 1 else zip(*(x.split(sizes, dim) for x in (q, k, v)))
    results = []
    for part, (q_piece, k_piece, v_piece) in zip(parts, pieces):
        keys = slice(None), slice(part.first, part.last)
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_piece, k_piece[keys], v_piece[keys])),
            attn_mask=part.mask,
            is_causal=part.causal,
            scale=scale,
            enable_gqa=q.shape[2] != G,
        ).transpose(1, 2)
        results.append(out if part.empty is None else out.masked_fill(part.empty[..., None, None], 0))
    return results[0] if len(results) == 1 else torch.cat(results, dim)


def _sum_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the live rows' losses, dx and dweight (empty without with_grad). The gradients are computed with the loss,
    while a chunk's logits are at hand: three products a chunk, as many as with all logits kept, and none repeated."""
    live = (targets != ignore_index).nonzero()[:, 0]
    loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    # dweight sums over chunks: in bfloat16 every sum would round.
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
        del logits  # before the next chunk makes its own
    return loss, dx, dweight.to(weight.dtype)


# An operator of its own: the number of live rows is data, which torch.compile could not trace through.
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
    """The sum of the live rows' losses or every row's, see kernels.linear_cross_entropy. Finding the live rows waits
    for a GPU."""
    if by_rows:  # whose gradients differ, so that they are not known with the losses: logits are computed again
        live = (targets != ignore_index).nonzero()[:, 0]
        chunks = live.split(max(1, CHUNK_ELEMENTS // weight.shape[0]))
        losses = [checkpoint(_losses, x[rows], weight, targets[rows], use_reentrant=False) for rows in chunks]
        losses = torch.cat(losses)
        return losses.new_zeros(len(x)).index_put((live,), losses)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return torch.ops.nanopause.chunked_cross_entropy(x, weight, targets, ignore_index, with_grad)[0]
