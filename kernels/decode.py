"""Split-KV attention of few queries to many keys: a token and its pauses against a cache.

A decode step has T queries per sequence, one to a few dozen, and S keys, hundreds to many thousands. It is bound by
reading the keys and values from memory once, so the work is split along the keys:

- One program processes the queries of all heads that share a key head: a tile of up to MAX_ROWS rows (t, head), for
  which keys and values are loaded once. One more pause adds rows to a tile that is padded to 16 rows anyway.
- The keys of the tile, from min lo to max hi, are divided among `n_splits` programs. n_splits depends on the shape
  only; the ranges are computed on the device from the lengths there, without host synchronisation.
- Every program writes a normalised output and the logarithm of its sum, lse; a second kernel combines these parts with
  weights 2^(lse_i − max lse). With one split the first kernel writes the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanopause.kernels.launch import architecture, batch_strides, cast, dot, load_rows, multiprocessors, precision

MAX_ROWS = 64  # maximum rows (query, head) of a tile
MIN_KEYS = 256  # minimum keys per program
PARTS = 16  # parts that are combined at once


def is_better(B: int, T: int, S: int, H: int, G: int, n_blocks: int, n_processors: int) -> bool:
    """Whether to split the keys: if there are at least twice as many keys as queries, and there are few queries or
    their n_blocks tiles per head leave multiprocessors idle. The limit on T does not depend on the number of heads, so
    that one more query causes no jump in time."""
    return S >= 2 * T and (T <= MAX_ROWS or B * H * n_blocks < n_processors)


@triton.jit(do_not_specialize=["T", "S", "n_splits", "n_tiles", "out_split", "lse_split", "B", "H", "G"])
def _decode(
    q, k, v, lo, hi, out, lse, scale, T, S, n_tiles, n_splits, out_split, lse_split,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, lo_b, hi_b, B, H, G,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of rows and a share of its keys. Row r is query r // R of head r % R in the group of R heads."""
    i_r, i_bg, i_split = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles, tl.program_id(1)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    R = H // G
    o_r, o_s, o_d = i_r * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    o_t, o_h = o_r // R, i_g * R + o_r % R
    m_r = o_t < T
    b_lo, b_hi = tl.zeros_like(o_t), tl.where(m_r, S - T + 1 + o_t, 0)
    if LO:
        b_lo = tl.maximum(tl.load(lo + i_b * lo_b + o_t, mask=m_r, other=0), 0)
    if HI:
        b_hi = tl.minimum(tl.load(hi + i_b * hi_b + o_t, mask=m_r, other=0), S)
    some = b_lo < b_hi
    first, last = tl.min(tl.where(some, b_lo, S)), tl.max(tl.where(some, b_hi, 0))
    share = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), n_splits), BLOCK_S) * BLOCK_S
    start = first + i_split * share
    end = tl.minimum(start + share, last)

    p_q = q + i_b * q_b + o_t[:, None].to(tl.int64) * q_t + o_h[:, None] * q_h + o_d[None, :]
    p_k = k + i_b * k_b + i_g * k_g + o_s[:, None] * k_s + o_d[None, :]
    p_v = v + i_b * v_b + i_g * v_g + o_s[:, None] * v_s + o_d[None, :]
    k_step, v_step = tl.cast(k_s, tl.int64), tl.cast(v_s, tl.int64)
    b_q = load_rows(p_q, o_t, T, o_d, D, True, D < BLOCK_D)  # [BLOCK_R, BLOCK_D]
    b_out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    for i_s in range(start, end, BLOCK_S):
        b_k = load_rows(p_k + i_s * k_step, i_s + o_s, end, o_d, D, True, D < BLOCK_D)  # [BLOCK_S, BLOCK_D]
        b_v = load_rows(p_v + i_s * v_step, i_s + o_s, end, o_d, D, True, D < BLOCK_D)
        b_z = dot(b_q, tl.trans(b_k), None, PRECISION)  # [BLOCK_R, BLOCK_S]
        o_key = i_s + o_s[None, :]
        b_z = tl.where((b_lo[:, None] <= o_key) & (o_key < b_hi[:, None]), b_z, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_z, 1) * scale)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_z * scale - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_out = dot(cast(b_p, b_v.dtype), b_v, b_out * b_rescale[:, None], PRECISION)
        b_max = b_new

    empty = b_sum == 0
    b_out = b_out / tl.where(empty, 1.0, b_sum)[:, None]
    b_lse = tl.where(empty, float("inf"), b_max + tl.log2(b_sum))
    p_out = out + i_split * out_split + ((i_b * T + o_t[:, None]) * H + o_h[:, None]) * D + o_d[None, :]
    tl.store(p_out, cast(b_out, out.dtype.element_ty), mask=m_r[:, None] & (o_d[None, :] < D))
    tl.store(lse + i_split * lse_split + (i_b * H + o_h) * T + o_t, b_lse, mask=m_r)


@triton.jit(do_not_specialize=["T", "n_splits", "out_split", "lse_split"])
def _combine(
    parts, parts_lse, out, lse, T, n_splits, out_split, lse_split, H,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Combine one row (sequence, query, head) of all parts, BLOCK_N parts at a time."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_t, i_h = i_row // H // T, i_row // H % T, i_row % H
    i_lse = (i_b * H + i_h) * T + i_t
    o_d = tl.arange(0, BLOCK_D)
    b_out = tl.zeros([BLOCK_D], tl.float32)
    top, total = float("-inf"), 0.0
    for i_n in range(0, n_splits, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_lse = tl.load(parts_lse + o_n * lse_split + i_lse, mask=o_n < n_splits, other=float("inf"))
        b_lse = tl.where(b_lse == float("inf"), float("-inf"), b_lse)  # a part without keys
        new = tl.maximum(top, tl.max(b_lse))
        shift = tl.where(new == float("-inf"), 0.0, new)
        b_weight, rescale = tl.exp2(b_lse - shift), tl.exp2(top - shift)
        mask = (o_n[:, None] < n_splits) & (o_d[None, :] < D)
        b_part = tl.load(parts + o_n[:, None] * out_split + i_row * D + o_d[None, :], mask=mask, other=0.0)
        b_out = b_out * rescale + tl.sum(b_part * b_weight[:, None], 0)
        top, total = new, total * rescale + tl.sum(b_weight)
    b_out = b_out / tl.where(total == 0, 1.0, total)
    tl.store(out + i_row * D + o_d, cast(b_out, out.dtype.element_ty), mask=o_d < D)
    tl.store(lse + i_lse, tl.where(total == 0, float("inf"), top + tl.log2(total)))


def tile(n_rows: int, arch: str, D: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and keys of a tile and its pipeline stages, chosen as kernels.attention.TILES."""
    if dtype == torch.float32 or D > 128 or D != triton.next_power_of_2(D):
        return 16, 16, 1
    max_rows, keys = (MAX_ROWS, 64) if D <= 64 else (MAX_ROWS // 2, 32)
    return max(16, min(max_rows, triton.next_power_of_2(n_rows))), keys, 1 if arch == "gfx942" else 2


def launch(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> None:
    """Writes out [B, T, H, D] and lse, float32 [B, H, T]. scale: log₂e · the scale of attention."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    arch, block_d = architecture(q.device), max(16, triton.next_power_of_2(D))
    block_r, block_s, stages = tile(T * (H // G), arch, D, q.dtype)
    n_tiles = triton.cdiv(T * (H // G), block_r)
    n_splits = max(1, min(triton.cdiv(2 * multiprocessors(q.device), B * G * n_tiles), S // MIN_KEYS))
    parts, parts_lse = out, lse
    if n_splits > 1:
        parts = torch.empty(n_splits, *out.shape, dtype=torch.float32, device=q.device)
        parts_lse = torch.empty(n_splits, *lse.shape, dtype=torch.float32, device=q.device)
    _decode[(n_tiles * B * G, n_splits)](
        q, k, v, lo, hi, parts, parts_lse, scale, T, S, n_tiles, n_splits, out.numel(), lse.numel(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *batch_strides(lo, hi), B, H, G,
        D=D, LO=lo is not None, HI=hi is not None, PRECISION=precision(q.dtype, arch, D),
        BLOCK_R=block_r, BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4 if D <= 128 else 8,
        num_stages=stages,
    )  # fmt: skip
    if n_splits > 1:
        _combine[(B * T * H,)](
            parts, parts_lse, out, lse, T, n_splits, out.numel(), lse.numel(), H,
            D=D, BLOCK_N=PARTS, BLOCK_D=block_d, num_warps=2,
        )  # fmt: skip
