"""Tests specific to the Triton kernels. tests/test_kernels.py compares all implementations with the reference.

Without a GPU they run in Triton's interpreter (tests/conftest.py).
"""

import importlib
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import (
    DEVICE,
    attention_inputs,
    attention_results,
    check_attention,
    check_loss,
    intervals,
    loss_inputs,
    loss_results,
    peak_bytes,
    properties,
)

from nanopause import kernels
from nanopause.kernels import attention, linear_cross_entropy

pytest.importorskip("triton", reason="there is no Triton for this system")
from nanopause.kernels import decode, launch  # noqa: E402

# In the package, these names are the functions.
attention_module, loss_module = (
    importlib.import_module(f"nanopause.kernels.{n}") for n in ("attention", "linear_cross_entropy")
)
pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
NEEDS_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@pytest.fixture
def split_keys(monkeypatch):
    """split_keys(True) makes all attention use decode.py, split_keys(False) none."""
    return lambda always: monkeypatch.setattr(decode, "is_better", lambda *_: always)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_every_output_element_is_written(split, dtype, split_keys):
    split_keys(split)
    B, T, S, H, G, D = 1, 33, 520, 2, 1, 24
    inputs = attention_inputs(B, T, S, H, G, D, dtype)
    for kind in ("causal", "padding", "ragged"):
        check_attention(attention, inputs, *intervals(kind, B, T, S), what=kind, impl="triton")


@pytest.mark.parametrize("kind", ["causal", "packed", "prefix", "window", "ragged"])
def test_inner_and_edge_blocks(kind, split_keys):
    """Long enough for inner blocks in forward and backward, and several query blocks per key block."""
    split_keys(False)
    B, T, S = 1, 390, 420
    lo, hi = intervals(kind, B, T, S)
    if kind == "window":
        lo = (lo - 200).clamp(min=0)
    if kind == "packed":  # two long documents
        lo = torch.where(torch.arange(S - T, S) < 200, 0, 200).int().expand(B, T).to(DEVICE)
    check_attention(attention, attention_inputs(B, T, S, 1, 1, 16, torch.float32), lo, hi, kind, impl="triton")


def test_sections_of_heads(monkeypatch):
    """Sections of one head, and a smaller last section."""
    monkeypatch.setattr(decode, "is_better", lambda *_: False)
    monkeypatch.setattr(attention_module, "tile", lambda *_: attention_module.Tile(32, 32, 4, 2))
    for section in (1, 4, 100):
        monkeypatch.setattr(attention_module, "_section", lambda *_, n=section: n)
        inputs = attention_inputs(2, 40, 40, 3, 3, 16, torch.float32)
        check_attention(attention, inputs, what=f"sections of {section}", impl="triton")


@pytest.mark.parametrize("shape", [(2, 1, 600, 2, 2, 64), (2, 11, 600, 4, 1, 64), (1, 70, 300, 2, 1, 40),
                                   (1, 3, 300, 2, 1, 128), (2, 2, 40, 1, 1, 8)], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode(shape, dtype, split_keys):
    """A token and its pauses after caches of different lengths, some sequences with fewer queries or none."""
    split_keys(True)
    B, T, S = shape[:3]
    cached = torch.linspace(min(40, S - T), S - T, B).int()[:, None]
    hi = cached + torch.arange(T) + 1
    n_new = torch.linspace(T, 0, B).int()[:, None]  # the last queries of a row are padding
    padding = torch.arange(T) >= n_new
    lo, hi = torch.where(padding, cached + n_new, 0).int(), torch.where(padding, cached + n_new, hi).int()
    check_attention(attention, attention_inputs(*shape, dtype), lo.to(DEVICE), hi.to(DEVICE), impl="triton")
    check_attention(attention, attention_inputs(*shape, dtype), what="causal", impl="triton")


@properties
@given(data=st.data(), T=st.integers(1, 5), S=st.integers(1, 80), r=st.integers(1, 3), splits=st.integers(1, 5))
def test_decode_of_any_intervals(data, T, S, r, splits):
    """Also intervals that are not monotone."""
    bounds = st.lists(st.integers(-3, S + 3), min_size=2 * T, max_size=2 * T)
    lo, hi = torch.tensor(data.draw(bounds), dtype=torch.int32, device=DEVICE).view(2, 1, T)
    q, k, v, _ = attention_inputs(1, T, S, r, 1, 8, torch.float32)
    out, lse = q.new_full(q.shape, torch.nan), q.new_full((1, r, T), torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "MIN_KEYS", 1)
        patch.setattr(decode, "PARTS", 2)
        patch.setattr(decode, "multiprocessors", lambda _: splits)
        decode.launch(q, k, v, lo, hi, out, lse, 0.3 * attention_module.LOG2_E)
    truth = attention(q.double(), k.double(), v.double(), lo, hi, scale=0.3, impl="reference")
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def test_keys_are_split_for_few_queries(monkeypatch):
    """For any number of decode queries, but not in training."""

    def kernel(B, T, S, H, G, n_processors=132):
        names = Counter()
        monkeypatch.setattr(attention_module, "multiprocessors", lambda _: n_processors)
        monkeypatch.setattr(attention_module, "_forward", Recorder("whole", names))
        monkeypatch.setattr(decode, "_decode", Recorder("split", names))
        monkeypatch.setattr(decode, "_combine", Recorder("combine", names))
        q, k, v, _ = attention_inputs(B, T, S, H, G, 8, torch.float32)
        attention(q, k, v, impl="triton")
        del names["combine"]
        return list(names)

    for B in (1, 8, 32):
        for T in (1, 2, 16, 17, 51):
            for G in (12, 4, 3, 1):
                assert kernel(B, T, 2048, 12, G) == ["split"], (B, T, G)
    assert kernel(1, 100, 4096, 12, 12) == ["split"]  # a prefill chunk too small to use all multiprocessors
    assert kernel(8, 1024, 1024, 12, 12) == kernel(1, 16, 16, 12, 12) == ["whole"]


class Recorder:
    """Replaces a kernel: counts launches and computes nothing."""

    def __init__(self, name, names):
        self.name, self.names = name, names

    def __getitem__(self, grid):
        return lambda *_, **__: self.names.update([self.name])


def test_results_are_deterministic():
    for kind in ("causal", "packed"):
        inputs = attention_inputs(1, 150, 150, 2, 1, 16, torch.bfloat16)
        first, second = (attention_results(attention, *inputs, *intervals(kind, 1, 150, 150), torch.bfloat16,
                                           impl="triton") for _ in range(2))  # fmt: skip
        assert all(torch.equal(first[name], second[name]) for name in first)
    inputs = loss_inputs(200, 40, 300, 150, torch.bfloat16)
    first, second = (loss_results(linear_cross_entropy, *inputs, torch.bfloat16, impl="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_inputs():
    """Views of one projection, a transposed input, strided weights and targets, and an expanded gradient."""
    qkv = torch.randn(2, 40, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, v = qkv.split((2, 1, 1), dim=2)
    dout = torch.randn(2, 1, 2, 1).to(DEVICE).expand(2, 40, 2, 16)
    check_attention(attention, (q, k, v, dout), what="views", impl="triton")
    x, weight, targets = loss_inputs(40, 16, 33, 30, torch.float32)
    every_other = torch.stack((targets, -targets), dim=1)[:, 0]
    check_loss(linear_cross_entropy, x.T.contiguous().T, weight[:, torch.arange(16)], every_other, impl="triton")


@pytest.mark.parametrize("name", ["attention", "linear_cross_entropy", "chunked_cross_entropy"])
def test_operators_pass_opcheck(name):
    if name == "attention":
        q, k, v, dout = (x.requires_grad_() for x in attention_inputs(1, 5, 9, 2, 1, 8, torch.float32))
        lo, hi = intervals("packed", 1, 5, 9)
        for bounds in ((None, None), (lo, hi)):
            torch.library.opcheck(torch.ops.nanopause.attention.default, (q, k, v, *bounds, 0.3))
            out, lse = torch.ops.nanopause.attention(q, k, v, *bounds, 0.3)
            args = [x.detach() for x in (dout, q, k, v, out, lse)]
            torch.library.opcheck(torch.ops.nanopause.attention_backward.default, (*args, *bounds, 0.3))
        return
    x, weight, targets = loss_inputs(9, 8, 20, 6, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    if name == "chunked_cross_entropy":
        torch.library.opcheck(torch.ops.nanopause.chunked_cross_entropy.default, (x, weight, targets, -100, True))
        return
    torch.library.opcheck(torch.ops.nanopause.linear_cross_entropy.default, (x, weight, targets, -100))
    loss, losses, *saved = torch.ops.nanopause.linear_cross_entropy(x.detach(), weight.detach(), targets, -100)
    for upstream in (torch.ones_like(loss), None), (None, torch.rand_like(losses)):
        args = *upstream, x.detach(), weight.detach(), targets, *saved
        torch.library.opcheck(torch.ops.nanopause.linear_cross_entropy_backward.default, args)


def test_empty_inputs():
    for B, T, S in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q, k, v, dout = attention_inputs(B, T, S, 2, 1, 8, torch.float32)
        results = attention_results(attention, q, k, v, dout, None, None, torch.float32, impl="triton")
        assert not any(result.any() for result in results.values()), (B, T, S)
    x, weight, targets = loss_inputs(0, 8, 20, 0, torch.float32)
    results = loss_results(linear_cross_entropy, x, weight, targets, torch.float32, impl="triton")
    assert not any(result.any() for result in results.values())


def test_masked_rows_may_contain_nan():
    x, weight, targets = loss_inputs(200, 16, 301, 120, torch.float32)
    clean = loss_results(linear_cross_entropy, x, weight, targets, torch.float32, impl="triton")
    targets[0] = -100
    x[targets == -100] = torch.nan
    x[0] = torch.nan
    dirty = loss_results(linear_cross_entropy, x, weight, targets, torch.float32, impl="triton")
    assert all(result.isfinite().all() for result in (*clean.values(), *dirty.values()))


def test_invalid_targets_give_a_non_finite_loss():
    x, weight, targets = loss_inputs(20, 16, 33, 20, torch.float32)
    for wrong in (33, -1):
        targets[3] = wrong
        assert not linear_cross_entropy(x, weight, targets, impl="triton").isfinite()


def test_tiles_of_the_loss_divide_each_other():
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for C, dtype in ((768, torch.bfloat16), (40, torch.bfloat16), (768, torch.float32)):
            _, product, gradient = loss_module.tiles(arch, C, dtype)
            assert product.M % gradient.M == product.M % gradient.K == product.N % gradient.K == 0


@pytest.mark.parametrize("change, message", [
    (lambda q, k, v: (q[..., :4], k[..., :4], v[..., :4]), "multiples of 8 up to 256, not 4"),
    (lambda q, k, v: (q.double(), k.double(), v.double()), "float32, bfloat16 or float16, not torch.float64"),
    (lambda q, k, v: (q, k.bfloat16(), v), "one dtype, not torch.float32, torch.bfloat16 and torch.float32"),
])  # fmt: skip
def test_unsupported_attention_inputs_are_refused(change, message):
    q, k, v, _ = attention_inputs(1, 3, 3, 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(*change(q, k, v), impl="triton")


def test_unsupported_loss_inputs_are_refused():
    x, weight, targets = loss_inputs(3, 8, 9, 3, torch.float32)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, not torch.float64"):
        linear_cross_entropy(x.double(), weight.double(), targets, impl="triton")
    with pytest.raises(ValueError, match="one dtype, not torch.float32 and torch.bfloat16"):
        linear_cross_entropy(x, weight.bfloat16(), targets, impl="triton")


def test_cpu_without_the_interpreter_is_refused():
    program = ("import torch; from nanopause.kernels import attention; q = torch.zeros(1, 2, 1, 8); "
               "attention(q, q, q, impl='triton')")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.stderr.endswith("ValueError: attention in Triton needs a GPU, or TRITON_INTERPRET=1 set before "
                                 "Python starts\n")  # fmt: skip


# Work and memory


@pytest.fixture
def products(monkeypatch):
    """products() returns the FLOPs of the products that the interpreter has executed since the last call."""
    if DEVICE == "cuda":
        pytest.skip("only the interpreter counts products")
    from triton.runtime.interpreter import InterpreterBuilder

    flops, create_dot = [0], InterpreterBuilder.create_dot

    def counted(self, a, b, *args):
        flops.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return create_dot(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)

    def take():
        total = sum(flops)
        flops.clear()
        return total

    return take


def test_masked_rows_are_not_multiplied(products):
    """N/2 unmasked rows of N take half of the products, no unmasked rows none."""
    N, C, V = 256, 64, 512
    executed = []
    for live in (N, N // 2, 0):
        loss_results(linear_cross_entropy, *loss_inputs(N, C, V, live, torch.float32), torch.float32, impl="triton")
        executed.append(products())
    assert executed == [8 * N * C * V, 4 * N * C * V, 0]


def test_blocks_outside_the_intervals_are_skipped(products, split_keys):
    """Documents of one block's length: the products grow with T, not T²."""
    split_keys(False)
    executed = []
    for T in (128, 512):
        lo = (torch.arange(T, device=DEVICE)[None] // 128 * 128).int()
        q, k, v, dout = attention_inputs(1, T, T, 1, 1, 16, torch.float32)
        hi = torch.arange(1, T + 1, dtype=torch.int32, device=DEVICE)[None]
        attention_results(attention, q, k, v, dout, lo, hi, torch.float32, impl="triton")
        executed.append(products())
    assert executed[1] == 4 * executed[0]


def test_memory_of_the_loss_in_triton(monkeypatch):
    """GPT-2's head at N = 16,384 in bfloat16, without running the kernels, as all memory is allocated by launchers."""
    for name in ("_log_sums", "_sum_tiles", "_dlogits", "_gradients"):
        monkeypatch.setattr(loss_module, name, Recorder(name, Counter()))
    torch.use_deterministic_algorithms(False)
    N, C, V = 16384, 768, 50304
    x, weight = torch.empty(N, C, dtype=torch.bfloat16), torch.empty(V, C, dtype=torch.bfloat16)
    targets = torch.zeros(N, dtype=torch.int64)
    logits = 2 * N * V
    assert peak_bytes(lambda: loss_module._linear_cross_entropy._init_fn(x, weight, targets, -100)) < 0.02 * logits
    inputs = torch.ones(()), None, x, weight, targets, torch.empty(N), targets, torch.zeros((), dtype=torch.int64)
    peak = peak_bytes(lambda: loss_module._backward._init_fn(*inputs))
    columns = 13 * 128  # V / SLICES in whole tiles
    assert peak == 2 * N * columns + 2 * N * C < 0.05 * logits


@NEEDS_GPU
def test_kernels_can_be_captured_in_a_cuda_graph():
    """They do not synchronise, and a captured graph is valid for other targets and numbers of unmasked rows."""
    x, weight, targets = loss_inputs(300, 64, 700, 200, torch.bfloat16)
    q, k, v, dout = attention_inputs(2, 150, 150, 2, 1, 64, torch.bfloat16)
    lo, hi = intervals("packed", 2, 150, 150)

    def run():
        step = attention(q[:, :3], k, v, lo[:, -3:], hi[:, -3:], impl="triton")  # decode.py
        return {"step": step} | (
            loss_results(linear_cross_entropy, x, weight, targets, torch.bfloat16, impl="triton")
            | attention_results(attention, q, k, v, dout, lo, hi, torch.bfloat16, impl="triton")
        )

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    targets.copy_(loss_inputs(300, 64, 700, 30, torch.bfloat16, seed=1)[2])
    lo.copy_(intervals("packed", 2, 150, 150, seed=1)[0])
    graph.replay()
    for name, result in run().items():
        assert torch.equal(captured[name], result), name


# Mutants: a kernel's source with one injected bug

MUTANTS = {  # kernel: pairs of correct and wrong source
    "_forward": [("b_sum = b_sum * b_rescale + tl.sum(b_p, 1)", "b_sum = b_sum + tl.sum(b_p, 1)"),
                 ("b_v, b_out * b_rescale[:, None]", "b_v, b_out"),
                 ("b_lo, b_hi = tl.zeros_like(o_t), S - T + 1 + o_t", "b_lo, b_hi = tl.zeros_like(o_t), S - T + o_t"),
                 ("mask=o_t < T, other=0), S)", "mask=o_t < T, other=0) + 1, S)"),
                 ("S - T + first + 1, S - T + last + 1", "S - T + last + 1, S - T + last + 1"),
                 ("visible & (i_s + o_s[None, :] >= b_lo[:, None])", "visible & (i_s + o_s[None, :] > b_lo[:, None])"),
                 ("inner = tl.cdiv(inner, BLOCK_S) * BLOCK_S", "inner = inner // BLOCK_S * BLOCK_S"),
                 ("inner_end, end = tl.minimum(tl.load(hi + first), S)",
                  "inner_end, end = tl.minimum(tl.load(hi + last), S)"),
                 ("tl.load(lo + last), 0), S)", "tl.load(lo + first), 0), S)"),
                 ("tl.where(i < before, 0, gap)", "0"),
                 ("tl.exp2(b_z * scale - b_shift[:, None])", "tl.exp2(b_z - b_shift[:, None])"),
                 ("i_g = i_h // (H // G)", "i_g = i_h % G")],
    "_backward_q": [("b_dz = b_p * (b_dp - b_delta[:, None])", "b_dz = b_p * b_dp"),
                    ("b_dq *= scale * LN_2", "b_dq *= scale")],
    "_backward_kv": [("b_dz = b_p * (b_dp - b_delta[None, :])", "b_dz = b_p * b_dp"),
                     ("b_dk *= scale * LN_2", "b_dk *= scale"),
                     ("torch.cat((s, s + (block - 1)))", "torch.cat((s, s))"),
                     ("i_block * BLOCK_S + BLOCK_S - 1 - (S - T)", "i_block * BLOCK_S - (S - T)"),
                     ("for i_r in range(R):", "for i_r in range(1):"),
                     ("p_q + i_r * q_h", "p_q")],
    "_decode": [("b_sum = b_sum * b_rescale + tl.sum(b_p, 1)", "b_sum = b_sum + tl.sum(b_p, 1)"),
                ("(o_key < b_hi[:, None])", "(o_key <= b_hi[:, None])"),
                ("end = tl.minimum(start + share, last)", "end = last"),
                ("i_g * R + o_r % R", "o_r % R")],
    "_combine": [("tl.exp2(b_lse - shift)", "tl.exp2(0.0 * b_lse)"),
                 ("total * rescale + tl.sum(b_weight)", "total + tl.sum(b_weight)"),
                 ('tl.where(b_lse == float("inf"), float("-inf"), b_lse)', "b_lse")],
    "_log_sums": [('tl.where(o_v[None, :] < V, b_logit, float("-inf"))', "b_logit"),
                  ("b_max + tl.log(tl.sum(tl.exp(b_logit - b_max[:, None]), 1))", "b_max"),
                  ("b_target < i_v * BLOCK_V + BLOCK_V)", "b_target < i_v * BLOCK_V + 5)")],
    "_sum_tiles": [("b_sum * tl.exp(b_max - b_shift)", "b_sum")],
    "_dlogits": [(" - (o_v[None, :] == b_target[:, None]).to(tl.float32)", ""),
                 ("o_v, m_n = first + o_col, o_n < n_live", "o_v, m_n = o_col, o_n < n_live")],
    "_gradients": [("tl.load(dx + o_dx, mask=m_dx, other=0.0).to(tl.float32) + b_sum * scale", "b_sum * scale"),
                   ("tl.load(dloss)", "1.0"),
                   ("b_dx - cast(b_dx, dx.dtype.element_ty).to(tl.float32)", "0.0 * b_dx"),
                   ("range(0, n_live, BLOCK_K)", "range(BLOCK_K, n_live, BLOCK_K)")],
}  # fmt: skip


def mutant(tmp_path, file, old, new):
    """The module kernels/<file>.py with a bug, its operators registered under another name."""
    source = (Path(kernels.__file__).parent / f"{file}.py").read_text()
    assert old in source, old
    name = f"mutant_{abs(hash((old, new)))}"
    (tmp_path / f"{name}.py").write_text(source.replace(old, new).replace('"nanopause::', f'"{name}::')
                                         .replace("ops.nanopause", f"ops.{name}"))  # fmt: skip
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kernel, old, new", [(k, *m) for k, mistakes in MUTANTS.items() for m in mistakes])
def test_mutants_are_rejected(kernel, old, new, tmp_path, monkeypatch):
    dtype = torch.float32
    if kernel in ("_decode", "_combine"):
        module = mutant(tmp_path, "decode", old, new)
        monkeypatch.setattr(attention_module, "decode", module)
        monkeypatch.setattr(module, "MIN_KEYS", {"_decode": 130, "_combine": 60}[kernel])
        monkeypatch.setattr(module, "PARTS", 2)
        inputs = attention_inputs(2, 3, 300, 4, 2, 16, dtype)
        with pytest.raises(AssertionError, match="off by|empty rows"):
            for kind in ("ragged", "causal"):
                check_attention(attention, inputs, *intervals(kind, 2, 3, 300), impl="triton")
    elif kernel in ("_forward", "_backward_q", "_backward_kv"):
        function = mutant(tmp_path, "attention", old, new).attention
        heads = (4, 2) if "i_g" in old or "i_r" in old else (1, 1)
        inputs = attention_inputs(1, 300, 300, *heads, 16, dtype)
        start = torch.arange(300, device=DEVICE)[None] // 10 * 5  # the later half of the preceding keys
        with pytest.raises(AssertionError, match="off by|empty rows"):
            for lo, hi in ((start.int(), torch.arange(1, 301, device=DEVICE)[None].int()), (None, None)):
                check_attention(lambda *a, **_: function(*a, 0.25), inputs, lo, hi)
    else:
        module = mutant(tmp_path, "linear_cross_entropy", old, new)
        monkeypatch.setattr(module, "SLICE_BYTES", 0)
        inputs = loss_inputs(200, 48, 301, 150, dtype)
        if kernel == "_sum_tiles" or "0.0 * b_dx" in new:  # detectable with many tiles and slices
            monkeypatch.setattr(module, "tiles", lambda *_: 3 * (module.Tile(16, 16, 16, 4, 2),))
            monkeypatch.setattr(module, "SLICES", 1000)
            inputs = loss_inputs(16, 16, 1000, 16, torch.bfloat16)
        with pytest.raises(AssertionError, match="off by|masked rows"):
            check_loss(lambda x, weight, targets: (
                module.linear_cross_entropy(x, weight, targets, -100) / (targets != -100).sum()), *inputs)  # fmt: skip


def test_unmodified_copies_pass(tmp_path, monkeypatch):
    """The mutants' modules without a bug."""
    function = mutant(tmp_path, "attention", "LOG2_E", "LOG2_E").attention
    inputs = attention_inputs(1, 300, 300, 2, 1, 16, torch.float32)
    check_attention(lambda *a, **_: function(*a, 0.25), inputs, *intervals("window", 1, 300, 300))
    function = mutant(tmp_path, "linear_cross_entropy", "SLICES", "SLICES").linear_cross_entropy
    check_loss(lambda x, weight, targets: function(x, weight, targets, -100) / 150,
               *loss_inputs(200, 48, 301, 150, torch.float32))  # fmt: skip
    monkeypatch.setattr(attention_module, "decode", mutant(tmp_path, "decode", "MIN_KEYS", "MIN_KEYS"))
    check_attention(attention, attention_inputs(2, 3, 300, 4, 2, 16, torch.float32), *intervals("window", 2, 3, 300),
                    impl="triton")  # fmt: skip


def test_every_gpu_has_tiles(monkeypatch):
    """Also GPUs without tuned tiles: compute capability 8.9 (RTX 4090), 10.3 (B300), 12.0 (RTX 5090)."""
    for major, family in ((8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (11, "sm_80"), (12, "sm_80")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=major: SimpleNamespace(major=n))
        assert launch.architecture.__wrapped__(torch.device("cuda")) == family
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert launch.architecture.__wrapped__(torch.device("cuda")) == "gfx942"
    kernel_names = ("forward", "backward_q", "backward_kv", "backward_kv grouped")
    for arch, kernel, D in product(attention_module.TILES, kernel_names, range(8, 257, 8)):
        for dtype in (torch.bfloat16, torch.float32):
            assert attention_module.tile(kernel, arch, D, dtype).warps in (4, 8)


def test_matrix_precision_follows_torch():
    def chosen():
        return [launch.precision(*case) for case in product((torch.bfloat16, torch.float32), ("sm_90", "gfx942"))]

    torch.set_float32_matmul_precision("highest")  # training in other tests sets "high"
    assert chosen() == ["ieee", "ieee", "tf32x3", "ieee"]
    try:
        torch.set_float32_matmul_precision("high")
        assert chosen() == ["ieee", "ieee", "tf32", "tf32"]
    finally:
        torch.set_float32_matmul_precision("highest")
