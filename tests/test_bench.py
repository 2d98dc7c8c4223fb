"""The benches: measurement with artificial clocks, every bench at a tiny size, and the report."""

import json
import re
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from bench import attention, finetune, generate, harness, loss, models, pause_cost, report, train
from bench.__main__ import NAMES, TIMED, run_all
from bench.harness import OURS, Baseline, Bench, Options, WrongOutput, check, forward_and_backward, time_interleaved
from nanopause import kernels
from nanopause.errors import UserError
from nanopause.flops import training_flops
from nanopause.model import GPT, GPTConfig
from nanopause.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu"), torch.float32
SHAPE = {"N": 3}
TRUTH = {"out": torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A bench that writes to a temporary folder; the peak FLOP/s of its device is 1e9."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "peak_flops", lambda device, dtype: (1e9, "a test"))
    return Bench("attention", Options())


def clock(times):
    """A timer that runs its call and returns the next of the call's times, and a list of the calls it has timed."""
    order = []
    left = {call: iter(seconds) for call, seconds in times.items()}

    def timer(call, n):
        call()
        order.append(call)
        return next(left[call])

    return timer, order


def candidate(factor=1.0):
    return lambda: {"out": (factor * TRUTH["out"]).float()}


# Timing


def test_rounds_interleave_the_candidates():
    a, b, c = candidate(), candidate(), candidate()
    timer, order = clock({a: cycle([0.5]), b: cycle([1.0]), c: cycle([2.0])})
    samples = time_interleaved({"a": a, "b": b, "c": c}, timer, seconds=21)
    assert order[6:] == [a, b, c] * 6  # after two warm-up calls each; a round takes 3.5 s
    assert samples == {"a": [0.5] * 6, "b": [1.0] * 6, "c": [2.0] * 6}


@pytest.mark.parametrize(
    "seconds, repeats, rounds", [(1e-5, 10, 25), (3e-4, 3, 25), (0.5, 1, 20), (3.0, 1, 5), (100.0, 1, 3)]
)
def test_number_of_calls_per_sample_and_of_rounds(seconds, repeats, rounds):
    counts = []
    samples = time_interleaved({"a": candidate()}, lambda call, n: counts.append(n) or seconds, seconds=10)
    assert counts[2:] == [repeats] * rounds and samples == {"a": [seconds] * rounds}


def test_wall_clock_returns_the_mean_of_n_calls(monkeypatch):
    now = [0.0]

    def call():
        now[0] += 3.0

    monkeypatch.setattr(harness, "perf_counter", lambda: now[0])
    assert harness.wall_clock(call, 4) == 3.0 and now[0] == 12.0


def test_ratio_is_the_median_of_the_ratios_per_round(bench):
    """It differs from the ratio of the medians."""
    ours, baseline = candidate(), candidate()
    ours_s, baseline_s = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 2.0, 12.0, 4.0, 5.0]
    bench.versions["baseline"] = "7"
    bench.timer, _ = clock({ours: [4, 4, *ours_s], baseline: [4, 4, *baseline_s]})
    first, second = bench.compare("forward", SHAPE, {OURS: ours, "baseline": baseline}, TRUTH, flops=6e9)
    assert (first["p10_ms"], first["p50_ms"], first["p90_ms"]) == pytest.approx((1400, 3000, 4600))
    assert first["ratio"] == 1 and first["tflops"] == pytest.approx(2e-3)
    assert first["percent_of_peak"] == pytest.approx(200)
    assert second["ratio"] == 1.0 != np.median(baseline_s) / np.median(ours_s)
    assert second["version"] == "7" and second["samples"] == 5 and first["result_bytes"] == 12
    assert bench.rows == [first, second] and not bench.missing


def test_peak_memory_of_a_call():
    """Two tensors of a mebibyte at a time, of three."""

    def call():
        a, b = torch.zeros(1 << 18), torch.zeros(1 << 18)
        a = torch.zeros(1 << 16)
        return {"out": a, "b": b}

    assert (2 << 20) <= harness.peak_extra_bytes(call, CPU[0]) < (2 << 20) + (1 << 19)


# Comparison with the truth


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"out": torch.tensor([1.0, 2.0, -4.1])}, "out is off by 0.025 of its largest entry"),
        ({"out": torch.tensor([1.0, torch.nan, -4.0])}, "out is off by nan"),
        ({"out": torch.tensor([1.0, 2.0])}, r"out has shape \[2\] instead of \[3\]"),
    ],
)
def test_check_rejects_a_wrong_output(wrong, why):
    assert check({"out": torch.tensor([1.0, 2.0, -4.02])}, TRUTH, 0.01) == pytest.approx(0.005)
    with pytest.raises(WrongOutput, match=why):
        check(wrong, TRUTH, 0.01)


def test_wrong_and_failing_baselines_are_not_timed(bench):
    ours, wrong = candidate(), candidate(2)

    def failing():
        raise RuntimeError("no such kernel\nand more lines")

    bench.timer, order = clock({ours: cycle([1.0])})
    rows = bench.compare("forward", SHAPE, {OURS: ours, "wrong": wrong, "failing": failing}, TRUTH, flops=1)
    assert [row["name"] for row in rows] == [OURS] and set(order) == {ours}
    reasons = {each["name"]: each["reason"] for each in bench.missing}
    assert reasons["wrong"].startswith("WrongOutput: out is off by 1 ")
    assert reasons["failing"] == "RuntimeError: no such kernel"
    assert all(each["what"] == "forward" for each in bench.missing)


def test_the_tolerance_of_ours_is_smaller_than_that_of_baselines(bench):
    bench.versions["rough"] = "1"
    rough = candidate(1 + 2 * harness.TOLERANCE[bench.dtype])
    assert len(bench.compare("forward", SHAPE, {OURS: candidate(), "rough": rough}, TRUTH, flops=1)) == 2
    with pytest.raises(WrongOutput, match="out is off"):
        bench.compare("forward", SHAPE, {OURS: rough}, TRUTH, flops=1)


def test_forward_and_backward_returns_every_gradient():
    inputs = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])}
    calls = forward_and_backward(lambda a, b: a * b, inputs, torch.tensor([1.0, 10.0]))
    assert {name: x.tolist() for name, x in calls["forward"]().items()} == {"out": [3, 10]}
    outputs = {name: x.tolist() for name, x in calls["forward+backward"]().items()}
    assert outputs == {"out": [3, 10], "da": [3, 50], "db": [1, 20]}
    assert not calls["forward"]()["out"].requires_grad


# Missing candidates, failures, and the files of results


def test_a_baseline_that_is_not_installed_is_missing(bench):
    def make(problem):
        import no_such_package  # noqa: F401

    baselines = (Baseline("absent", "no-such-package", make), Baseline("here", "torch", lambda problem: abs))
    assert bench.make_baselines(baselines, None, SHAPE) == {"here": abs}
    assert bench.versions["here"] == torch.__version__
    reason = "ModuleNotFoundError: No module named 'no_such_package'"
    assert bench.missing == [{"name": "absent", "what": None, "shape": SHAPE, "reason": reason}]


def test_a_shape_without_time_is_missing(bench):
    measured = []
    bench.attempt(lambda *arguments: measured.append(arguments), SHAPE)
    bench.deadline = 0
    bench.attempt(lambda *arguments: measured.append(arguments), SHAPE)
    assert measured == [(bench, SHAPE)] and not bench.failed
    assert [each["reason"] for each in bench.missing] == ["no time was left"]


def add_row(bench, shape):
    bench.compare("step", shape, {OURS: candidate()}, TRUTH, flops=1)


@pytest.mark.parametrize("error, why", [
    (UserError("no such data: get it"), "no such data: get it"), (MemoryError("all of it"), "MemoryError: all of it"),
    (KeyboardInterrupt(), "the bench was interrupted"),
])  # fmt: skip
def test_a_failed_run_keeps_its_rows_and_replaces_no_result(bench, error, why):
    def measure(bench, shape):
        if shape == SHAPE:
            raise error
        add_row(bench, shape)

    with pytest.raises(UserError, match=f"nothing was measured: N 3: {why}"):
        bench.run(SimpleNamespace(shapes=lambda *_: [SHAPE], measure=measure))
    bench.stopped, bench.failed, bench.missing = "", [], []
    add_row(bench, {"N": 4})
    full = bench.write()
    bench.rows = []
    with pytest.raises(UserError, match=f"1 shapes failed, and no earlier result is replaced: N 3: {why}"):
        bench.run(SimpleNamespace(shapes=lambda *_: [{"N": 1}, SHAPE, {"N": 2}], measure=measure))
    failed = json.loads(full.with_name("attention.failed.json").read_text())
    stops = isinstance(error, KeyboardInterrupt)  # the shapes after an interruption are not measured
    assert [row["shape"] for row in failed["rows"]] == ([{"N": 1}] if stops else [{"N": 1}, {"N": 2}])
    assert {each["reason"] for each in failed["missing"]} == {why}
    assert [row["shape"] for row in json.loads(full.read_text())["rows"]] == [{"N": 4}]


def test_a_quick_result_does_not_replace_a_full_one(bench):
    add_row(bench, SHAPE)
    full = bench.write()
    bench.options.quick = True
    quick = bench.write()
    assert full.name == "attention.json" and quick.name == "attention.quick.json" and full.parent == quick.parent
    assert json.loads(full.read_text())["rows"] == bench.rows


def test_device_folder_names_the_device_and_the_threads_of_a_cpu():
    cpu = "Intel(R) Xeon(R) Processor @ 2.50GHz"
    header = {"device": cpu, "cpu": cpu, "threads": 2}
    assert harness.device_folder(header) == "intel-xeon-processor-2-50ghz-2-threads"
    assert harness.device_folder(header | {"device": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_numbers_have_three_digits():
    assert [harness.number(x) for x in (0.012345, 1.0, 12.345, 1234.5, None)] == ["0.0123", "1.00", "12.3", "1234", "–"]


# The command


@pytest.mark.parametrize("args", [("atention",), ()])
def test_an_unknown_bench_is_reported_in_one_sentence(args):
    command = [sys.executable, "-m", "bench", *args]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and not ended.stdout
    name = args[0] if args else ""
    assert ended.stderr == f"error: {name!r} is not a bench: choose {', '.join(NAMES)}, or all\n"
    assert set(NAMES) <= {file.stem for file in (ROOT / "bench").glob("*.py")}


def test_all_runs_every_timed_bench_and_reports_failures(monkeypatch):
    commands = []

    def run(command):
        commands.append(command[3:])
        return SimpleNamespace(returncode=int(command[3] == "loss"))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"1 of 6 benches failed, with the errors above: loss$"):
        run_all(["--quick", "--nanogpt=somewhere"])
    assert commands == [[name, "--quick", "--nanogpt=somewhere"] for name in TIMED]


# The benches at a tiny size


HEADER = set(
    """bench quick ours device cpu threads dtype torch triton python commit dirty date command peak_flops
    peak_flops_source rows missing""".split()
)
ROW = set("what shape name version samples p10_ms p50_ms p90_ms ratio_p10 ratio ratio_p90 error".split())


def result_of(bench, module, **options):
    """The quick result of a bench, after checks that hold for every bench."""
    name = module.__name__.removeprefix("bench.")
    Bench(name, Options(quick=True, **options)).run(module)
    (file,) = harness.RESULTS.rglob(f"{name}.quick.json")
    result = json.loads(file.read_text())
    assert HEADER <= result.keys() and result["bench"] == name and result["quick"] is True
    assert all(ROW <= row.keys() for row in result["rows"])
    assert all(each.keys() == {"name", "what", "shape", "reason"} for each in result["missing"])
    assert all(0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"] for row in result["rows"])
    figure = report.pause_cost_figure(result) if name == "pause_cost" else report.ratio_figure(result)
    assert all(axes.get_xlabel() for axes in figure.axes)
    plt.close(figure)
    return result


def rows_by_name(result, what, **shape):
    rows = [row for row in result["rows"] if row["what"] == what and row["shape"].items() >= shape.items()]
    return {row["name"]: row for row in rows}


def test_attention_bench(bench, monkeypatch, capsys):
    shapes = [{"mask": mask, "B": 2, "T": 40, "H": 2, "D": 16} for mask in ("causal", "packed", "prefix")]

    def reference(problem, fewer_keys=0):
        lo, hi = problem.bounds()
        return lambda q, k, v: kernels.attention(q, k, v, lo.int(), hi.int() - fewer_keys, impl="reference")

    correct = Baseline("correct", "torch", reference)
    off_by_one = Baseline("off by one", "torch", lambda problem: reference(problem, fewer_keys=1))
    absent = Baseline("absent", "no-such-package", reference)
    monkeypatch.setattr(attention, "shapes", lambda device_type, quick: shapes)
    monkeypatch.setattr(attention, "document_lengths", lambda: np.array([7, 30, 11]))
    monkeypatch.setattr(attention, "BASELINES", (correct, off_by_one, absent))
    result = result_of(bench, attention)
    for shape in shapes:
        for what in ("forward", "forward+backward"):
            assert rows_by_name(result, what, **shape).keys() == {OURS, "correct"}
    wrong = [each for each in result["missing"] if each["name"] == "off by one"]
    assert len(wrong) == 6 and all(each["reason"].startswith("WrongOutput: ") for each in wrong)
    assert sum(each["name"] == "absent" for each in result["missing"]) == 3
    for what, factor in (("forward", 1), ("forward+backward", 3.5)):
        row = rows_by_name(result, what, mask="causal")[OURS]
        assert row["tflops"] * row["p50_ms"] * 1e9 == pytest.approx(factor * 2 * 2 * (4 * 16) * (40 * 41 / 2))
    printed = capsys.readouterr().out
    assert "| forward+backward, causal, B 2, T 40, H 2, D 16 |" in printed
    assert re.search(r"^- off by one, \d cases?: WrongOutput: ", printed, re.MULTILINE)


def test_dense_mask_and_block_mask_equal_the_intervals(monkeypatch):
    monkeypatch.setattr(attention, "document_lengths", lambda: np.array([50, 7, 130, 2]))
    B, T = 3, 100
    for mask in ("causal", "packed", "prefix"):
        problem = attention.make_problem({"mask": mask, "B": B, "T": T, "H": 1, "D": 8}, *CPU)
        lo, hi = problem.bounds()
        s = torch.arange(T)
        visible = (lo[..., None] <= s) & (s < hi[..., None])
        assert torch.equal(problem.dense_mask()[:, 0] == 0, visible)
        flex = attention.block_mask(problem).mask_mod
        b, q, k = torch.meshgrid(torch.arange(B), torch.arange(T), s, indexing="ij")
        assert torch.equal(flex(b, 0, q, k), visible)
        if mask == "packed":
            starts = [0, 50, 57, 100, 187, 189, 200, 239, 246, 300]  # of the documents among the B·T tokens
            dense = torch.zeros(B * T, B * T, dtype=torch.bool)
            for start, end in zip(starts, starts[1:]):
                dense[start:end, start:end] = True
            dense = torch.stack([dense[i : i + T, i : i + T] for i in range(0, B * T, T)]).tril()
            assert torch.equal(dense, visible)


def test_loss_bench(bench, monkeypatch):
    shapes = [{"N": 64, "C": 16, "V": 40, "masked": masked} for masked in (0.0, 0.5)]

    def mean_of_all_rows(problem):
        options = {"reduction": "sum", "impl": "reference"}
        return lambda x, weight: kernels.linear_cross_entropy(x, weight, problem.targets, **options) / len(x)

    all_rows = Baseline("mean of all rows", "torch", mean_of_all_rows)
    eager = next(baseline for baseline in loss.BASELINES if baseline.name == "full logits")
    monkeypatch.setattr(loss, "shapes", lambda device_type, quick: shapes)
    monkeypatch.setattr(loss, "BASELINES", (eager, all_rows))
    result = result_of(bench, loss)
    for what, products in (("forward", 1), ("forward+backward", 3)):
        assert rows_by_name(result, what, masked=0.0).keys() == {OURS, "full logits", "mean of all rows"}
        rows = rows_by_name(result, what, masked=0.5)
        assert rows.keys() == {OURS, "full logits"}
        row = rows["full logits"]
        assert row["tflops"] * row["p50_ms"] * 1e9 == pytest.approx(products * 2 * 32 * 16 * 40)
        assert row["logits_bytes"] == 64 * 40 * bench.dtype.itemsize
        assert row["extra_bytes"] >= 0.9 * row["logits_bytes"]
    assert {each["what"] for each in result["missing"]} == {"forward", "forward+backward"}


def test_truth_in_parts_equals_the_whole():
    problem = loss.make_problem({"N": 50, "C": 8, "V": 30, "masked": 0.2}, *CPU)
    assert (problem.targets == -100).sum() == 10
    parts = loss.compute_truth(problem, rows=7)
    x, weight = (a.double().requires_grad_() for a in (problem.x, problem.weight))
    whole = torch.nn.functional.cross_entropy(x @ weight.T, problem.targets)
    dx, dw = torch.autograd.grad(whole, (x, weight))
    for name, expected in dict(out=whole.detach(), dx=dx, dw=dw).items():
        torch.testing.assert_close(parts[name], expected)

    problem = attention.make_problem({"mask": "causal", "B": 2, "T": 9, "H": 4, "D": 8}, *CPU)
    q, k, v = (a.double().requires_grad_() for a in problem.inputs.values())
    out = kernels.attention(q, k, v, impl="reference")
    gradients = torch.autograd.grad(out, (q, k, v), problem.upstream.double())
    for name, expected in zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients)):
        torch.testing.assert_close(attention.compute_truth(problem)[name], expected)


def test_pause_cost_bench(bench, monkeypatch):
    """With a clock by which a forward pass takes a second per token, and a row of logits a hundred."""
    monkeypatch.setattr(pause_cost, "PAUSES", (1, 3))
    seconds, append, linear = [0.0], pause_cost.Run.append, torch.nn.Linear.forward

    def slow_append(run, tokens):
        seconds[0] += tokens.shape[1]
        return append(run, tokens)

    def slow_logits(layer, x):
        seconds[0] += 100 * (len(layer.weight) == 50304)
        return linear(layer, x)

    monkeypatch.setattr(pause_cost.Run, "append", slow_append)
    monkeypatch.setattr(torch.nn.Linear, "forward", slow_logits)
    monkeypatch.setattr(harness, "perf_counter", lambda: seconds[0])
    bench = Bench("pause_cost", Options(quick=True))
    bench.deadline = float("inf")
    bench.run(pause_cost)
    found = {(row["what"], row["name"], row["shape"]["pauses"]) for row in bench.rows}
    names = [("without", 0), *((name, m) for m in (1, 3) for name in (OURS, "sequential"))]
    assert found == {(what, name, m) for what in ("step", "prefix") for name, m in names}
    for row in bench.rows:
        without, m = {"step": 101, "prefix": 164}[row["what"]], row["shape"]["pauses"]
        assert row["p10_ms"] == row["p90_ms"] == 1000 * (without + m)
        assert row["ratio"] == pytest.approx(1 + m / without)
        assert row["error"] < 1e-5 if row["name"] == OURS else row["error"] is None
        if m:
            assert row["added_ms_per_pause"] == pytest.approx(1000) and row["flops_per_pause"] > 0
    table = report.pause_cost_table({"rows": bench.rows, "missing": []}).splitlines()
    step = next(row for row in bench.rows if row["what"] == "step" and row["name"] == OURS)
    assert f"| a token, pauses in one forward pass | 64 | 1 | {step['flops_ratio']:.2f} | 1.01 |" in table
    assert "| a token, without pauses | 64 | 0 | 1.00 | 101000 ms |" in table


def test_pause_cost_keeps_no_row_of_a_wrong_output(bench, monkeypatch):
    append = pause_cost.Run.append
    monkeypatch.setattr(pause_cost.Run, "append", lambda run, tokens: append(run, tokens) * tokens.shape[1] ** 0.1)
    with pytest.raises(UserError, match="nothing was measured: .*: WrongOutput: hidden is off by"):
        Bench("pause_cost", Options(quick=True)).run(pause_cost)


@pytest.mark.parametrize("block", [models.GPT2, models.LLAMA | dict(n_kv_head=1, n_mlp=24)], ids=["gpt2", "llama"])
def test_all_generators_generate_the_same_tokens(bench, block, monkeypatch):
    monkeypatch.setitem(generate.MODELS, "small", ("bytes", block | dict(n_layer=1, n_head=2, n_embd=16)))
    shape = {"model": "small", "batch": 3, "context": 9, "new": 4}
    monkeypatch.setattr(generate, "shapes", lambda *_: [shape | {"pauses": pauses} for pauses in (0, 2)])
    result = result_of(bench, generate)
    names = [OURS, "transformers", "transformers, static cache"]
    assert [row["name"] for row in result["rows"]] == 2 * names
    assert not any(row["error"] for row in result["rows"])
    assert [each["name"] for each in result["missing"]] == 2 * ["nanoGPT"]
    for row in result["rows"]:
        assert row["tokens_per_second"] * row["p50_ms"] == pytest.approx(1e3 * 3)


def test_generators_with_other_tokens_are_missing(bench, monkeypatch):
    monkeypatch.setitem(generate.MODELS, "small", ("bytes", models.GPT2 | dict(n_layer=1, n_head=2, n_embd=16)))
    monkeypatch.setattr(generate, "shapes", lambda *_: [dict(model="small", batch=3, context=9, pauses=0, new=4)])
    monkeypatch.setattr(generate, "transformers", lambda problem, **_: lambda n: torch.zeros(3, n, dtype=torch.int64))
    result = result_of(bench, generate)
    assert [row["name"] for row in result["rows"]] == [OURS]
    assert result["missing"][1]["reason"].startswith("WrongOutput: ")


NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn, self.c_proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=2))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc, self.gelu = nn.Linear(c.n_embd, 4 * c.n_embd), nn.GELU()
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(c.n_embd), Attention(c), nn.LayerNorm(c.n_embd), MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        wte, wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.transformer = nn.ModuleDict(dict(wte=wte, wpe=wpe, h=blocks, ln_f=nn.LayerNorm(c.n_embd)))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        parts = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1]))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


@pytest.mark.parametrize("fault", ["", "no last norm"])
def test_train_bench(bench, monkeypatch, tmp_path, fault):
    """Beside a small model with nanoGPT's names, which is correct, or wrong and then not timed."""
    checkout = tmp_path / "nanoGPT"
    checkout.mkdir()
    code = NANOGPT.replace("self.lm_head(parts.ln_f(x))", "self.lm_head(x)") if fault else NANOGPT
    (checkout / "model.py").write_text(code)
    shape = {"model": "tiny", "batch": 2, "T": 16, "pause_rate": 0.1}
    monkeypatch.setitem(train.MODELS, "tiny", [*train.GPT2, "--n_layer=2", "--n_head=2", "--n_embd=16"])
    monkeypatch.setattr(train, "shapes", lambda *_: [shape])
    monkeypatch.setattr(train, "DATA", tmp_path)
    texts = [f"{i} " + 99 * "word " for i in range(9)]
    prepare("pydocs", [""], lambda _: texts, tmp_path, "bytes", val_fraction=0.3, workers=1)
    result = result_of(bench, train, nanogpt=str(checkout))
    rows = rows_by_name(result, "step")
    assert rows.keys() == {OURS, "transformers"} | ({"nanoGPT"} if not fault else set())
    for row in rows.values():
        assert row["tokens_per_second"] * row["p50_ms"] == pytest.approx(1e3 * 2 * 16)
        assert row["peak_extra_bytes"] > 4 * row["parameters"] * (row["name"] == OURS)  # at least the gradients
    model = GPTConfig(vocab_size=258, block_size=16, n_layer=2, n_head=2, n_embd=16, **models.GPT2)
    flops = rows[OURS]["tflops"] * rows[OURS]["p50_ms"] * 1e9
    assert flops == pytest.approx(training_flops(model, 16, batch_size=2), rel=0.05)
    if fault:
        assert {each["name"]: each["reason"] for each in result["missing"]}["nanoGPT"].startswith("WrongOutput: ")
    else:
        assert rows["nanoGPT"]["version"].startswith("model.py ")


def test_finetune_bench(bench, monkeypatch, tmp_path):
    rows = [{"question": f"What is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(40)]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(finetune.MODELS, "small", dict(n_layer=1, n_head=2, n_embd=16))
    result = result_of(bench, finetune, data_dir=str(tmp_path))
    rows = result["rows"]
    assert [row["name"] for row in rows] == [OURS, *(baseline.name for baseline in finetune.BASELINES)]
    tokens = rows[0]["tokens_per_second"] * rows[0]["p50_ms"]
    assert all(row["tokens_per_second"] * row["p50_ms"] == pytest.approx(tokens) for row in rows)
    assert result["pauses"] == 10 and result["block_size"] == 512


def test_finetune_bench_without_its_data_writes_nothing(bench, tmp_path):
    with pytest.raises(UserError, match="gsm8k_train"):
        Bench("finetune", Options(quick=True, data_dir=str(tmp_path))).run(finetune)
    assert not [*harness.RESULTS.rglob("*.json")]


def test_a_checkout_of_nanogpt_that_does_not_exist_is_missing(bench):
    for path, why in (("", "no checkout: give --nanogpt=PATH"), ("/nowhere", "/nowhere/model.py: give --nanogpt=PATH")):
        baselines = [Baseline("nanoGPT", "torch", lambda problem, path=path: models.nanogpt_model(path, None))]
        assert not bench.make_baselines(baselines, None, SHAPE) and why in bench.missing[-1]["reason"]


def test_nanogpt_has_no_llama(tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    llama = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, **models.LLAMA))
    with pytest.raises(UserError, match="nanoGPT implements GPT-2 only"):
        models.nanogpt_model(str(tmp_path), llama)


# The report


def a_result(**changes):
    def row(name, p50_ms, ratio, T=8):
        return {"what": "step", "shape": {"model": "small", "T": T}, "name": name, "version": "2", "p50_ms": p50_ms,
                "ratio_p10": 0.9 * ratio, "ratio": ratio, "ratio_p90": 1.1 * ratio, "tflops": None,
                "tokens_per_second": 1e3 * T / p50_ms}  # fmt: skip

    rows = [row(OURS, 4, 1), row("theirs", 6, 1.5), row(OURS, 10, 1, T=16), row("theirs", 8, 0.8, T=16),
            row(OURS, 20, 1, T=32), row("theirs", 21, 1.05, T=32)]  # fmt: skip
    missing = [{"name": "absent", "what": None, "shape": {"T": 8}, "reason": "not here"},
               {"name": "all", "what": None, "shape": {"T": 64}, "reason": "no time was left"}]  # fmt: skip
    return {"device": "A chip", "cpu": "A chip", "threads": 2, "dtype": "float32", "torch": "2", "triton": "3",
            "python": "3.11", "command": "python -m bench train", "date": "2026-01-02T03:04:05+00:00",
            "commit": "0123456789", "dirty": False, "rows": rows, "missing": missing} | changes  # fmt: skip


def test_committed_report_is_that_of_the_committed_results():
    results = report.load(harness.RESULTS)
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert report.document(results) == text, "run: python -m bench report"
    assert results.keys() == report.TABLES.keys()
    for name, devices in results.items():
        for folder, _ in devices:
            assert f"](../bench/results/{folder}/{name}.png)" in text
            assert (harness.RESULTS / folder / f"{name}.png").exists(), "run: python -m bench report"


def test_readme_table_has_the_numbers_of_the_committed_result():
    """GPT-2 124M, context 1024, from pause_cost.json of the EPYC."""
    rows = json.loads((harness.RESULTS / "amd-epyc-2-threads" / "pause_cost.json").read_text())["rows"]
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| a (token|prompt), ", line)]
    assert len(lines) == 6
    for line in lines:
        case, without, *ratios = line.strip("| ").split(" | ")
        kind, batch, way = case.split(", ")
        names = {name: text for name, text in report.WAYS.items() if text in ("without pauses", way)}
        expected = {}
        for row in rows:
            shape = row["shape"]
            same = report.KINDS[row["what"]] == kind and f"batch {shape['batch']}" == batch and row["name"] in names
            if same and shape["context"] == 1024:
                expected[shape["pauses"]] = row
        assert without == f"{harness.number(expected[0]['p50_ms'])} ms"
        assert ratios == [f"{expected[pauses]['ratio']:.2f}" for pauses in (1, 8, 50)]


def test_a_damaged_result_is_reported_in_one_sentence(tmp_path):
    (tmp_path / "chip").mkdir()
    (tmp_path / "chip" / "loss.json").write_text("{")
    with pytest.raises(UserError, match="loss.json is not JSON: run python -m bench loss again"):
        report.load(tmp_path)


def test_report_lists_every_bench_and_device():
    older = a_result(device="B chip", cpu="B chip", dirty=True, date="2025-12-31T03:04:05+00:00")
    text = report.document({"train": [("a-chip", a_result()), ("b-chip", older)]})
    assert "\n- [train](#train): A chip, 2 threads; B chip, 2 threads\n" in text
    assert "\n## train\n\nTokens per second and MFU of a training step" in text
    assert text.index("### train on A chip, 2 threads\n\n```\npython -m bench train\n```") < text.index(
        "### train on B chip, 2 threads"
    )
    assert "](../bench/results/b-chip/train.png)" in text
    versions = "in float32 with torch 2, Triton 3, Python 3.11."
    assert f"Measured on 2026-01-02 at commit 0123456 {versions}" in text
    assert f"Measured on 2025-12-31 at commit 0123456 with uncommitted changes {versions}" in text


def test_table_marks_faster_baselines_and_counts_cases():
    lines = report.tokens_table(a_result()).splitlines()
    assert "| step, small, T 8 | 2000 | 1333 (1.50) |" in lines
    assert "| step, small, T 16 | 1600 | **2000 (0.80)** |" in lines
    assert "| step, small, T 32 | 1600 | *1524 (1.05)* |" in lines
    sentence = (
        "Faster than every baseline measured here in 1 of 3 cases; slower than one (theirs) in 1; "
        "in the remaining 1 not clearly faster than all of them."
    )
    assert sentence in lines
    assert {"- absent, 1 case: not here", "- all candidates, 1 case: no time was left"} <= set(lines)
