"""The kernels against the float64 reference, with the tolerance of FlashAttention's tests: at most twice the error of
plain PyTorch in the same precision, three times for gradients.

Every comparison also rejects mutants: the operation with an injected bug.
"""

import importlib
import math
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import peak_extra_bytes
from nanopause import kernels
from nanopause.kernels import Attend, attention, linear_cross_entropy, plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = pytest.mark.parametrize("impl", [name for name in kernels.IMPLEMENTATIONS if name != "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
properties = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def check(got, baseline, truth, what):
    """Assert that the error of `got` is at most twice that of `baseline`, in the same precision; three times for
    gradients. All are dictionaries of tensors. Errors of a few float32 roundings are allowed."""
    for name in truth:
        assert got[name].dtype == baseline[name].dtype and got[name].shape == truth[name].shape, f"{name} of {what}"
        error, allowed = ((x[name].double() - truth[name]).abs().max() for x in (got, baseline))
        tiny = 16 * torch.finfo(torch.float32).eps * truth[name].abs().max().clamp(min=1)
        bound = (3 if name.startswith("d") else 2) * allowed + tiny
        # False for NaN.
        assert error <= bound, f"{name} of {what}: off by {error:.2g}, allowed {bound:.2g}"


# Attention


def intervals(kind, B, T, S, seed=0):
    """lo, hi of a kind of mask for T queries at the last positions of a sequence of S (S < T: the first have none)."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(S - T, S).expand(B, T)
    zeros, causal = torch.zeros_like(place), place + 1
    if kind == "causal":
        return None, None
    if kind == "packed":  # documents of 1 to 2·√S tokens, different ones in every row
        starts = torch.zeros(B, S, dtype=torch.int64)
        for row in starts:
            lengths = torch.randint(1, 2 * math.isqrt(S) + 1, (S,), generator=generator)
            for start in accumulate(lengths.tolist()):
                row[start:] = start
        lo, hi = starts.gather(1, place.clamp(min=0)), causal
    elif kind == "prefix":  # bidirectional prefixes of a third to two thirds of S
        lo, hi = zeros, causal.maximum(torch.randint(S // 3, 2 * S // 3 + 1, (B, 1), generator=generator))
    elif kind == "window":
        lo, hi = place + 1 - max(1, S // 5), causal
    elif kind == "padding":  # the last half of row 0 and all of row 1 have no keys, later rows some
        length = torch.tensor([S - T // 2, 0, *(S - T // 3 for _ in range(B - 2))])[:B, None]
        lo, hi = torch.where(place < length, zeros, length), torch.where(place < length, causal, length)
    elif kind == "ragged":  # a decode step: T new tokens after caches of different lengths
        cached = torch.randint(0, S - T + 1, (B, 1), generator=generator)
        lo, hi = zeros, cached + torch.arange(T) + 1
    return lo.int().to(DEVICE), hi.int().to(DEVICE)


def attention_inputs(B, T, S, H, G, D, dtype, seed=0):
    """q, k, v and the output's gradient. Queries have standard deviation 2, so that the softmax is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, D), (B, T, H, D)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return 2 * q, k, v, dout


def plain_attention(q, k, v, lo=None, hi=None, *, scale=None):
    """The plain implementation: products in the precision of the inputs, softmax in float32 or wider."""
    (B, T), S = q.shape[:2], k.shape[1]
    s, ends = torch.arange(S, device=DEVICE), torch.arange(S - T + 1, S + 1, device=DEVICE).expand(B, T)
    lo, hi = torch.zeros_like(ends) if lo is None else lo, ends if hi is None else hi
    visible = ((lo[..., None] <= s) & (s < hi[..., None]))[:, None]
    k, v = (repeat(x, "b s g d -> b s (g r) d", r=q.shape[2] // k.shape[2]) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q * (q.shape[-1] ** -0.5 if scale is None else scale), k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~visible, -1e30)
    return torch.einsum("bhts,bshd->bthd", (scores.softmax(-1) * visible).to(q.dtype), v)


def attention_results(function, q, k, v, dout, lo, hi, dtype, **options):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out = function(q, k, v, lo, hi, **options)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
    return dict(out=out.detach(), dq=dq, dk=dk, dv=dv)


def check_attention(function, inputs, lo=None, hi=None, what="", **options):
    """Check a function with attention's signature against the reference. Queries without keys must give zeros."""
    dtype, (B, T), S = inputs[0].dtype, inputs[0].shape[:2], inputs[1].shape[1]
    got = attention_results(function, *inputs, lo, hi, dtype, **options)
    options.pop("impl", None)
    baseline = attention_results(plain_attention, *inputs, lo, hi, dtype, **options)
    truth = attention_results(attention, *inputs, lo, hi, torch.float64, impl="reference", **options)
    check(got, baseline, truth, what)
    causal = torch.arange(S - T + 1, S + 1, device=DEVICE).expand(B, T)
    empty = (causal if hi is None else hi.clamp(max=S)) <= (torch.zeros_like(causal) if lo is None else lo.clamp(min=0))
    assert not got["out"][empty].any() and not got["dq"][empty].any(), f"empty rows of {what}"


@pytest.mark.parametrize("kind", ["causal", "packed", "window", "padding"])
def test_reference_attention_equals_a_loop(kind):
    B, T, S, H, G, D = 2, 5, 7, 4, 2, 3
    q, k, v, _ = attention_inputs(B, T, S, H, G, D, torch.float64)
    lo, hi = intervals(kind, B, T, S)
    out = attention(q, k, v, lo, hi, impl="reference")
    for b in range(B):
        for t in range(T):
            first, end = (0, S - T + t + 1) if kind == "causal" else (lo[b, t], hi[b, t])
            keys = range(max(0, first), min(S, end))
            for h in range(H):
                g = h // (H // G)
                weight = {s: math.exp(q[b, t, h] @ k[b, s, g] / math.sqrt(D)) for s in keys}
                total = sum(weight.values())
                expected = sum((w / total * v[b, s, g] for s, w in weight.items()), torch.zeros(D, device=DEVICE))
                torch.testing.assert_close(out[b, t, h], expected.double(), rtol=1e-12, atol=1e-12)


SHAPES = [  # B, T, S, H, G, D
    (2, 1, 1, 2, 1, 16),
    (2, 1, 300, 2, 1, 64),
    (2, 63, 63, 1, 1, 40),
    (1, 63, 127, 4, 1, 16),
    (1, 127, 127, 1, 1, 128),
    (1, 127, 300, 2, 1, 64),
    (1, 129, 129, 2, 1, 64),
    (1, 300, 300, 1, 1, 40),
    (2, 129, 63, 2, 2, 16),
    (1, 300, 1, 1, 1, 128),
    (1, 40, 63, 1, 1, 136),
]


@IMPLS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(impl, dtype, shape):
    B, T, S = shape[:3]
    inputs = attention_inputs(*shape, dtype)
    for kind in ("causal", "packed", "prefix", "window", "padding") + (("ragged",) if T <= S else ()):
        check_attention(attention, inputs, *intervals(kind, B, T, S), what=kind, impl=impl)


def packed_prefixes(lengths, prefixes, padding):
    """lo, hi of one row: documents with bidirectional prefixes, then queries without keys."""
    lo, hi, start = [], [], 0
    for n, prefix in zip(lengths, prefixes):
        lo += n * [start]
        hi += [start + max(prefix, t + 1) for t in range(n)]
        start += n
    return (torch.tensor([x + padding * [start]], dtype=torch.int32, device=DEVICE) for x in (lo, hi))


@IMPLS
@DTYPES
@pytest.mark.parametrize("padding", [0, 5])
def test_attention_of_packed_prefixes(impl, dtype, padding):
    lengths, prefixes = (1, 17, 40, 2, 3), (0, 9, 40, 1, 0)
    inputs = attention_inputs(1, sum(lengths) + padding, sum(lengths) + padding, 4, 2, 16, dtype)
    check_attention(attention, inputs, *packed_prefixes(lengths, prefixes, padding), impl=impl)


@IMPLS
@pytest.mark.parametrize("end", [-2, 0, 1, 40, 55])
def test_one_query_with_one_bound_for_all(impl, end):
    """Bounds beyond the keys are clamped to them."""
    hi = torch.full((3, 1), end, dtype=torch.int32, device=DEVICE)
    q, k, v, _ = attention_inputs(3, 1, 40, 4, 2, 16, torch.float32)
    got = attention(q, k, v, None, hi, impl=impl)
    torch.testing.assert_close(got, kernels.reference.attention(q, k, v, torch.zeros_like(hi), hi.clamp(0, 40), 0.25))


@DTYPES
@pytest.mark.parametrize("kind", ["causal", "ragged", "padding"])
@pytest.mark.parametrize("H, G", [(6, 2), (4, 1)])
def test_single_query_loads_the_keys_of_a_group_once(kind, H, G, dtype, monkeypatch):
    shapes, dense = [], F.scaled_dot_product_attention

    def counted(q, k, *args, **options):
        shapes.append((q.shape[1:3], k.shape[1], options["enable_gqa"]))
        return dense(q, k, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    inputs = attention_inputs(3, 1, 40, H, G, 16, dtype)
    check_attention(attention, inputs, *intervals(kind, 3, 1, 40), impl="torch")
    assert ((G, H // G), G, False) in shapes
    attention(*attention_inputs(3, 2, 40, H, G, 16, dtype)[:3], impl="torch")
    assert shapes[-1] == ((H, 2), G, True)


@pytest.mark.skipif(DEVICE != "cpu", reason="only a CPU's bounds are visible to the host")
@pytest.mark.parametrize("is_uniform", [True, False])
def test_documents_of_equal_length_are_one_sdpa_call(is_uniform, monkeypatch):
    """Unless an interval is narrower."""
    start = torch.arange(30).div(10, rounding_mode="floor") * 10
    lo, hi = start.expand(2, 30).int().clone(), torch.arange(1, 31).expand(2, 30).int().clone()
    if not is_uniform:
        lo[1, 25:] = 21
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or sdpa(*args, **kw))
    inputs = attention_inputs(2, 30, 30, 4, 2, 16, torch.float32)
    attention(*inputs[:3], lo, hi, impl="torch")
    assert len(calls) == (1 if is_uniform else 3)
    check_attention(attention, inputs, lo, hi, impl="torch")


@pytest.mark.skipif(DEVICE != "cpu", reason="only a CPU's bounds are visible to the host")
def test_packed_rows_are_computed_per_document(monkeypatch):
    """Also if two rows share only some document borders, or unused keys lie between documents, as in a cache. Queries
    without keys belong to the preceding part."""
    masks, dense = [], F.scaled_dot_product_attention

    def counted(q, k, v, attn_mask=None, **options):
        masks.append((q.shape[2], k.shape[2], attn_mask is not None))
        return dense(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v, _ = attention_inputs(1, 30, 30, 2, 2, 8, torch.float32)
    attention(q, k, v, *packed_prefixes((10, 12, 3), (0, 4, 0), 5), impl="torch")
    assert masks == [(10, 10, False), (12, 12, True), (8, 3, True)]
    masks.clear()
    gaps = torch.tensor(2 * [0] + 10 * [2] + 12 * [5] + [9], dtype=torch.int32)
    lo, hi = (bound + gaps for bound in packed_prefixes((2, 10, 12, 1), 4 * [0], 0))
    check_attention(attention, attention_inputs(1, 25, 40, 2, 2, 8, torch.float32), lo, hi, impl="torch")
    assert masks[:4] == [(2, 2, False), (10, 10, False), (12, 12, False), (1, 1, False)]
    masks.clear()
    lo, hi = torch.tensor([[[0, 0, 3, 6], [0, 0, 5, 6]], [[2, 2, 5, 8], [2, 3, 6, 9]]], dtype=torch.int32)
    check_attention(attention, attention_inputs(2, 4, 12, 2, 2, 8, torch.float32), lo, hi, impl="torch")
    assert [(q, k) for q, k, _ in masks[:3]] == [(2, 3), (1, 3), (1, 3)]  # split where neither row attends across
    masks.clear()
    one, two = (packed_prefixes(lengths, (0, 0, 0), 0) for lengths in ((10, 12, 8), (10, 5, 15)))
    lo, hi = (torch.cat(bounds) for bounds in zip(one, two))
    inputs = attention_inputs(2, 30, 30, 2, 2, 8, torch.float32)
    check_attention(attention, inputs, lo, hi, impl="torch")
    assert masks[0] == (10, 10, False) and masks[1] == (20, 20, True)


@pytest.mark.skipif(DEVICE != "cpu", reason="only a CPU's bounds are visible to the host")
def test_gradients_of_packed_rows_have_the_size_of_their_documents():
    """No slices: the gradient of a slice has the size of the whole tensor."""
    q, k, v, _ = attention_inputs(1, 30, 30, 2, 1, 8, torch.float32)
    out = attention(q.requires_grad_(), k, v, *packed_prefixes((10, 12, 3), (0, 4, 0), 5), impl="torch")
    seen, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [following for following, _ in node.next_functions if following]
    assert any("Split" in name for name in seen) and not any("Slice" in name for name in seen)


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@IMPLS
def test_attention_with_one_bound_and_a_scale(impl):
    B, T, S = 2, 33, 65
    inputs = attention_inputs(B, T, S, 4, 2, 16, torch.float32)
    lo, hi = intervals("window", B, T, S)
    check_attention(attention, inputs, lo, None, what="lo alone", impl=impl)
    check_attention(attention, inputs, None, hi - 3, what="hi alone", impl=impl)
    check_attention(attention, inputs, scale=0.1, what="scale", impl=impl)


@contextmanager
def small_tiles():
    """Tiles of 16, so that small shapes have inner blocks, blocks at both edges, and slices of the vocabulary."""
    if "triton" not in kernels.IMPLEMENTATIONS:
        yield
        return
    attention_module, loss_module = (
        importlib.import_module(f"nanopause.kernels.{n}") for n in ("attention", "linear_cross_entropy")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "tile", lambda *_: attention_module.Tile(16, 16, 4, 2))
        patch.setattr(loss_module, "tiles", lambda *_: 3 * (loss_module.Tile(16, 16, 16, 4, 2),))
        patch.setattr(loss_module, "SLICE_BYTES", 0)
        patch.setattr(loss_module, "SLICES", 2)
        yield


@IMPLS
def test_layers_share_their_intervals(impl):
    """One Attend for several layers, interleaved with other shapes and dtypes: results do not depend on earlier
    calls."""
    lo = torch.tensor([[0, 0, 2, 2, 4, 4], [0, 0, 0, 2, 4, 4]], dtype=torch.int32, device=DEVICE)
    hi = torch.tensor([[2, 2, 3, 4, 5, 6], [0, 1, 2, 4, 6, 6]], dtype=torch.int32, device=DEVICE)
    f32, f16 = torch.float32, torch.float16
    for bounds in (lo, hi), (lo, None), (None, None):
        attend = Attend(*bounds, impl=impl)
        for S, H, D, dtype in (6, 2, 16, f32), (6, 2, 16, f32), (9, 2, 16, f32), (9, 4, 16, f16), (6, 4, 8, f32):
            inputs = attention_inputs(2, 6, S, H, 2, D, dtype, seed=S + H)
            check_attention(lambda q, k, v, *_, attend=attend: attend(q, k, v), inputs, *bounds)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs float64 and bounds visible to the host")
def test_masks_have_the_dtype_of_the_queries():
    """Required because SDPA accepts float32 masks for all dtypes."""
    hi = torch.arange(1, 10, dtype=torch.int32)[None].clamp(min=4)
    attend = Attend(None, hi, impl="torch")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        check_attention(lambda q, k, v, *_: attend(q, k, v), attention_inputs(1, 9, 9, 2, 1, 8, dtype), None, hi)


@pytest.mark.parametrize("bounds", [(False, True), (True, False), (True, True)], ids=str)
def test_plain_attention_under_torch_func(bounds):
    """Tensors of torch.func have no memory that NumPy could access."""
    q, k, v, _ = attention_inputs(2, 9, 9, 2, 1, 8, torch.float32)

    def total(q):
        lo, hi = (x + torch.zeros(2, 9, dtype=torch.int32, device=DEVICE) for x in intervals("window", 2, 9, 9))
        return attention(q, k, v, *(x if has else None for x, has in zip((lo, hi), bounds)), impl="torch").sum()

    q = q.detach().requires_grad_()
    (expected,) = torch.autograd.grad(total(q), q)
    torch.testing.assert_close(torch.func.grad(total)(q.detach()), expected)


@IMPLS
def test_attention_of_an_empty_batch(impl):
    q, k, v, _ = attention_inputs(0, 9, 9, 2, 1, 8, torch.float32)
    lo = torch.zeros(0, 9, dtype=torch.int32, device=DEVICE)
    for bounds in (None, None), (lo, None), (None, lo), (lo, lo):
        assert attention(q, k, v, *bounds, impl=impl).shape == q.shape


@IMPLS
def test_intervals_far_outside_of_the_keys(impl):
    """Bounds at which int32 arithmetic would overflow, and intervals without any existing key."""
    least = -(2**31)
    for lo, hi in ([0, 1], [least, least]), ([-5, 1], [-2, 2]), ([0, 2**31 - 1], [2**31 - 1] * 2), ([5, 6], [6, 7]):
        lo, hi = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (lo, hi))
        for S in (2, 3):
            check_attention(attention, attention_inputs(1, 2, S, 2, 2, 8, torch.float32), lo, hi, impl=impl)


@IMPLS
@properties
@given(data=st.data(), B=st.integers(1, 2), T=st.integers(1, 70), S=st.integers(1, 70), G=st.integers(1, 2),
       r=st.integers(1, 3), D=st.sampled_from([8, 16, 24]))  # fmt: skip
def test_attention_with_any_monotone_intervals(impl, data, B, T, S, G, r, D):
    """Also bounds outside 0…S, hi below lo, and one of them None."""
    far = st.sampled_from([-(2**31), 2**31 - 1])
    bounds = st.lists(st.integers(-3, S + 3) | far, min_size=T, max_size=T).map(sorted)
    rows = st.none() | st.lists(bounds, min_size=B, max_size=B)
    lo, hi = (data.draw(rows) for _ in "lh")
    lo, hi = (None if x is None else torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (lo, hi))
    with small_tiles():
        check_attention(attention, attention_inputs(B, T, S, G * r, G, D, torch.float32), lo, hi, impl=impl)


def attention_mutants(B, T, S):
    """attention with one injected bug each."""
    zeros, ends = torch.zeros(B, T, dtype=torch.int32, device=DEVICE), torch.arange(S - T + 1, S + 1, device=DEVICE)
    ends = ends.int().expand(B, T)

    def shifted(d_lo, d_hi):
        def mutant(q, k, v, lo, hi, **options):
            lo, hi = zeros if lo is None else lo, ends if hi is None else hi
            return attention(q, k, v, lo + d_lo, hi + d_hi, **options)

        return mutant

    def dense_rows_of_nan(q, k, v, lo, hi, **options):
        lo, hi = zeros if lo is None else lo, ends if hi is None else hi
        s = torch.arange(S, device=DEVICE)
        mask = (lo[..., None] <= s) & (s < hi[..., None])
        k, v = (repeat(x, "b s g d -> b s (g r) d", r=q.shape[2] // k.shape[2]) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)

    def heads_interleaved(q, k, v, lo, hi, **options):
        r, g = q.shape[2] // k.shape[2], k.shape[2]
        out = attention(rearrange(q, "b t (r g) d -> b t (g r) d", g=g), k, v, lo, hi, **options)
        return rearrange(out, "b t (g r) d -> b t (r g) d", r=r)

    def gradient_of_values_forgotten(q, k, v, lo, hi, **options):
        return attention(q, k, v.detach(), lo, hi, **options) + 0 * v.sum()

    return {
        "hi one more": shifted(0, 1),
        "hi one less": shifted(0, -1),
        "lo one less": shifted(-1, 0),
        "lo one more": shifted(1, 0),
        "scale dropped": lambda q, k, v, lo, hi, **options: attention(q, k, v, lo, hi, **options | {"scale": 1.0}),
        "NaN in empty rows": dense_rows_of_nan,
        "heads of a group interleaved": heads_interleaved,
        "gradient of values forgotten": gradient_of_values_forgotten,
    }


@DTYPES
@pytest.mark.parametrize("mutant", attention_mutants(1, 1, 1))
def test_attention_mutants_are_rejected(dtype, mutant):
    B, T, S = 2, 63, 63
    inputs, mask = attention_inputs(B, T, S, 4, 2, 16, dtype), intervals("padding", B, T, S)
    check_attention(attention, inputs, *mask, impl="torch")
    with pytest.raises(AssertionError, match="off by"):
        check_attention(attention_mutants(B, T, S)[mutant], inputs, *mask, impl="torch")


@IMPLS
def test_attention_shapes_are_checked(impl):
    q, k, v, _ = attention_inputs(2, 5, 7, 4, 2, 8, torch.float32)
    for wrong in ((q[..., :4], k, v), (q[:1], k, v), (q[:, :, :3], k, v), (q, k[:, :6], v), (q, k, v[..., :4]),
                  (q[:, :, :0], k[:, :, :0], v[:, :, :0]), (q[..., :0], k[..., :0], v[..., :0])):  # fmt: skip
        with pytest.raises(ValueError, match="attention takes"):
            attention(*wrong, impl=impl)
    lo = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    for bounds in ((lo[0], None), (None, lo[:, :4]), (lo[:1], lo), (lo, lo.long() + 2**31)):
        with pytest.raises(ValueError, match=r"attention takes lo and hi int32 \[B,T\] = \[2, 5\]"):
            attention(q, k, v, *bounds, impl=impl)


# Linear cross-entropy


def loss_inputs(N, C, V, live, dtype, seed=0):
    """x, weight and targets, of which `live` at random positions are not −100."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((N, C), (V, C)))
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[live:]] = -100
    # Logits of standard deviation 2: neither uniform nor one-hot.
    return x.to(DEVICE, dtype), (weight * 2 / math.sqrt(C)).to(DEVICE, dtype), targets.to(DEVICE)


def plain_loss(x, weight, targets, ignore_index=-100, reduction="mean"):
    """The plain implementation: all logits in the precision of the inputs, softmax in float32."""
    loss = F.cross_entropy((x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)), targets,
                           ignore_index=ignore_index, reduction="none" if reduction == "none" else "sum")  # fmt: skip
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss


def loss_results(function, x, weight, targets, dtype, **options):
    x, weight = (a.detach().to(dtype).requires_grad_() for a in (x, weight))
    loss = function(x, weight, targets, **options)
    # Upstream gradients of about 1e-6 per row underflow in 16 bits if they are multiplied in too early.
    upstream = 3e-6 * torch.arange(-2, len(loss) - 2, device=loss.device) if loss.ndim else torch.tensor(3.0)
    dx, dw = torch.autograd.grad(loss, (x, weight), upstream.to(loss))
    return dict(loss=loss.detach(), dx=dx, dw=dw)


def check_loss(function, x, weight, targets, what="", impl=None, **options):
    """Check a function with linear_cross_entropy's signature against the reference. Masked rows must have zero
    gradient."""
    got = loss_results(function, x, weight, targets, x.dtype, **options, **({"impl": impl} if impl else {}))
    baseline = loss_results(plain_loss, x, weight, targets, x.dtype, **options)
    truth = loss_results(linear_cross_entropy, x, weight, targets, torch.float64, impl="reference", **options)
    check(got, baseline, truth, what)
    assert not got["dx"][targets == options.get("ignore_index", -100)].any(), f"masked rows of {what}"


def test_reference_loss_equals_a_loop():
    x, weight, targets = loss_inputs(6, 5, 7, 4, torch.float64)
    losses = []
    for row, target in zip(x, targets):
        logits = [float(row @ w) for w in weight]
        if target != -100:
            losses.append(math.log(sum(map(math.exp, logits))) - logits[target])
    assert len(losses) == 4
    for reduction, expected in (("sum", sum(losses)), ("mean", sum(losses) / 4)):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction, impl="reference")
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("live", [200, 60, 1, 0])
def test_loss(impl, dtype, reduction, live, monkeypatch):
    N, C, V = 200, 48, 301
    monkeypatch.setattr(plain, "CHUNK_ELEMENTS", 4 * V)
    if impl == "triton":
        monkeypatch.setattr(importlib.import_module("nanopause.kernels.linear_cross_entropy"), "SLICE_BYTES", 0)
    check_loss(linear_cross_entropy, *loss_inputs(N, C, V, live, dtype), impl=impl, reduction=reduction)


@IMPLS
@DTYPES
def test_loss_of_masked_rows_only_is_zero(impl, dtype):
    x, weight, targets = loss_inputs(9, 16, 33, 0, dtype)
    for name, result in loss_results(linear_cross_entropy, x, weight, targets, dtype, impl=impl).items():
        assert torch.equal(result, torch.zeros_like(result)), name


@IMPLS
@pytest.mark.parametrize("ignore_index", [-1, 5])
def test_loss_with_another_ignore_index(impl, ignore_index):
    x, weight, targets = loss_inputs(60, 16, 33, 40, torch.float32)
    targets[targets == -100] = ignore_index
    check_loss(linear_cross_entropy, x, weight, targets, ignore_index=ignore_index, impl=impl)


@IMPLS
@properties
@given(N=st.integers(1, 50), C=st.integers(1, 40), V=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_loss_of_any_shape(impl, N, C, V, share, seed):
    with small_tiles():
        check_loss(linear_cross_entropy, *loss_inputs(N, C, V, round(share * N), torch.float32, seed), impl=impl)


@IMPLS
def test_loss_with_tied_embedding(impl):
    """x depends on the weight, whose gradient is the sum of both uses."""
    _, embedding, targets = loss_inputs(40, 16, 33, 30, torch.float32)
    tokens = targets.roll(1).clamp(min=0)

    def gradient(function, dtype, **options):
        weight = embedding.to(dtype).requires_grad_()
        return dict(dw=torch.autograd.grad(function(weight[tokens].tanh(), weight, targets, **options), weight)[0])

    check(
        gradient(linear_cross_entropy, torch.float32, impl=impl),
        gradient(plain_loss, torch.float32),
        gradient(linear_cross_entropy, torch.float64, impl="reference"),
        "tied weight",
    )


@IMPLS
def test_loss_under_autocast(impl):
    """As in mixed-precision training: float32 inputs, bfloat16 products, float32 gradients."""
    x, weight, targets = loss_inputs(200, 48, 301, 100, torch.float32)
    truth = loss_results(linear_cross_entropy, x, weight, targets, torch.float64, impl="reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = loss_results(linear_cross_entropy, x, weight, targets, torch.float32, impl=impl)
        baseline = loss_results(plain_loss, x, weight, targets, torch.float32)
    check(got, baseline, truth, "autocast")


def loss_flops(N, live, grad, impl):
    x, weight, targets = loss_inputs(N, 16, 33, live, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets, impl=impl)
        if grad:
            loss.backward()
    return counter.get_total_flops()


@IMPLS
@pytest.mark.parametrize("grad", [True, False])
def test_masked_rows_cost_no_flops(impl, grad):
    """Triton recomputes the logits in the backward pass."""
    N, C, V = 64, 16, 33
    products = {"torch": 3, "triton": 4}[impl] if grad else 1
    assert loss_flops(N, N, grad, impl) == 2 * loss_flops(N, N // 2, grad, impl) == products * 2 * N * C * V
    assert loss_flops(N, 0, grad, impl) == 0


@pytest.mark.parametrize("grad", [True, False])
def test_registered_flops_of_the_loss_equal_its_products(grad):
    """For the operator FlopCounterMode uses the registered formula; for the function inside it counts products."""
    for live in (64, 32, 1, 0):
        x, weight, targets = loss_inputs(64, 16, 33, live, torch.float32)
        with FlopCounterMode(display=False) as counter:
            plain._sum_and_gradients(x, weight, targets, -100, grad)
        assert counter.get_total_flops() == loss_flops(64, live, grad, "torch")


def peak_bytes(function):
    """Peak bytes allocated while function runs, beyond those before and those that it returns."""
    results = []
    peak = peak_extra_bytes(lambda: results.extend(function()), torch.device("cpu"))
    return peak - sum(x.nbytes for x in results)


def test_memory_of_the_loss():
    """N = 8192, V = 50,304: besides the gradients one chunk of logits, less than 5 % of all logits' 1.6 GB."""
    x, weight, targets = loss_inputs(8192, 8, 50304, 8192, torch.float32)
    extra = peak_bytes(lambda: plain._sum_and_gradients(x, weight, targets, -100, True))
    logits = 4 * 8192 * 50304
    assert 4 * plain.CHUNK_ELEMENTS * 0.9 < extra < 0.05 * logits, f"{extra:,} bytes"


def row_forgotten(x, weight, targets, **options):
    targets = targets.clone()
    targets[(targets != -100).nonzero()[0]] = -100
    return linear_cross_entropy(x, weight, targets, **options)


LOSS_MUTANTS = {
    "a live row forgotten": row_forgotten,
    "mean over all rows": lambda x, weight, targets: linear_cross_entropy(x, weight, targets, reduction="sum") / len(x),
    "masked rows have target 0": lambda x, weight, targets: linear_cross_entropy(x, weight, targets.clamp(min=0)),
    "last class left out": lambda x, weight, targets: linear_cross_entropy(
        x, weight[:-1], targets.clamp(max=len(weight) - 2)
    ),
    "gradient of the weight forgotten": lambda x, weight, targets: (
        linear_cross_entropy(x, weight.detach(), targets) + 0 * weight.sum()
    ),
    "upstream gradient ignored": lambda x, weight, targets: (
        linear_cross_entropy(x, weight, targets).detach() + linear_cross_entropy(x, weight, targets) / 3
    ),
}


@DTYPES
@pytest.mark.parametrize("mutant", LOSS_MUTANTS)
def test_loss_mutants_are_rejected(dtype, mutant):
    inputs = loss_inputs(200, 48, 301, 150, dtype)
    check_loss(linear_cross_entropy, *inputs)
    with pytest.raises(AssertionError, match="off by|masked rows"):
        check_loss(LOSS_MUTANTS[mutant], *inputs)


@IMPLS
def test_loss_shapes_are_checked(impl):
    x, weight, targets = loss_inputs(6, 8, 9, 6, torch.float32)
    for wrong in ((x[:5], weight), (x, weight[:, :7]), (x[None], weight), (x, weight[0]), (x, weight[:0])):
        with pytest.raises(ValueError, match="linear_cross_entropy takes"):
            linear_cross_entropy(*wrong, targets, impl=impl)
    with pytest.raises(ValueError, match="targets in int64, not torch.int32"):
        linear_cross_entropy(x, weight, targets.int(), impl=impl)
    with pytest.raises(ValueError, match="reduction='max'"):
        linear_cross_entropy(x, weight, targets, reduction="max", impl=impl)


@IMPLS
@pytest.mark.parametrize("live", [150, 0])
def test_loss_compiled(impl, live):
    """The loss is one graph, with the results of eager mode."""
    x, weight, targets = loss_inputs(200, 48, 301, live, torch.float32)
    compiled = torch.compile(lambda x, weight, targets: linear_cross_entropy(x, weight, targets, impl=impl),
                             fullgraph=True)  # fmt: skip
    check_loss(compiled, x, weight, targets, "compiled")


@IMPLS
def test_losses_of_rows_compiled(impl):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    check_loss(compiled, *loss_inputs(70, 48, 301, 40, torch.float32), impl=impl, reduction="none")


@pytest.mark.parametrize("reduction, shape", [("none", (6,)), ("mean", ())])
def test_plain_loss_on_the_meta_device(reduction, shape):
    x, weight, targets = (each.to("meta") for each in loss_inputs(6, 8, 9, 6, torch.float32))
    assert linear_cross_entropy(x, weight, targets, reduction=reduction, impl="torch").shape == shape


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_other_derivatives_of_the_loss_are_refused(impl):
    """Rather than 0."""
    x, weight, targets = (each.to(DEVICE) for each in loss_inputs(6, 8, 9, 6, torch.float32))
    loss = partial(linear_cross_entropy, weight=weight, targets=targets)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, impl=impl), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.square().sum().backward()
    with pytest.raises(NotImplementedError, match="use impl='reference'"):
        torch.func.jvp(partial(loss, impl=impl), (x.detach(),), (torch.ones_like(x),))
    assert torch.func.jvp(partial(loss, impl="reference"), (x.detach(),), (torch.ones_like(x),))[1] != 0


def test_plain_mean_loss_in_float16_where_the_sum_is_out_of_range():
    x, weight = (
        torch.full((20_000, 16), 8.0, dtype=torch.half),
        torch.zeros(8, 16, dtype=torch.half, requires_grad=True),
    )
    linear_cross_entropy(x, weight, torch.zeros(20_000, dtype=torch.int64), impl="torch").backward()
    torch.testing.assert_close(weight.grad[0], torch.full((16,), -7.0, dtype=torch.half))


@IMPLS
def test_loss_compiled_with_a_tied_weight_autocast_and_other_lengths(impl):
    def loss(weight, tokens, targets):
        with torch.autocast(DEVICE, torch.bfloat16):
            return linear_cross_entropy(weight[tokens].tanh(), weight, targets, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (40, 23):
        _, weight, targets = loss_inputs(N, 16, 33, N // 2, torch.float32)
        tokens, weight = targets.roll(1).clamp(min=0), weight.requires_grad_()
        eager, got = (torch.autograd.grad(f(weight, tokens, targets), weight)[0] for f in (loss, compiled))
        torch.testing.assert_close(got, eager)


@IMPLS
def test_attention_compiled(impl):
    def layers(q, k, v, lo, hi, **_):
        attend = Attend(lo, hi, impl=impl)
        return attention(attend(attend(q, k, v), k, v), k, v, impl=impl)

    compiled = torch.compile(layers, fullgraph=True)
    for T in (33, 40):  # recompiled with a dynamic length
        inputs = attention_inputs(1, T, T, 2, 2, 16, torch.float32)
        lo, hi = intervals("packed", 1, T, T)
        eager = attention_results(layers, *inputs, lo, hi, torch.float32)
        got = attention_results(compiled, *inputs, lo, hi, torch.float32)
        for name, result in eager.items():
            torch.testing.assert_close(got[name], result, rtol=1e-5, atol=1e-5)


# Choice of the implementation


def test_choice_is_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_said", set())
    q, k, v, _ = attention_inputs(1, 3, 3, 1, 1, 8, torch.float32)
    attention(q, k, v)
    attention(q, k, v, impl="reference")
    linear_cross_entropy(*loss_inputs(3, 4, 5, 3, torch.float32))
    chosen = "triton" if DEVICE == "cuda" else "torch"
    assert capsys.readouterr().err == f"kernels: {chosen} on {DEVICE}\n"


def test_choice_on_gpus(monkeypatch, capsys):
    properties = SimpleNamespace(major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    gpu = torch.device("cuda")
    for major, missing, chosen, message in [
        (9, False, "triton", "kernels: triton on cuda"),
        (7, False, "torch", "kernels: torch on cuda: the Triton kernels need compute capability 8.0"),
        (9, True, "torch", "kernels: torch on cuda: Triton is not installed"),
    ]:
        monkeypatch.setattr(kernels, "_said", set())
        properties.major = major
        if missing:
            monkeypatch.delitem(kernels.IMPLEMENTATIONS, "triton")
        assert kernels.choose(None, gpu) == chosen
        assert capsys.readouterr().err == message + "\n"


def test_unknown_implementation_is_refused():
    q, k, v, _ = attention_inputs(1, 3, 3, 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="impl='fast' is none of torch, reference, triton"):
        attention(q, k, v, impl="fast")
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"positive and finite scale, not {scale}"):
            attention(q, k, v, scale=scale)
