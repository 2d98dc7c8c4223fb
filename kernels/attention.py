"""Flash attention in which every query attends to one interval of keys.

For head h, which attends to key head g = h // (H // G), query t and keys lo[t] ≤ s < hi[t]:

    z[t,s] = scale · q[t] · k[s]      p[t,s] = exp(z[t,s]) / Σ exp(z[t,·])      out[t] = Σ p[t,s] v[s]

lo and hi do not decrease along t. These intervals express every mask used in training and generation without a mask in
memory (queries downwards, keys to the right; # attended, . masked):

      causal         packed         prefix-LM       window       ragged decode
                    documents       (4 tokens)     (3 tokens)   (cached 5 and 2,
                                                                 3 and 2 new)
    # . . . . .    # . . . . .    # # # # . .    # . . . . .    # # # # # # . .
    # # . . . .    # # . . . .    # # # # . .    # # . . . .    # # # # # # # .
    # # # . . .    . . # . . .    # # # # . .    # # # . . .    # # # # # # # #
    # # # # . .    . . # # . .    # # # # . .    . # # # . .
    # # # # # .    . . # # # .    # # # # # .    . . # # # .    # # # . . . . .
    # # # # # #    . . . . . #    # # # # # #    . . . # # #    # # # # . . . .
                                                                . . . . . . . .
    lo 0           lo start of    lo 0           lo t + 1 − w   lo 0
    hi t + 1       the document   hi max(t + 1,  hi t + 1       hi cached + j + 1
                   hi t + 1         prefix)                     lo = hi: no query

Both bounds are monotone, so each block of queries attends to one contiguous range of keys, and all its queries attend
to one inner range of it. The same holds for the queries that attend to a block of keys:

    edge   [start, inner)      masked: lo cuts through these blocks
    inner  [inner, inner_end)  no mask
    edge   [inner_end, end)    masked: hi cuts through these blocks

The forward pass is the online softmax of [Dao 2023, Algorithm 1] in powers of two. It stores the base-2 logarithm of
each query's sum, `lse`, +inf for an empty interval. The backward pass [Algorithm 2] recomputes p = 2^(z·log₂e − lse),
so p is 0 for an empty interval. It has two kernels, one with a block of queries per program and one with a block of
keys: seven products, two more than a kernel with atomic additions, but a deterministic result.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nanopause.kernels import decode
from nanopause.kernels.launch import (
    all_registers,
    architecture,
    batch_strides,
    cast,
    check_input,
    dot,
    l2_bytes,
    load_rows,
    multiprocessors,
    precision,
    unit_stride,
)

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(1 / LOG2_E)  # removes log₂e from the kernels' scale


class Tile(NamedTuple):
    T: int  # queries
    S: int  # keys
    warps: int
    stages: int


@triton.jit
def _block_and_head(n_blocks, n_heads, section):
    """This program's block and head. Programs start in order, so the heads of a section, which fit into the L2 cache
    together, are processed at the same time."""
    i = tl.program_id(0)
    first = i // (section * n_blocks) * section
    n = tl.minimum(section, n_heads - first)
    i = i - first * n_blocks
    return i // n, first + i % n


@triton.jit
def _key_ranges(lo, hi, i_t, T, S, LO: tl.constexpr, HI: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """start, inner, inner_end, end of the keys that the queries of block i_t attend to."""
    first, last = i_t * BLOCK_T, tl.minimum(i_t * BLOCK_T + BLOCK_T, T) - 1
    start, inner, inner_end, end = 0, 0, S - T + first + 1, S - T + last + 1
    if LO:
        start = tl.minimum(tl.maximum(tl.load(lo + first), 0), S)
        inner = tl.minimum(tl.maximum(tl.load(lo + last), 0), S)
    if HI:
        inner_end, end = tl.minimum(tl.load(hi + first), S), tl.minimum(tl.load(hi + last), S)
    start = start // BLOCK_S * BLOCK_S
    inner = tl.cdiv(inner, BLOCK_S) * BLOCK_S
    inner_end = tl.maximum(inner_end, 0) // BLOCK_S * BLOCK_S
    some = inner < inner_end
    return start, tl.where(some, inner, start), tl.where(some, inner_end, start), end


@triton.jit
def _blocks(start, inner, inner_end, end, BLOCK: tl.constexpr, EDGES: tl.constexpr):
    """The edge blocks, or the inner blocks: start of the first, number of blocks, number before the gap, and length of
    the gap. The edge blocks have the inner ones as their gap."""
    if EDGES:
        before = (inner - start) // BLOCK
        return start, before + tl.cdiv(tl.maximum(end - inner_end, 0), BLOCK), before, inner_end - inner
    else:
        return inner, (inner_end - inner) // BLOCK, 0, 0


@triton.jit
def _bounds(lo, hi, o_t, T, S, LO: tl.constexpr, HI: tl.constexpr):
    """lo and hi of the queries o_t; arbitrary past the last query."""
    b_lo, b_hi = tl.zeros_like(o_t), S - T + 1 + o_t
    if LO:
        b_lo = tl.load(lo + o_t, mask=o_t < T, other=0)
    if HI:
        b_hi = tl.minimum(tl.load(hi + o_t, mask=o_t < T, other=0), S)
    return b_lo, b_hi


@triton.jit
def _read(
    b_out, b_max, b_sum, b_q, p_k, p_v, k_step, v_step, start, inner, inner_end, end, o_s, o_d, b_lo, b_hi, scale,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, LO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the inner blocks of keys, or with MASK over the edge blocks."""
    first, n, before, gap = _blocks(start, inner, inner_end, end, BLOCK_S, MASK)
    for i in range(n):
        i_s = first + i * BLOCK_S + (tl.where(i < before, 0, gap) if MASK else 0)
        b_k = load_rows(p_k + i_s * k_step, i_s + o_s, end, o_d, D, MASK, D < BLOCK_D)  # [BLOCK_S, BLOCK_D]
        b_z = dot(b_q, tl.trans(b_k), None, PRECISION)  # [BLOCK_T, BLOCK_S]
        if MASK:
            visible = i_s + o_s[None, :] < b_hi[:, None]
            if LO:
                visible = visible & (i_s + o_s[None, :] >= b_lo[:, None])
            b_z = tl.where(visible, b_z, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_z, 1) * scale)
        # b_new is -inf for a query without any key so far, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if MASK else b_new
        b_p = tl.exp2(b_z * scale - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_v = load_rows(p_v + i_s * v_step, i_s + o_s, end, o_d, D, MASK, D < BLOCK_D)  # [BLOCK_S, BLOCK_D]
        b_out = dot(cast(b_p, b_v.dtype), b_v, b_out * b_rescale[:, None], PRECISION)
        b_max = b_new
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=["T", "S", "section", "B", "H", "G"])
def _forward(
    q, k, v, lo, hi, out, lse, scale, T, S, section,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, lo_b, hi_b, B, H, G,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(T, BLOCK_T)
    i_block, i_head = _block_and_head(n_blocks, B * H, section)
    i_t = n_blocks - 1 - i_block  # the queries with the most keys under a causal mask first
    i_b, i_h = (i_head // H).to(tl.int64), (i_head % H).to(tl.int64)
    i_g = i_h // (H // G)
    lo, hi = lo + i_b * lo_b if LO else lo, hi + i_b * hi_b if HI else hi
    o_t, o_s, o_d = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    p_q = q + i_b * q_b + i_h * q_h + o_t[:, None].to(tl.int64) * q_t + o_d[None, :]
    p_k = k + i_b * k_b + i_g * k_g + o_s[:, None] * k_s + o_d[None, :]
    p_v = v + i_b * v_b + i_g * v_g + o_s[:, None] * v_s + o_d[None, :]
    k_step, v_step = tl.cast(k_s, tl.int64), tl.cast(v_s, tl.int64)

    start, inner, inner_end, end = _key_ranges(lo, hi, i_t, T, S, LO, HI, BLOCK_T, BLOCK_S)
    b_lo, b_hi = _bounds(lo, hi, o_t, T, S, LO, HI)
    b_q = load_rows(p_q, o_t, T, o_d, D, True, D < BLOCK_D)  # [BLOCK_T, BLOCK_D]
    b_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_out, b_max, b_sum = _read(
        b_out, b_max, b_sum, b_q, p_k, p_v, k_step, v_step, start, inner, inner_end, end, o_s, o_d, b_lo, b_hi,
        scale, D, BLOCK_S, BLOCK_D, False, LO, PRECISION,
    )  # fmt: skip
    b_out, b_max, b_sum = _read(
        b_out, b_max, b_sum, b_q, p_k, p_v, k_step, v_step, start, inner, inner_end, end, o_s, o_d, b_lo, b_hi,
        scale, D, BLOCK_S, BLOCK_D, True, LO, PRECISION,
    )  # fmt: skip

    empty = b_sum == 0
    b_out = b_out / tl.where(empty, 1.0, b_sum)[:, None]
    b_lse = tl.where(empty, float("inf"), b_max + tl.log2(b_sum))
    p_out = out + ((i_b * T + o_t[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(p_out, cast(b_out, out.dtype.element_ty), mask=(o_t[:, None] < T) & (o_d[None, :] < D))
    tl.store(lse + (i_b * H + i_h) * T + o_t, b_lse, mask=o_t < T)


@triton.jit
def _read_for_dq(
    b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, k_step, v_step, start, inner, inner_end, end, o_s, o_d, b_lo, b_hi,
    scale, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, LO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += dz k over blocks of keys, where dz = p · (dout vᵀ − delta)."""
    first, n, before, gap = _blocks(start, inner, inner_end, end, BLOCK_S, MASK)
    for i in range(n):
        i_s = first + i * BLOCK_S + (tl.where(i < before, 0, gap) if MASK else 0)
        b_k = load_rows(p_k + i_s * k_step, i_s + o_s, end, o_d, D, MASK, D < BLOCK_D)  # [BLOCK_S, BLOCK_D]
        b_v = load_rows(p_v + i_s * v_step, i_s + o_s, end, o_d, D, MASK, D < BLOCK_D)
        b_z = dot(b_q, tl.trans(b_k), None, PRECISION)  # [BLOCK_T, BLOCK_S]
        b_p = tl.exp2(b_z * scale - b_lse[:, None])
        if MASK:
            visible = i_s + o_s[None, :] < b_hi[:, None]
            if LO:
                visible = visible & (i_s + o_s[None, :] >= b_lo[:, None])
            b_p = tl.where(visible, b_p, 0.0)
        b_dp = dot(b_dout, tl.trans(b_v), None, PRECISION)
        b_dz = b_p * (b_dp - b_delta[:, None])
        b_dq = dot(cast(b_dz, b_k.dtype), b_k, b_dq, PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["T", "S", "section", "B", "H", "G"])
def _backward_q(
    q, k, v, lo, hi, out, lse, dout, delta, dq, scale, T, S, section,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, dout_b, dout_t, dout_h, lo_b, hi_b, B, H, G,
    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, and delta = Σ_d out · dout for _backward_kv. scale is log₂e · the scale of attention."""
    n_blocks = tl.cdiv(T, BLOCK_T)
    i_block, i_head = _block_and_head(n_blocks, B * H, section)
    i_t = n_blocks - 1 - i_block
    i_b, i_h = (i_head // H).to(tl.int64), (i_head % H).to(tl.int64)
    i_g = i_h // (H // G)
    lo, hi = lo + i_b * lo_b if LO else lo, hi + i_b * hi_b if HI else hi
    o_t, o_s, o_d = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    p_q = q + i_b * q_b + i_h * q_h + o_t[:, None].to(tl.int64) * q_t + o_d[None, :]
    p_dout = dout + i_b * dout_b + i_h * dout_h + o_t[:, None].to(tl.int64) * dout_t + o_d[None, :]
    p_k = k + i_b * k_b + i_g * k_g + o_s[:, None] * k_s + o_d[None, :]
    p_v = v + i_b * v_b + i_g * v_g + o_s[:, None] * v_s + o_d[None, :]
    k_step, v_step = tl.cast(k_s, tl.int64), tl.cast(v_s, tl.int64)
    o_out = ((i_b * T + o_t[:, None]) * H + i_h) * D + o_d[None, :]
    o_row = (i_b * H + i_h) * T + o_t

    start, inner, inner_end, end = _key_ranges(lo, hi, i_t, T, S, LO, HI, BLOCK_T, BLOCK_S)
    b_lo, b_hi = _bounds(lo, hi, o_t, T, S, LO, HI)
    b_dout = load_rows(p_dout, o_t, T, o_d, D, True, D < BLOCK_D)  # [BLOCK_T, BLOCK_D]
    b_out = load_rows(out + o_out, o_t, T, o_d, D, True, D < BLOCK_D)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(delta + o_row, b_delta, mask=o_t < T)
    b_lse = tl.load(lse + o_row, mask=o_t < T, other=float("inf"))
    b_q = load_rows(p_q, o_t, T, o_d, D, True, D < BLOCK_D)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_dq = _read_for_dq(
        b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, k_step, v_step, start, inner, inner_end, end, o_s, o_d, b_lo, b_hi,
        scale, D, BLOCK_S, BLOCK_D, False, LO, PRECISION,
    )  # fmt: skip
    b_dq = _read_for_dq(
        b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, k_step, v_step, start, inner, inner_end, end, o_s, o_d, b_lo, b_hi,
        scale, D, BLOCK_S, BLOCK_D, True, LO, PRECISION,
    )  # fmt: skip
    b_dq *= scale * LN_2
    tl.store(dq + o_out, cast(b_dq, dq.dtype.element_ty), mask=(o_t[:, None] < T) & (o_d[None, :] < D))


@triton.jit
def _read_for_dkv(
    b_dk, b_dv, b_k, b_v, p_q, p_dout, lse, delta, lo, hi, q_step, dout_step, start, inner, inner_end, end,
    o_s, o_t, o_d, T, S, scale, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += dzᵀ q and dv += pᵀ dout over blocks of queries."""
    first, n, before, gap = _blocks(start, inner, inner_end, end, BLOCK_T, MASK)
    for i in range(n):
        i_t = first + i * BLOCK_T + (tl.where(i < before, 0, gap) if MASK else 0)
        b_q = load_rows(p_q + i_t * q_step, i_t + o_t, T, o_d, D, MASK, D < BLOCK_D)  # [BLOCK_T, BLOCK_D]
        b_dout = load_rows(p_dout + i_t * dout_step, i_t + o_t, T, o_d, D, MASK, D < BLOCK_D)
        if MASK:
            m_t = i_t + o_t < T
            b_lse = tl.load(lse + i_t + o_t, mask=m_t, other=0.0)
            b_delta = tl.load(delta + i_t + o_t, mask=m_t, other=0.0)
        else:
            b_lse, b_delta = tl.load(lse + i_t + o_t), tl.load(delta + i_t + o_t)
        b_z = dot(b_k, tl.trans(b_q), None, PRECISION)  # [BLOCK_S, BLOCK_T]
        b_p = tl.exp2(b_z * scale - b_lse[None, :])
        if MASK:
            b_lo, b_hi = _bounds(lo, hi, i_t + o_t, T, S, LO, HI)
            visible = (o_s[:, None] < b_hi[None, :]) & m_t[None, :]
            if LO:
                visible = visible & (o_s[:, None] >= b_lo[None, :])
            b_p = tl.where(visible, b_p, 0.0)
        b_dv = dot(cast(b_p, b_dout.dtype), b_dout, b_dv, PRECISION)
        b_dp = dot(b_v, tl.trans(b_dout), None, PRECISION)  # [BLOCK_S, BLOCK_T]
        b_dz = b_p * (b_dp - b_delta[None, :])
        b_dk = dot(cast(b_dz, b_q.dtype), b_q, b_dk, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "S", "section", "B", "H", "G"])
def _backward_kv(
    q, k, v, lo, hi, queries, lse, dout, delta, dk, dv, scale, T, S, section,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, dout_b, dout_t, dout_h, lo_b, hi_b, B, H, G,
    R: tl.constexpr, D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv, summed over the R query heads of a group. queries: see _query_ranges."""
    n_blocks = tl.cdiv(S, BLOCK_S)
    i_block, i_head = _block_and_head(n_blocks, B * G, section)  # the first keys have the most queries
    i_b, i_g = (i_head // G).to(tl.int64), (i_head % G).to(tl.int64)
    lo, hi = lo + i_b * lo_b if LO else lo, hi + i_b * hi_b if HI else hi
    o_t, o_s, o_d = tl.arange(0, BLOCK_T), i_block * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    p_k = k + i_b * k_b + i_g * k_g + o_s[:, None].to(tl.int64) * k_s + o_d[None, :]
    p_v = v + i_b * v_b + i_g * v_g + o_s[:, None].to(tl.int64) * v_s + o_d[None, :]
    p_q = q + i_b * q_b + i_g * R * q_h + o_t[:, None] * q_t + o_d[None, :]
    p_dout = dout + i_b * dout_b + i_g * R * dout_h + o_t[:, None] * dout_t + o_d[None, :]
    q_step, dout_step = tl.cast(q_t, tl.int64), tl.cast(dout_t, tl.int64)

    if LO or HI:
        p_queries, stride = queries + i_b * 2 * n_blocks + i_block, B * 2 * n_blocks
        start, inner = tl.load(p_queries + stride), tl.load(p_queries + stride + n_blocks)
        inner_end, end = tl.load(p_queries), tl.load(p_queries + n_blocks)
    else:
        start, inner = tl.maximum(i_block * BLOCK_S - (S - T), 0), i_block * BLOCK_S + BLOCK_S - 1 - (S - T)
        inner_end, end = T, T
    start = start // BLOCK_T * BLOCK_T
    inner, inner_end = tl.cdiv(tl.maximum(inner, 0), BLOCK_T) * BLOCK_T, inner_end // BLOCK_T * BLOCK_T
    some = (inner < inner_end) & (i_block * BLOCK_S + BLOCK_S <= S)
    inner, inner_end = tl.where(some, inner, start), tl.where(some, inner_end, start)

    b_k = load_rows(p_k, o_s, S, o_d, D, True, D < BLOCK_D)  # [BLOCK_S, BLOCK_D]
    b_v = load_rows(p_v, o_s, S, o_d, D, True, D < BLOCK_D)
    b_dk, b_dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32), tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for i_r in range(R):
        p_q_r, p_dout_r = p_q + i_r * q_h, p_dout + i_r * dout_h
        o_row = (i_b * H + i_g * R + i_r) * T
        b_dk, b_dv = _read_for_dkv(
            b_dk, b_dv, b_k, b_v, p_q_r, p_dout_r, lse + o_row, delta + o_row, lo, hi, q_step, dout_step,
            start, inner, inner_end, end, o_s, o_t, o_d, T, S, scale,
            D, BLOCK_T, BLOCK_D, False, LO, HI, PRECISION,
        )  # fmt: skip
        b_dk, b_dv = _read_for_dkv(
            b_dk, b_dv, b_k, b_v, p_q_r, p_dout_r, lse + o_row, delta + o_row, lo, hi, q_step, dout_step,
            start, inner, inner_end, end, o_s, o_t, o_d, T, S, scale,
            D, BLOCK_T, BLOCK_D, True, LO, HI, PRECISION,
        )  # fmt: skip
    b_dk *= scale * LN_2
    o_out = ((i_b * S + o_s[:, None]) * G + i_g) * D + o_d[None, :]
    m_out = (o_s[:, None] < S) & (o_d[None, :] < D)
    tl.store(dk + o_out, cast(b_dk, dk.dtype.element_ty), mask=m_out)
    tl.store(dv + o_out, cast(b_dv, dv.dtype.element_ty), mask=m_out)


def _query_ranges(lo: Tensor | None, hi: Tensor | None, B: int, T: int, S: int, block: int, device) -> Tensor:
    """Bounds of the queries that attend to each block of keys [s, s + block): int32 [2, B, 2, n_blocks].

    [1, :, 0]: the first query with hi > s; [1, :, 1]: the first with hi ≥ s + block: both bounds of the masked edge.
    [0, :, 0]: the first query with lo > s; [0, :, 1]: the first with lo ≥ s + block."""
    s = torch.arange(0, S, block, dtype=torch.int32, device=device)
    lo = torch.zeros(B, T, dtype=torch.int32, device=device) if lo is None else lo
    hi = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=device).expand(B, T) if hi is None else hi
    keys = torch.cat((s, s + (block - 1))).expand(2, B, -1).contiguous()
    return torch.searchsorted(torch.stack((lo, hi)), keys, right=True, out_int32=True)


# Tiles by architecture, kernel and maximum BLOCK_D: the largest that compile without register spills (python -m bench
# resources), not yet tuned by time.
_FORWARD = {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)}
TILES = {
    "sm_80": {
        "forward": _FORWARD,
        "backward_q": {
            16: Tile(64, 64, 4, 2),
            64: Tile(128, 64, 8, 2),
            128: Tile(64, 64, 8, 2),
            256: Tile(64, 16, 8, 2),
        },
        "backward_kv": {64: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    },
    "sm_90": {
        "forward": _FORWARD,
        "backward_q": {128: Tile(128, 64, 8, 2), 256: Tile(64, 16, 8, 2)},
        "backward_kv": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 2)},
        "backward_kv grouped": {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    },
    "sm_100": {
        "forward": _FORWARD,
        "backward_q": {128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        "backward_kv": {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 1), 256: Tile(32, 32, 8, 2)},
    },
    "gfx942": {
        "forward": {128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
        "backward_q": {128: Tile(128, 64, 4, 1), 256: Tile(64, 16, 4, 1)},
        "backward_kv": {64: Tile(64, 128, 4, 1), 128: Tile(32, 128, 4, 1), 256: Tile(16, 32, 4, 1)},
    },
}
# Widths that are not powers of two need masked loads, which take more registers; so does float32.
ODD_WIDTHS = {
    "forward": {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 32, 4, 2)},
    "backward_q": {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    "backward_kv": {64: Tile(32, 64, 8, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}
FLOAT32 = {
    "forward": {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    "backward_q": {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    "backward_kv": {64: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
}


def tile(kernel: str, arch: str, D: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel. It depends on the arguments only (no autotuning), so that results are deterministic.
    "backward_kv grouped" is "backward_kv" with several query heads per key head: on sm_90 it takes more registers."""
    tables = FLOAT32
    if dtype != torch.float32:
        tables = TILES[arch] if D == triton.next_power_of_2(D) >= 16 else ODD_WIDTHS
    table = tables.get(kernel) or tables[kernel.removesuffix(" grouped")]
    shape = table[min(width for width in table if D <= width)]
    return shape._replace(warps=4, stages=1) if arch == "gfx942" else shape


def _section(rows: int, width: int, k: Tensor) -> int:
    """Number of heads such that their two operands, [rows, width] each, fit into half of the L2 cache."""
    return max(1, l2_bytes(k.device) // 2 // max(1, 2 * rows * width * k.element_size()))


@torch.library.custom_op("nanopause::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse, float32 [B, H, T]."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    q, k, v, lo, hi = unit_stride(q, k, v, lo, hi)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    arch = architecture(q.device)
    shape = tile("forward", arch, D, q.dtype)
    n_blocks = triton.cdiv(T, shape.T)
    with torch.cuda.device_of(q):
        if decode.is_better(B, T, S, H, G, n_blocks, multiprocessors(q.device)):
            decode.launch(q, k, v, lo, hi, out, lse, scale * LOG2_E)
            return out, lse
        _forward[(n_blocks * B * H,)](
            q, k, v, lo, hi, out, lse, scale * LOG2_E, T, S, min(B * H, _section(S, D, k) * (H // G)),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *batch_strides(lo, hi), B, H, G,
            D=D, LO=lo is not None, HI=hi is not None, PRECISION=precision(q.dtype, arch, D),
            BLOCK_T=shape.T, BLOCK_S=shape.S, BLOCK_D=max(16, triton.next_power_of_2(D)),
            num_warps=shape.warps, num_stages=shape.stages, **(all_registers(arch) if q.dtype == torch.float32 else {}),
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(q, k, v, lo, hi, scale):
    (B, T, H, _) = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("nanopause::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Tensor | None, hi: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout, lo, hi = unit_stride(q, k, v, dout, lo, hi)
    delta = torch.empty_like(lse)
    arch, strides = architecture(q.device), [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]
    options = dict(D=D, LO=lo is not None, HI=hi is not None, PRECISION=precision(q.dtype, arch, D),
                   BLOCK_D=max(16, triton.next_power_of_2(D)))  # fmt: skip
    with torch.cuda.device_of(q):
        shape = tile("backward_q", arch, D, q.dtype)
        _backward_q[(triton.cdiv(T, shape.T) * B * H,)](
            q, k, v, lo, hi, out, lse, dout, delta, dq, scale * LOG2_E, T, S, min(B * H, _section(S, D, k) * (H // G)),
            *strides, *batch_strides(lo, hi), B, H, G, BLOCK_T=shape.T, BLOCK_S=shape.S, **options,
            num_warps=shape.warps, num_stages=shape.stages, **(all_registers(arch) if q.dtype == torch.float32 else {}),
        )  # fmt: skip
        shape = tile("backward_kv" if H == G else "backward_kv grouped", arch, D, q.dtype)
        queries = _query_ranges(lo, hi, B, T, S, shape.S, q.device) if options["LO"] or options["HI"] else None
        _backward_kv[(triton.cdiv(S, shape.S) * B * G,)](
            q, k, v, lo, hi, queries, lse, dout, delta, dk, dv, scale * LOG2_E, T, S,
            min(B * G, _section(T * (H // G), D, q)), *strides, *batch_strides(lo, hi), B, H, G, R=H // G,
            BLOCK_T=shape.T, BLOCK_S=shape.S, **options, num_warps=shape.warps, num_stages=shape.stages,
            **all_registers(arch),
        )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, lo, hi, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, lo, hi, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi)


def _gradients(ctx, dout, _):
    q, k, v, out, lse, lo, hi = ctx.saved_tensors
    return *_attention_backward(dout, q, k, v, out, lse, lo, hi, ctx.scale), None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


# PyTorch's own convention: all pairs of query and key, two products forward and five backward.
@register_flop_formula(torch.ops.nanopause.attention)
def _(q, k, *_, **__):
    return 4 * q[0] * q[1] * q[2] * q[3] * k[1]


@register_flop_formula(torch.ops.nanopause.attention_backward)
def _(dout, q, k, *_, **__):
    return 10 * q[0] * q[1] * q[2] * q[3] * k[1]


def attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, scale: float) -> Tensor:
    """See kernels.attention; D must be a multiple of 8, at most 256. Raises ValueError for other widths or dtypes."""
    check_input("attention", q)
    D = q.shape[3]
    if D % 8 or D > 256:
        raise ValueError(f"attention in Triton takes head widths that are multiples of 8 up to 256, not {D}: "
                         "pass impl='torch'")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention takes q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    lo, hi = (None if x is None else x.to(torch.int32) for x in (lo, hi))
    return _attention(q, k, v, lo, hi, scale)[0]
