"""Cross-entropy of the logits x weightᵀ, without storing them, at the unmasked positions only.

For the unmasked ("live") positions n (targets[n] ≠ ignore_index) of x [N, C], weight [V, C] and targets y [N]:

    l[n,v] = x[n] · weight[v]      lse[n] = log Σ_v exp(l[n,v])      loss = Σ_n lse[n] − l[n,y[n]]
    dl[n,v] = exp(l[n,v] − lse[n]) − [v = y[n]]      dx = dl weight      dweight = dlᵀ x

Unmasked positions are numbered 0 … n_live − 1 on the device: `rows` lists their indices, and programs past n_live exit.
So a masked position costs no product, there is no host synchronisation, and one captured CUDA graph works for any
targets.

Sums and the target's logit are float32; dl is computed in float32 and rounded once, for the products.

Forward: every program computes a tile of logits and writes, in float32, its log-sum-exp for each position and the
target's logit; a second kernel combines the tiles. Backward: for each slice of the vocabulary, the logits are computed
again and dl is written in the dtype of the inputs; then one launch multiplies dl with weight and with x.

The logits are computed twice: 8·N·C·V FLOPs in total. Computing the gradients in the forward pass, a slice of positions
at a time, takes 6·N·C·V (see kernels/plain.py), but needs a float32 dweight to accumulate the slices: for V = 50,304
and C = 768 that alone is 9 % of the logits of 16,384 positions. Here each slice of the vocabulary writes its dweight
once, in the dtype of the inputs, and adds to dx, which is stored as the sum of two 16-bit numbers, the result and its
rounding error. So the memory besides the gradients is one slice of dl and one more dx: 4.8 % of the logits for these
sizes. Logits are not rounded to 16 bits before the softmax, and a forward pass without a backward computes no
gradients.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nanopause.kernels.launch import architecture, cast, check_input, dot, load_rows, precision, unit_stride

SLICES = 31  # of the vocabulary in the backward pass: 1/31 of the logits plus GPT-2's dx is below 5 % of the logits
SLICE_BYTES = 32 << 20  # minimum size of a slice: with few positions a smaller one would not occupy a GPU
GROUP = 8  # row blocks that share column blocks in L2


@triton.jit
def _tile(i, n_row_blocks, n_col_blocks, GROUP: tl.constexpr):
    """Row and column block of tile i: GROUP row blocks are processed together and share the columns in L2."""
    first = i // (GROUP * n_col_blocks) * GROUP
    n = tl.minimum(n_row_blocks - first, GROUP)
    i = i - first * n_col_blocks
    return first + i % n, i // n


@triton.jit
def _logits(
    x, weight, rows, n_live, o_n, o_v, C, V, x_n, weight_v,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the unmasked positions o_n and the columns o_v, float32 [BLOCK_N, BLOCK_V]; arbitrary past n_live and
    V."""
    o_c = tl.arange(0, BLOCK_C)
    i_row = tl.load(rows + o_n, mask=o_n < n_live, other=0)
    p_x = x + i_row[:, None] * x_n + o_c[None, :]
    p_weight = weight + tl.minimum(o_v, V - 1)[:, None].to(tl.int64) * weight_v + o_c[None, :]
    b_logit = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for i_c in range(0, C, BLOCK_C):
        b_x = load_rows(p_x + i_c, o_n, 0, i_c + o_c, C, False, not EVEN_C)  # [BLOCK_N, BLOCK_C]
        b_weight = load_rows(p_weight + i_c, o_v, 0, i_c + o_c, C, False, not EVEN_C)  # [BLOCK_V, BLOCK_C]
        b_logit = dot(b_x, tl.trans(b_weight), b_logit, PRECISION)
    return b_logit


@triton.jit(do_not_specialize=["N", "n_tiles"])
def _log_sums(
    x, weight, targets, rows, live, tile_lse, target_logit, N, C, V, n_tiles, x_n, weight_v,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """tile_lse [n_tiles, N] and target_logit [N], both indexed by unmasked position."""
    n_live = tl.load(live).to(tl.int32)
    n_blocks = tl.cdiv(n_live, BLOCK_N)
    if tl.program_id(0) < n_blocks * n_tiles:
        i_n, i_v = _tile(tl.program_id(0), n_blocks, n_tiles, GROUP)
        o_n, o_v = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        m_n = o_n < n_live
        b_logit = _logits(
            x, weight, rows, n_live, o_n, o_v, C, V, x_n, weight_v, BLOCK_N, BLOCK_V, BLOCK_C, EVEN_C, PRECISION
        )
        b_logit = tl.where(o_v[None, :] < V, b_logit, float("-inf"))
        b_max = tl.max(b_logit, 1)
        b_lse = b_max + tl.log(tl.sum(tl.exp(b_logit - b_max[:, None]), 1))
        tl.store(tile_lse + i_v.to(tl.int64) * N + o_n, b_lse, mask=m_n)
        b_target = tl.load(targets + tl.load(rows + o_n, mask=m_n, other=0), mask=m_n, other=-1)
        b_own = tl.sum(tl.where(o_v[None, :] == b_target[:, None], b_logit, 0.0), 1)
        here = (b_target >= i_v * BLOCK_V) & (b_target < i_v * BLOCK_V + BLOCK_V)
        tl.store(target_logit + o_n, b_own, mask=m_n & here)


@triton.jit(do_not_specialize=["N", "n_tiles"])
def _sum_tiles(tile_lse, target_logit, live, lse, losses, N, n_tiles, BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """lse and losses, both [N], indexed by unmasked position and zero past the last."""
    n_live = tl.load(live).to(tl.int32)
    o_n, o_tile = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_TILES)
    m_n = o_n < n_live
    b_max, b_sum = tl.full([BLOCK_N], float("-inf"), tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for i in range(0, n_tiles, BLOCK_TILES):
        p_lse = tile_lse + (i + o_tile)[:, None].to(tl.int64) * N + o_n[None, :]
        b_lse = tl.load(p_lse, mask=(i + o_tile < n_tiles)[:, None] & m_n[None, :], other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_shift = tl.where(m_n, b_new, 0.0)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_lse - b_shift[None, :]), 0)
        b_max = b_new
    b_lse = tl.where(m_n, b_max + tl.log(b_sum), 0.0)
    b_own = tl.load(target_logit + o_n, mask=m_n, other=0.0)
    tl.store(lse + o_n, b_lse, mask=o_n < N)
    tl.store(losses + o_n, b_lse - b_own, mask=o_n < N)


@triton.jit(do_not_specialize=["first"])
def _dlogits(
    x, weight, targets, rows, live, lse, dlogit, C, V, first, n_tiles, x_n, weight_v,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dlogit [unmasked positions, n_tiles · BLOCK_V] of the columns from `first`, zero past n_live and past V."""
    n_live = tl.load(live).to(tl.int32)
    n_blocks = tl.cdiv(n_live, BLOCK_N)
    if tl.program_id(0) < n_blocks * n_tiles:
        i_n, i_v = _tile(tl.program_id(0), n_blocks, n_tiles, GROUP)
        o_n, o_col = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        o_v, m_n = first + o_col, o_n < n_live
        b_logit = _logits(
            x, weight, rows, n_live, o_n, o_v, C, V, x_n, weight_v, BLOCK_N, BLOCK_V, BLOCK_C, EVEN_C, PRECISION
        )
        b_lse = tl.load(lse + o_n, mask=m_n, other=0.0)
        b_target = tl.load(targets + tl.load(rows + o_n, mask=m_n, other=0), mask=m_n, other=-1)
        b_dlogit = tl.exp(b_logit - b_lse[:, None]) - (o_v[None, :] == b_target[:, None]).to(tl.float32)
        b_dlogit = tl.where(m_n[:, None] & (o_v[None, :] < V), b_dlogit, 0.0)
        p_dlogit = dlogit + o_n[:, None].to(tl.int64) * (n_tiles * BLOCK_V) + o_col[None, :]
        tl.store(p_dlogit, cast(b_dlogit, dlogit.dtype.element_ty))


@triton.jit(do_not_specialize=["first"])
def _gradients(
    x, weight, rows, live, dlogit, dloss, dx, dx_rest, dweight, C, V, first, width, x_n, weight_v,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight of the columns first … first + width − 1, and their contribution to dx, stored as dx + dx_rest. The tiles
    of dweight, which sum over all unmasked positions, start first: with many positions they take longer."""
    n_live = tl.load(live).to(tl.int32)
    scale = tl.load(dloss)
    n_c = tl.cdiv(C, BLOCK_C)
    n_weight = tl.cdiv(width, BLOCK_M) * n_c
    i = tl.program_id(0)
    i_m, i_c = tl.where(i < n_weight, i, i - n_weight) // n_c, i % n_c
    o_m, o_c, o_k = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    b_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if i < n_weight:
        p_dlogit = dlogit + o_k[:, None] * width + o_m[None, :]
        step = tl.cast(width, tl.int64)
        for i_n in range(0, n_live, BLOCK_K):
            m_n = i_n + o_k < n_live
            i_row = tl.load(rows + i_n + o_k, mask=m_n, other=0)
            b_dlogit = tl.load(p_dlogit + i_n * step, mask=(o_m < width)[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
            b_x = load_rows(x + i_row[:, None] * x_n + o_c[None, :], i_n + o_k, n_live, o_c, C, True, True)
            b_sum = dot(tl.trans(b_dlogit), b_x, b_sum, PRECISION)
        m_v = (o_m < width) & (first + o_m < V)
        p_dweight = dweight + (first + o_m)[:, None].to(tl.int64) * C + o_c[None, :]
        tl.store(p_dweight, cast(b_sum * scale, dweight.dtype.element_ty), mask=m_v[:, None] & (o_c[None, :] < C))
    elif i_m * BLOCK_M < n_live:
        p_dlogit = dlogit + o_m[:, None].to(tl.int64) * width + o_k[None, :]
        p_weight = weight + (first + o_k)[:, None].to(tl.int64) * weight_v + o_c[None, :]
        step = tl.cast(weight_v, tl.int64)
        for i_v in range(0, width, BLOCK_K):
            b_dlogit = tl.load(p_dlogit + i_v)  # [BLOCK_M, BLOCK_K]
            b_weight = load_rows(p_weight + i_v * step, first + i_v + o_k, V, o_c, C, True, True)  # [BLOCK_K, BLOCK_C]
            b_sum = dot(b_dlogit, b_weight, b_sum, PRECISION)
        m_m = o_m < n_live
        i_row = tl.load(rows + o_m, mask=m_m, other=0)
        o_dx, m_dx = i_row[:, None] * C + o_c[None, :], m_m[:, None] & (o_c[None, :] < C)
        b_dx = tl.load(dx + o_dx, mask=m_dx, other=0.0).to(tl.float32) + b_sum * scale
        if dx_rest is not None:
            b_dx += tl.load(dx_rest + o_dx, mask=m_dx, other=0.0).to(tl.float32)
            b_rest = b_dx - cast(b_dx, dx.dtype.element_ty).to(tl.float32)
            tl.store(dx_rest + o_dx, cast(b_rest, dx.dtype.element_ty), mask=m_dx)
        tl.store(dx + o_dx, cast(b_dx, dx.dtype.element_ty), mask=m_dx)


class Tile(NamedTuple):
    M: int  # rows of the result; of _gradients, a divisor of _dlogits's
    N: int  # its columns
    K: int  # summed over at a time; of _gradients, a divisor of _dlogits's M and N
    warps: int
    stages: int


# Tiles of _log_sums, _dlogits and _gradients; chosen as kernels.attention.TILES.
NVIDIA = Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)
AMD = Tile(128, 128, 64, 4, 1), Tile(128, 128, 32, 4, 1), Tile(128, 128, 32, 4, 1)
# Widths that are not multiples of 64 need masked loads, which take more registers; so does float32.
ODD_WIDTHS = Tile(128, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)
FLOAT32 = Tile(64, 128, 32, 8, 2), Tile(64, 64, 16, 4, 2), Tile(64, 64, 16, 4, 2)


def tiles(arch: str, C: int, dtype: torch.dtype) -> tuple[Tile, Tile, Tile]:
    """Tiles of _log_sums, _dlogits and _gradients."""
    amd = arch == "gfx942"
    shapes = FLOAT32 if dtype == torch.float32 else ODD_WIDTHS if C % 64 else AMD if amd else NVIDIA
    return tuple(shape._replace(warps=4, stages=1) for shape in shapes) if amd else shapes


def by_row(values: Tensor, rows: Tensor, live: Tensor) -> Tensor:
    """Values [N], indexed by unmasked position, reindexed by position, [N]; zero at masked positions."""
    N = len(values)
    place = torch.where(torch.arange(N, device=values.device) < live, rows, N)
    return values.new_zeros(N + 1).scatter(0, place, values)[:N]


@torch.library.custom_op("nanopause::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the sum of the losses, float32 []; losses and lse (for the backward pass), float32 [N], indexed by
    unmasked position and zero past the last; rows, int64 [N]; and the number of unmasked positions, int64 []."""
    (N, C), V = x.shape, weight.shape[0]
    x, weight = unit_stride(x, weight)
    is_live = targets != ignore_index
    rows, live = torch.nonzero_static(is_live, size=N, fill_value=0)[:, 0], is_live.sum()
    arch = architecture(x.device)
    shape, _, _ = tiles(arch, C, x.dtype)
    n_tiles = triton.cdiv(V, shape.N)
    tile_lse = torch.empty(n_tiles, N, dtype=torch.float32, device=x.device)
    lse, losses = torch.empty_like(tile_lse[0]), torch.empty_like(tile_lse[0])
    target_logit = torch.full_like(lse, torch.nan)  # a target below 0 keeps it; one past V gives inf
    with torch.cuda.device_of(x):
        if N:
            _log_sums[(triton.cdiv(N, shape.M) * n_tiles,)](
                x, weight, targets, rows, live, tile_lse, target_logit, N, C, V, n_tiles, x.stride(0), weight.stride(0),
                BLOCK_N=shape.M, BLOCK_V=shape.N, BLOCK_C=shape.K, GROUP=GROUP, EVEN_C=C % shape.K == 0,
                PRECISION=precision(x.dtype, arch), num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
            _sum_tiles[(triton.cdiv(N, 64),)](
                tile_lse, target_logit, live, lse, losses, N, n_tiles, BLOCK_N=64, BLOCK_TILES=16
            )
    return losses.sum(), losses, lse, rows, live


@_linear_cross_entropy.register_fake
def _(x, weight, targets, ignore_index):
    (N,) = targets.shape
    loss, *of_rows = (x.new_empty(shape, dtype=torch.float32) for shape in ((), (N,), (N,)))
    return loss, *of_rows, x.new_empty((N,), dtype=torch.int64), x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("nanopause::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: Tensor | None, dlosses: Tensor | None, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, rows: Tensor,
    live: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dloss: gradient with respect to the sum of the losses; dlosses: with respect to each, indexed by unmasked
    position. The factor of a position is not multiplied into dl, which could underflow in 16 bits: it is applied to x
    for dweight, and to dx at the end."""
    (N, C), V = x.shape, weight.shape[0]
    x, weight = unit_stride(x, weight)
    scaled, scale, factor = x, dloss, None
    if dlosses is not None:
        dlosses = dlosses if dloss is None else dlosses + dloss
        factor = by_row(dlosses, rows, live)
        scale = factor.abs().amax() if N else factor.sum()
        factor = (factor / scale.clamp(min=torch.finfo(factor.dtype).tiny))[:, None]
        scaled = (x * factor).to(x.dtype)
    arch = architecture(x.device)
    _, product, gradient = tiles(arch, C, x.dtype)
    columns = max(triton.cdiv(V, SLICES), min(V, SLICE_BYTES // max(1, N * x.element_size())))
    n_row_blocks, n_tiles = triton.cdiv(N, product.M), triton.cdiv(columns, product.N)
    width = n_tiles * product.N
    dx = torch.zeros(N, C, dtype=x.dtype, device=x.device)
    dx_rest = None if x.dtype == torch.float32 else torch.zeros_like(dx)
    dweight = torch.empty(V, C, dtype=weight.dtype, device=x.device)
    dlogit = torch.empty(n_row_blocks * product.M, width, dtype=x.dtype, device=x.device)
    n_gradient_tiles = (triton.cdiv(width, gradient.M) + triton.cdiv(N, gradient.M)) * triton.cdiv(C, gradient.N)
    with torch.cuda.device_of(x):
        for first in range(0, V, width):
            if N:
                _dlogits[(n_row_blocks * n_tiles,)](
                    x, weight, targets, rows, live, lse, dlogit, C, V, first, n_tiles, x.stride(0), weight.stride(0),
                    BLOCK_N=product.M, BLOCK_V=product.N, BLOCK_C=product.K, GROUP=GROUP, EVEN_C=C % product.K == 0,
                    PRECISION=precision(x.dtype, arch), num_warps=product.warps, num_stages=product.stages,
                )  # fmt: skip
            _gradients[(n_gradient_tiles,)](
                scaled, weight, rows, live, dlogit, scale, dx, dx_rest, dweight, C, V, first, width,
                scaled.stride(0), weight.stride(0), BLOCK_M=gradient.M, BLOCK_C=gradient.N, BLOCK_K=gradient.K,
                PRECISION=precision(x.dtype, arch), num_warps=gradient.warps, num_stages=gradient.stages,
            )  # fmt: skip
    return dx if factor is None else (dx * factor).to(dx.dtype), dweight


@_backward.register_fake
def _(dloss, dlosses, x, weight, targets, lse, rows, live):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[2:])
    ctx.set_materialize_grads(False)  # _backward distinguishes missing gradients from zero gradients


def _backward_of(ctx, dloss, dlosses, *_):
    return *_backward(dloss, dlosses, *ctx.saved_tensors), None, None


_linear_cross_entropy.register_autograd(_backward_of, setup_context=_save)


@register_flop_formula(torch.ops.nanopause.linear_cross_entropy, get_raw=True)
def _(x, weight, targets, ignore_index, **_):
    return 2 * int((targets != ignore_index).sum()) * weight.numel()


@register_flop_formula(torch.ops.nanopause.linear_cross_entropy_backward, get_raw=True)
def _(dloss, dlosses, x, weight, targets, lse, rows, live, **_):
    return 6 * int(live) * weight.numel()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, by_rows: bool = False
) -> Tensor:
    """The sum of the unmasked losses, or with by_rows the loss of every position; see kernels.linear_cross_entropy."""
    check_input("linear_cross_entropy", x)
    if x.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy takes x and weight of one dtype, not {x.dtype} and {weight.dtype}")
    loss, losses, _, rows, live = _linear_cross_entropy(x, weight, targets.contiguous(), ignore_index)
    return by_row(losses, rows, live) if by_rows else loss
