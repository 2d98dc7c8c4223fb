"""The fastest way that plain PyTorch has: SDPA for attention, a loss in chunks of live rows."""

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


Hidden = tuple[int, int, bool, Tensor | None, Tensor | None]
KEPT_ELEMENTS = 1 << 22  # of a mask, at most
_last: tuple[Tensor, Tensor, int, torch.dtype, Hidden] | None = None


def _mask(lo: Tensor, hi: Tensor, S: int) -> Hidden:
    """What SDPA is told of intervals [B, T] of S keys: the first key, the one after the last, whether it is plain
    causal between them, a mask [B, 1, T, last - first] where it is not, and the queries without keys, bool [B, T], if
    there may be any."""
    empty, s = hi <= lo, torch.arange(S, device=hi.device, dtype=hi.dtype)
    # SDPA turns a row without keys into NaN, forward and backward: it reads the first and is zeroed after.
    mask = ((lo[..., None] <= s) & (s < hi[..., None])) | (empty[..., None] & (s == 0))
    return 0, S, False, mask[:, None], empty


def _seen(lo: Tensor, hi: Tensor, S: int, dtype: torch.dtype) -> Hidden:
    """The same where the bounds can be looked at, with the mask in `dtype` as SDPA adds it, which would make it anew of
    one in bool every time. Keys that nobody reads, such as a cache's unused slots, are left out, and so is a mask that
    would hide nothing, or what plain causal hides. The layers of a model ask one after the other for the same: the last
    answer is kept, if it is small."""
    global _last
    last_lo, last_hi, last_S, last_dtype, hidden = _last or (lo, hi, -1, dtype, None)  # another thread may write it
    if (last_S, last_dtype) == (S, dtype) and torch.equal(hi, last_hi) and torch.equal(lo, last_lo):
        return hidden
    T = hi.shape[1]
    (lo_min, lo_max), (hi_min, hi_max) = ([int(x) for x in bound.aminmax()] for bound in (lo, hi))
    last = min(max(hi_max, 1), S)
    first = min(max(lo_min, 0), last - 1)
    causal = 1 < T == last - first and lo_max <= first and bool((hi == torch.arange(first, last) + 1).all())
    with torch.inference_mode(False):  # it may be asked for in training next
        plain = causal or (lo_max <= first and hi_min >= last)
        mask = empty = None
        if not plain:
            empty, s = hi <= lo, torch.arange(first, last, dtype=hi.dtype)
            hides = s >= hi[..., None]
            if lo_max > first:
                hides = hides | (s < lo[..., None])
            if empty.any():
                hides = hides & ~(empty[..., None] & (s == first))
            else:
                empty = None
            mask = torch.zeros(hides.shape, dtype=dtype).masked_fill_(hides, -torch.inf)[:, None]
        hidden = first, last, causal, mask, empty
        if hi.numel() * (last - first) <= KEPT_ELEMENTS:
            _last = lo.clone(), hi.clone(), S, dtype, hidden
    return hidden


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, scale: float) -> Tensor:
    """See kernels.attention. Plain causal needs no mask in memory; intervals take a dense [B, 1, T, S] one, on a CPU
    one for every document of a packed row."""
    T, S = q.shape[1], k.shape[1]
    if lo is not None and hi is not None and 1 < T == S and _visible(hi):
        # Nothing crosses t where all from it on read from t on, and all before it read up to t.
        t = torch.arange(1, T)
        borders = ((lo[:, 1:] >= t) & (hi[:, :-1] <= t)).all(0).nonzero()[:, 0] + 1
        if len(borders):
            starts = [0, *borders.tolist()]
            sizes = [end - start for start, end in zip(starts, [*starts[1:], T])]
            documents = zip(*(x.split(sizes, 1) for x in (q, k, v, lo, hi)), starts)
            return torch.cat([attention(*x, lo - start, hi - start, scale) for *x, lo, hi, start in documents], 1)
    mask, empty, causal = None, None, lo is None and hi is None and 1 < T == S
    if lo is not None or hi is not None or 1 < T != S:
        lo = torch.zeros(1, T, dtype=torch.int32, device=q.device) if lo is None else lo
        hi = torch.arange(S - T + 1, S + 1, device=q.device)[None] if hi is None else hi
        first, last, causal, mask, empty = _seen(lo, hi, S, q.dtype) if S and _visible(hi) else _mask(lo, hi, S)
        k, v = k[:, first:last], v[:, first:last]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return out if empty is None else out.masked_fill(empty[..., None, None], 0)


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
