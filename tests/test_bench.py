"""The benches' measuring, on clocks that say what they are told, and the benches at sizes that take no time."""

import json
import subprocess
import sys
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import kernels
from bench import attention, compare, data, dit, finetune, generate, harness, loss, pause_cost, report, train
from bench.__main__ import run_all
from bench.harness import OURS, Bench, Rival, Wrong, check, passes, race
from nanopause.errors import UserError
from nanopause.flops import forward_flops, training_flops
from nanopause.model import GPT, GPTConfig
from nanopause.prepare import prepare
from nanopause.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu"), torch.float32
SHAPE = {"N": 3}
TRUTH = {"out": torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A bench that writes elsewhere, on a device that is not measured."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "peak_flops", lambda device, dtype: (1e9, "a test"))
    monkeypatch.setattr(harness, "peak_bytes_per_second", lambda device: (1e9, "a test"))
    return Bench("test", quick=False)


def clock(times):
    """A sample that runs its call and tells the next of its call's times; and the calls in the order of samples."""
    order, left = [], {call: iter(seconds) for call, seconds in times.items()}

    def sample(call, n):
        call()
        order.append(call)
        return next(left[call])

    return sample, order


def answer(factor=1.0):
    return lambda: {"out": (factor * TRUTH["out"]).float()}


def test_candidates_take_turns():
    a, b, c = answer(), answer(), answer()
    sample, order = clock({a: cycle([0.5]), b: cycle([1.0]), c: cycle([2.0])})
    samples = race({"a": a, "b": b, "c": c}, sample, seconds=21)
    assert order[6:] == [a, b, c] * 6  # after two of each to warm up; a round is 3.5 s
    assert samples == {"a": [0.5] * 6, "b": [1.0] * 6, "c": [2.0] * 6}


@pytest.mark.parametrize(
    "seconds, repeats, rounds", [(1e-5, 10, 25), (3e-4, 3, 25), (0.5, 1, 20), (100.0, 1, 3), (400.0, 1, 2)]
)
def test_a_sample_fills_a_millisecond_and_a_race_its_time(seconds, repeats, rounds):
    asked = []
    samples = race({"a": answer()}, lambda call, n: asked.append(n) or seconds, seconds=10)
    assert asked[2 if seconds < 5 else 0 :] == [repeats] * rounds and samples == {"a": [seconds] * rounds}


def test_a_sample_is_a_mean(monkeypatch):
    """Of n calls, on a clock that each call moves by 3 s."""
    now = [0.0]

    def call():
        now[0] += 3.0

    monkeypatch.setattr(harness, "perf_counter", lambda: now[0])
    assert harness.wall_clock(call, 4) == 3.0 and now[0] == 12.0


def test_statistics(bench):
    """The ratio is the median of the rounds' ratios, which is not the ratio of the medians."""
    ours, rival = answer(), answer()
    ours_s, rival_s = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 2.0, 12.0, 4.0, 5.0]
    bench.versions["rival"] = "7"
    bench.sample, _ = clock({ours: [4, 4, *ours_s], rival: [4, 4, *rival_s]})
    mine, theirs = bench.compete("forward", SHAPE, {OURS: ours, "rival": rival}, TRUTH, flops=6e9)
    assert (mine["p10_ms"], mine["p50_ms"], mine["p90_ms"]) == pytest.approx((1400, 3000, 4600))
    assert (
        mine["ratio"] == 1 and mine["tflops"] == pytest.approx(2e-3) and mine["percent_of_peak"] == pytest.approx(200)
    )
    assert theirs["ratio"] == 1.0 != np.median(rival_s) / np.median(ours_s)
    assert theirs["version"] == "7" and theirs["samples"] == 5 and mine["result_bytes"] == 12
    assert bench.rows == [mine, theirs] and not bench.missing


def test_bytes_per_second(bench):
    bench.header["peak_bytes_per_second"] = 4e9
    bench.sample = lambda call, n: 2.0
    (row,) = bench.compete("forward", SHAPE, {OURS: answer()}, TRUTH, read_bytes=4e9)
    assert row["gbps"] == 2 and row["percent_of_peak"] == 50 and row["tflops"] is None
    bench.header["peak_bytes_per_second"] = None
    (row,) = bench.compete("forward", SHAPE, {OURS: answer()}, TRUTH, read_bytes=4e9)
    assert row["gbps"] == 2 and row["percent_of_peak"] is None


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"out": torch.tensor([1.0, 2.0, -4.1])}, "out is off by 0.025 of its largest entry"),
        ({"out": torch.tensor([1.0, torch.nan, -4.0])}, "out is off by nan"),
        ({"out": torch.tensor([1.0, 2.0])}, r"out has shape \[2\] instead of \[3\]"),
    ],
)
def test_a_wrong_output_is_wrong(wrong, why):
    assert check({"out": torch.tensor([1.0, 2.0, -4.02])}, TRUTH, 0.01) == pytest.approx(0.005)
    with pytest.raises(Wrong, match=why):
        check(wrong, TRUTH, 0.01)


def test_a_wrong_or_failing_rival_is_not_timed(bench):
    ours, wrong = answer(), answer(2)

    def failing():
        raise RuntimeError("no such kernel\nand a long story")

    bench.sample, order = clock({ours: cycle([1.0])})
    rows = bench.compete("forward", SHAPE, {OURS: ours, "wrong": wrong, "failing": failing}, TRUTH, flops=1)
    assert [row["name"] for row in rows] == [OURS] and set(order) == {ours}
    reasons = {lack["name"]: lack["reason"] for lack in bench.missing}
    assert reasons["wrong"].startswith("Wrong: out is off by 1 ") and all(m["what"] == "forward" for m in bench.missing)
    assert reasons["failing"] == "RuntimeError: no such kernel"


def test_ours_must_be_right_and_more_so(bench):
    bench.versions["rough"] = "1"
    rough = answer(1 + 2 * harness.TOLERANCE[bench.dtype])
    assert len(bench.compete("forward", SHAPE, {OURS: answer(), "rough": rough}, TRUTH, flops=1)) == 2
    with pytest.raises(Wrong, match="out is off"):
        bench.compete("forward", SHAPE, {OURS: rough}, TRUTH, flops=1)


def test_a_rival_that_is_not_installed_is_missing(bench):
    def make(problem):
        import no_such_package  # noqa: F401

    rivals = (Rival("absent", "no-such-package", make), Rival("here", "torch", lambda problem: abs))
    assert bench.functions(rivals, None, SHAPE) == {"here": abs}
    assert bench.versions["here"] == torch.__version__
    reason = "ModuleNotFoundError: No module named 'no_such_package'"
    assert bench.missing == [{"name": "absent", "what": None, "shape": SHAPE, "reason": reason}]


def test_a_shape_without_time_is_missing(bench):
    seen = []
    bench.attempt(lambda *arguments: seen.append(arguments), SHAPE, "more")
    bench.end = 0
    bench.attempt(lambda *arguments: seen.append(arguments), SHAPE)
    assert seen == [(bench, SHAPE, "more")] and not bench.failed
    assert [lack["reason"] for lack in bench.missing] == ["no time was left"]


@pytest.mark.parametrize("error, why", [
    (UserError("no such data: get it"), "no such data: get it"), (MemoryError("all of it"), "MemoryError: all of it"),
    (KeyboardInterrupt(), "it was interrupted"),
])  # fmt: skip
def test_a_shape_that_fails_loses_nothing(bench, capsys, error, why):
    """What was measured before is kept, beside the last whole result, and the exit code tells."""

    def fails(*_):
        raise error

    def measures(bench, shape):
        bench.compete("step", shape, {OURS: answer()}, TRUTH)

    bench.attempt(fails, SHAPE)
    with pytest.raises(UserError, match=f"nothing was measured: N=3: {why}"):
        bench.write()
    if isinstance(error, KeyboardInterrupt):
        bench.attempt(measures, SHAPE)
        assert not bench.rows and [lack["reason"] for lack in bench.missing] == 2 * [why]
        bench.interrupted = False
    bench.attempt(measures, SHAPE)
    bench.write()
    assert json.loads(bench.file.read_text())["rows"] and bench.file.name == "test.failed.json"
    with pytest.raises(UserError, match=f"1 shapes failed, and no earlier result is replaced: N=3: {why}"):
        bench.finish()
    bench.failed = []
    (bench.file.parent / "test.json").write_text("damaged")
    bench.write()
    assert not bench.gone
    bench.rows = [row | {"what": "other"} for row in bench.rows]
    bench.write()
    bench.finish()
    assert "1 rows of the last result are not in this one: N=3 step, ours" in capsys.readouterr().out


def test_passes_have_every_gradient():
    inputs = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])}
    calls = passes(lambda a, b: a * b, inputs, torch.tensor([1.0, 10.0]))
    assert {name: x.tolist() for name, x in calls["forward"]().items()} == {"out": [3, 10]}
    got = {name: x.tolist() for name, x in calls["forward+backward"]().items()}
    assert got == {"out": [3, 10], "da": [3, 50], "db": [1, 20]}
    assert not calls["forward"]()["out"].requires_grad


def test_quick_does_not_replace_a_full_result(monkeypatch, bench):
    bench.rows = [bench.row("step", SHAPE, OURS, [1.0], [1.0], error=None)]
    bench.write(note=1)
    full, bench.quick = bench.file, True
    bench.write()
    quick = bench.file
    assert full.name == "test.json" and quick.name == "test.quick.json" and full.parent == quick.parent
    assert json.loads(full.read_text())["note"] == 1
    if bench.header["device"] == bench.header["cpu"]:  # which may be one of many that have the same name
        n = torch.get_num_threads()
        assert full.parent.name == harness.slug(bench.header["device"]) + f"-{n}-threads"
    assert harness.slug("Intel(R) Xeon(R) Processor @ 2.50GHz") == "intel-xeon-processor-2-50ghz"


def test_numbers_have_three_digits():
    assert [harness.number(x) for x in (0.012345, 1.0, 12.345, 1234.5, None)] == ["0.0123", "1.00", "12.3", "1234", "–"]


def run(*args):
    return subprocess.run([sys.executable, "-m", "bench", *args], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("args", [("atention",), ()])
def test_an_unknown_bench_is_one_sentence(args):
    ended = run(*args)
    names = sorted(file.stem for file in (ROOT / "bench").glob("[!_]*.py") if file.stem != "harness")
    assert {"attention", "loss"} <= set(names) and ended.returncode == 1 and not ended.stdout
    assert ended.stderr == f"error: {args[0] if args else ''!r} is not a bench: choose {', '.join(names)}, or all\n"


@pytest.fixture
def processes(monkeypatch):
    """The benches that run_all begins, with their options; the loss fails."""
    began = []

    @contextmanager
    def begin(command):
        began.append(command[3:])
        yield SimpleNamespace(wait=lambda: command[3] == "loss")

    monkeypatch.setattr(subprocess, "Popen", begin)
    return began


def test_all_goes_on_after_a_failure_and_tells_it(processes):
    with pytest.raises(UserError, match=r"of 8 benches 1 failed, as they say above: loss$"):
        run_all(["--quick", "--nanogpt=somewhere"])
    assert [name for name, *_ in processes] == "attention data dit finetune generate loss pause_cost train".split()
    assert all("--quick" in options for options in processes)
    assert ["train", "--quick", "--nanogpt=somewhere"] in processes and ["loss", "--quick"] in processes


def test_all_knows_its_options(processes):
    with pytest.raises(UserError, match="--quik is an option of no bench"):
        run_all(["--quik"])
    assert not processes


# The benches, whole


HEADER = set(
    """bench quick ours device driver threads dtype torch triton python commit dirty date command peak_flops
    peak_flops_source peak_bytes_per_second peak_bytes_per_second_source rows missing""".split()
)
ROW = set(
    """what shape name version samples p10_ms p50_ms p90_ms ratio tflops gbps percent_of_peak error result_bytes
    peak_extra_bytes""".split()
)


def shown(name, result):
    """What README says of a result, whose figures are drawn too."""
    page = report.PAGES[name]
    for _, figure_of in page.figures.values():
        figure = figure_of(result)
        assert all(ax.get_xlabel() or figure.get_supxlabel() for ax in figure.axes)
        plt.close(figure)
    return page.table(result)


def result_of(bench, module, name, **options):
    """The JSON that a module's main writes, with what every result has checked."""
    module.main(quick=True, **options)
    (file,) = harness.RESULTS.rglob(f"{name}.quick.json")
    result = json.loads(file.read_text())
    assert HEADER <= result.keys() and result["bench"] == name and result["quick"] is True
    assert "ours" in shown(name, result)
    assert all(ROW <= row.keys() for row in result["rows"])
    assert all(lack.keys() == {"name", "what", "shape", "reason"} for lack in result["missing"])
    assert all(0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"] for row in result["rows"])
    assert {row["ratio"] for row in result["rows"] if row["name"] == OURS} == {1.0}
    return result


def of(result, what, **shape):
    return {row["name"]: row for row in result["rows"] if row["what"] == what and row["shape"].items() >= shape.items()}


def test_attention_bench(bench, monkeypatch, capsys):
    sizes = {"B": 2, "T": 40, "H": 2, "G": 1, "D": 16}
    shapes = [{"mask": mask} | sizes for mask in ("causal", "packed", "prefix")]
    shapes += [{"mask": "decode", "S": 48} | sizes | {"T": 3, "H": 4, "G": 2}]

    def reference(problem):
        lo, hi = problem.bounds()
        return lambda q, k, v: kernels.attention(q, k, v, lo.int(), hi.int(), impl="reference")

    def one_key_less(problem):
        lo, hi = problem.bounds()
        return lambda q, k, v: kernels.attention(q, k, v, lo.int(), hi.int() - 1, impl="reference")

    right, off_by_one = Rival("right", "torch", reference), Rival("off by one", "torch", one_key_less)
    flash_attn = Rival("flash-attn", "no-such-package", attention.flash_attn)
    monkeypatch.setattr(attention, "shapes", lambda device_type, quick: shapes)
    monkeypatch.setattr(attention, "document_lengths", lambda: np.array([7, 30, 11]))
    monkeypatch.setattr(attention, "RIVALS", (right, off_by_one, flash_attn))
    result = result_of(bench, attention, "attention")
    for shape in shapes:
        for what in ("forward",) if shape["mask"] == "decode" else ("forward", "forward+backward"):
            assert of(result, what, **shape).keys() == {OURS, "right"}
    wrong = [lack for lack in result["missing"] if lack["name"] == "off by one"]
    assert len(wrong) == 7 and all(lack["reason"].startswith("Wrong: ") for lack in wrong)
    assert sum(lack["name"] == "flash-attn" for lack in result["missing"]) == 4
    row = of(result, "forward", mask="causal")[OURS]
    assert row["tflops"] * row["p50_ms"] * 1e9 == pytest.approx(2 * 2 * (4 * 16) * (40 * 41 / 2))
    row = of(result, "forward+backward", mask="causal")[OURS]
    assert row["tflops"] * row["p50_ms"] * 1e9 == pytest.approx(3.5 * 2 * 2 * (4 * 16) * (40 * 41 / 2))
    problem = attention.make(shapes[-1], bench.device, bench.dtype)
    row = of(result, "forward", mask="decode")[OURS]
    keys = problem.lengths.sum().item()
    assert row["gbps"] * row["p50_ms"] * 1e6 == pytest.approx(keys * 2 * (2 * 16) * problem.k.itemsize)
    printed = capsys.readouterr().out
    assert "causal, forward+backward" in printed and "missing: off by one: Wrong: " in printed
    assert max(map(len, printed.replace(str(harness.RESULTS), "").splitlines())) <= 120


def test_masks_say_the_same_in_every_rival_s_words(monkeypatch):
    monkeypatch.setattr(attention, "document_lengths", lambda: np.array([50, 7, 130, 2]))
    sizes = {"B": 3, "T": 100, "H": 1, "D": 8}
    for mask in ("causal", "packed", "prefix", "decode"):
        shape = {"mask": mask} | sizes | ({"T": 5, "S": 100} if mask == "decode" else {})
        problem = attention.make(shape, *CPU)
        B, T, S, *_ = problem.sizes
        lo, hi = problem.bounds()
        s = torch.arange(S)
        visible = (lo[..., None] <= s) & (s < hi[..., None])
        assert torch.equal(problem.dense_mask()[:, 0] == 0, visible)
        flex = attention.block_mask(problem).mask_mod
        b, q, k = torch.meshgrid(torch.arange(B), torch.arange(T), s, indexing="ij")
        assert torch.equal(flex(b, 0, q, k), visible)
        if mask == "packed":  # the same documents, as flash-attn takes them: [starts[i], starts[i + 1]) of all tokens
            starts = problem.starts.tolist()
            dense = torch.zeros(B * T, B * T, dtype=torch.bool)
            for start, end in zip(starts, starts[1:]):
                dense[start:end, start:end] = True
            dense = torch.stack([dense[i : i + T, i : i + T] for i in range(0, B * T, T)]).tril()
            assert torch.equal(dense, visible) and problem.longest == 87
            assert starts == [0, 50, 57, 100, 187, 189, 200, 239, 246, 300]
        if mask == "decode":
            assert torch.equal(hi[:, -1].int(), problem.lengths) and problem.lengths[0] == S


def test_loss_bench(bench, monkeypatch, capsys):
    shapes = [{"N": 64, "C": 16, "V": 40, "masked": share} for share in (0.0, 0.5)]

    def mean_of_all_rows(problem):
        options = {"reduction": "sum", "impl": "reference"}
        return lambda x, weight: kernels.linear_cross_entropy(x, weight, problem.targets, **options) / len(x)

    all_rows = Rival("mean of all rows", "torch", mean_of_all_rows)
    eager = next(rival for rival in loss.RIVALS if rival.name == "full logits")
    monkeypatch.setattr(loss, "shapes", lambda device_type, quick: shapes)
    monkeypatch.setattr(loss, "RIVALS", (eager, all_rows))
    result = result_of(bench, loss, "loss")
    for what, products in (("forward", 1), ("forward+backward", 3)):
        assert of(result, what, masked=0.0).keys() == {OURS, "full logits", "mean of all rows"}
        rows = of(result, what, masked=0.5)
        assert rows.keys() == {OURS, "full logits"}
        row = rows["full logits"]
        assert row["tflops"] * row["p50_ms"] * 1e9 == pytest.approx(products * 2 * 32 * 16 * 40)
        assert row["logits_bytes"] == 64 * 40 * bench.dtype.itemsize
        assert row["extra_bytes"] >= 0.9 * row["logits_bytes"]
    assert {lack["what"] for lack in result["missing"]} == {"forward", "forward+backward"}
    assert [ratio["what"] for ratio in result["half_masked"]] == ["forward", "forward+backward"]
    assert all(ratio["ratios"].keys() == {OURS, "full logits"} for ratio in result["half_masked"])
    assert "half of the rows masked" in capsys.readouterr().out


def test_half_masked_is_the_half_over_the_whole(bench, monkeypatch):
    """On a clock by which a call takes as many seconds as its targets have live rows."""
    shape, live = {"N": 64, "C": 16, "V": 40, "masked": 0.5}, [0]

    def counted(x, weight, targets):
        live[0] = (targets != -100).sum().item()
        return x.sum() + weight.sum()

    def sample(call, n):
        call()
        return float(live[0])

    monkeypatch.setattr(loss, "RIVALS", ())
    monkeypatch.setattr(kernels, "linear_cross_entropy", counted)
    bench.rows = [{"name": OURS, "shape": shape, "what": what} for what in ("forward", "forward+backward")]
    bench.sample = sample
    assert [ratio["ratios"] for ratio in loss.half_masked(bench, shape)] == [{OURS: 0.5}] * 2


def test_truth_in_pieces_is_the_whole():
    shape = {"N": 50, "C": 8, "V": 30, "masked": 0.2}
    problem = loss.make(shape, *CPU)
    assert (problem.targets == -100).sum() == 10
    pieces = loss.truth(problem, rows=7)
    x, weight = (a.double().requires_grad_() for a in (problem.x, problem.weight))
    whole = torch.nn.functional.cross_entropy(x @ weight.T, problem.targets)
    dx, dw = torch.autograd.grad(whole, (x, weight))
    for name, expected in dict(out=whole.detach(), dx=dx, dw=dw).items():
        torch.testing.assert_close(pieces[name], expected)

    problem = attention.make({"mask": "causal", "B": 2, "T": 9, "H": 4, "G": 2, "D": 8}, *CPU)
    q, k, v = (a.double().requires_grad_() for a in problem.inputs.values())
    out = kernels.attention(q, k, v, impl="reference")
    gradients = torch.autograd.grad(out, (q, k, v), problem.upstream.double())
    for name, expected in zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients)):
        torch.testing.assert_close(attention.truth(problem)[name], expected)


def test_pause_cost_counts_what_the_formula_says(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(pause_cost, "PAUSES", (1, 3))
    seconds, append, product = [0.0], pause_cost.Run.append, torch.nn.Linear.forward

    def a_second_a_token(run, tokens):
        seconds.append(tokens.shape[1])
        return append(run, tokens)

    def a_hundred_for_logits(linear, x):
        seconds.append(100 * (len(linear.weight) == 50304))
        return product(linear, x)

    monkeypatch.setattr(pause_cost.Run, "append", a_second_a_token)
    monkeypatch.setattr(torch.nn.Linear, "forward", a_hundred_for_logits)
    monkeypatch.setattr(pause_cost, "perf_counter", lambda: sum(seconds))
    pause_cost.main(quick=True)
    (file,) = tmp_path.glob("*/pause_cost.quick.json")
    result = json.loads(file.read_text())
    rows = result["rows"]
    found = {(row["what"], row["name"], row["shape"]["pauses"]) for row in rows}
    assert found == {("decode", "ours", 3)} | {(what, "without", 0) for what in ("step", "prefix", "decode")} | {
        (what, name, m) for m in (1, 3)
        for what, name in (("step", "ours"), ("step", "sequential"), ("step", "chain of thought"),
                           ("prefix", "ours"), ("prefix", "sequential"))
    } | {(what, name, 3) for what in ("prefix", "decode") for name in ("more layers", "more heads")}  # fmt: skip
    for row in rows:
        assert row["flops"] == row["flops_counted"]
        compared = row["what"] != "decode" and row["name"] in ("ours", "sequential", "chain of thought")
        assert row["error"] < 1e-5 if compared else row["error"] is None
        if row["shape"]["pauses"]:
            assert row["flops_per_pause"] == row["flops_per_pause_counted"]
            assert row["flops_per_pause"] > 0 or row["name"].startswith("more")
    alone = {"step": 101, "prefix": 164, "decode": 101}
    for row in rows:
        added = 0 if row["what"] == "decode" or row["name"].startswith("more") else row["shape"]["pauses"]
        added *= 101 if row["name"] == "chain of thought" else 1  # whose logits are part of it
        assert row["p10_ms"] == row["p90_ms"] == 1000 * (alone[row["what"]] + added)
        assert row["ratio"] == pytest.approx(1 + added / alone[row["what"]])
        if row["shape"]["pauses"]:
            assert row["added_ms_per_pause"] == pytest.approx(1000 * added / row["shape"]["pauses"])
    one = {row["name"]: row["flops"] for row in rows if row["what"] == "step" and row["shape"]["pauses"] == 1}
    head = 2 * 2 * 64 * 50304  # two sequences, one more row of logits each
    assert one["chain of thought"] - one["sequential"] == head
    step = next(row for row in rows if row["what"] == "step" and row["name"] == OURS)
    line = f"| a token and its pauses in one pass | 1 | {step['flops_ratio']:.2f} | 1.01 |"
    assert {line, "| a token | 0 | 1.00 | 101000 ms |"} <= set(shown("pause_cost", result).splitlines())


def test_pause_cost_keeps_no_time_of_a_wrong_call(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    append = pause_cost.Run.append
    monkeypatch.setattr(pause_cost.Run, "append", lambda run, tokens: append(run, tokens) * tokens.shape[1] ** 0.1)
    with pytest.raises(UserError, match="2 shapes failed, .*: Wrong: hidden is off by"):
        pause_cost.main(quick=True)
    (file,) = tmp_path.glob("*/pause_cost.quick.failed.json")
    assert {row["what"] for row in json.loads(file.read_text())["rows"]} == {"decode"}  # which nothing is held to


def test_a_cpu_reads_the_longest_prompts_without_larger_models():
    assert [bool(pause_cost.larger_of(device, {"batch": batch, "context": 1024}))
            for device, batch in (("cpu", 8), ("cpu", 32), ("cuda", 32))] == [True, False, True]  # fmt: skip


def test_larger_models_of_equal_flops():
    """12 layers of 12 heads and 50 pauses behind 256 tokens: a fifth more."""
    config = pause_cost.config_of(False, 1024)
    goal = forward_flops(config, 306, n_live=1)
    deeper, wider = (pause_cost.of_equal_flops(config, name, 256, 50) for name in ("more layers", "more heads"))
    assert (deeper.n_layer, deeper.n_head, wider.n_layer) == (14, 12, 12) and wider.n_head == 19
    assert forward_flops(wider, 256, n_live=1) == pytest.approx(goal, rel=0.02)
    assert wider.head_width == config.head_width and wider.n_mlp == config.n_mlp


@pytest.mark.parametrize(
    "block, weights, keys",
    [(harness.GPT2, 12 * 16**2, 16), (harness.LLAMA | dict(n_kv_head=1, n_mlp=24), 3 * 16**2 + 3 * 16 * 24, 8)],
    ids=["gpt2", "llama"],
)
def test_all_generators_say_the_same(block, weights, keys, monkeypatch, tmp_path):
    """weights: of the layer's matrices. keys: a token's width of them."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setitem(generate.MODELS, "small", ("bytes", block | dict(n_layer=1, n_head=2, n_embd=16)))
    shape = {"model": "small", "batch": 3, "context": 9, "new": 4}
    monkeypatch.setattr(generate, "shapes", lambda *_: [shape | {"pauses": pauses} for pauses in (0, 2)])
    generate.main(quick=True)
    (file,) = tmp_path.glob("*/generate.quick.json")
    result = json.loads(file.read_text())
    text = shown("generate", result)
    assert all(f"| tokens per second, {what}" in text for what in ("prompts included", "after the prompts"))
    others = ["transformers", "transformers, static cache", "no cache"]
    assert [row["name"] for row in result["rows"]] == 2 * [name for name in ("ours", *others) for _ in "ab"]
    assert not any(row["error"] for row in result["rows"])
    assert [lack["name"] for lack in result["missing"]] == 2 * ["nanoGPT"]
    for row in result["rows"]:
        if row["name"] == OURS:  # reads its layers, its head and the cache
            cached = 3 * (9 + row["shape"]["pauses"] + 2) * 2 * keys
            read = 4 * (weights + load_tokenizer("bytes").vocab_size * 16 + cached)
            assert row["percent_of_peak"] == pytest.approx(1e11 * row["gbps"] / result["peak_bytes_per_second"])
            if row["what"] == "after the prompts":
                assert row["gbps"] == pytest.approx(read * row["tokens_per_second"] / 3 / 1e9)


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
    """Beside a stand-in with nanoGPT's names: right, or wrong and so not timed."""
    checkout = tmp_path / "nanoGPT"
    checkout.mkdir()
    (checkout / "model.py").write_text(
        NANOGPT.replace("self.lm_head(parts.ln_f(x))", "self.lm_head(x)") if fault else NANOGPT
    )
    shape = {"model": "tiny", "batch": 2, "T": 16, "pause_rate": 0.1}
    monkeypatch.setitem(train.MODELS, "tiny", [*train.GPT2, "--n_layer=2", "--n_head=2", "--n_embd=16"])
    shapes = [("step", shape), ("step", shape | {"model": "default"}), ("growth with T", shape | {"T": 32})]
    monkeypatch.setattr(train, "shapes", lambda *_: shapes)
    monkeypatch.setattr(train, "DATA", tmp_path)
    prepare(
        "pydocs",
        [""],
        lambda _: [f"{i} " + 99 * "word " for i in range(9)],
        tmp_path,
        "bytes",
        val_fraction=0.3,
        workers=1,
    )
    result = result_of(bench, train, "train", nanogpt=str(checkout))
    rivals = {"transformers"} | ({"nanoGPT"} if not fault else set())
    assert of(result, "step", model="tiny").keys() == {OURS} | rivals
    assert of(result, "step", model="default").keys() == of(result, "growth with T").keys() == {OURS}
    for row in result["rows"]:
        assert row["tokens_per_second"] * row["p50_ms"] == pytest.approx(1e3 * 2 * row["shape"]["T"])
        assert row["peak_extra_bytes"] > 4 * row["parameters"] * (row["name"] == OURS)  # gradients at least
    row = of(result, "step", model="tiny")[OURS]
    model = GPTConfig(vocab_size=258, block_size=16, n_layer=2, n_head=2, n_embd=16, **harness.GPT2)
    assert row["tflops"] * row["p50_ms"] * 1e9 == pytest.approx(training_flops(model, 16, batch_size=2), rel=0.05)
    turns = [(each["shape"]["model"], each["ratio"] > 0) for each in result["with_pauses"]]
    assert turns == [("tiny", True), ("default", True), ("tiny", True)]
    missing = {lack["name"]: lack["reason"] for lack in result["missing"]}
    if fault:
        assert missing["nanoGPT"].startswith("Wrong: ")
    else:
        assert of(result, "step", model="tiny")["nanoGPT"]["version"].startswith("model.py ")


def test_data_bench(bench, monkeypatch, tmp_path):
    texts = [f"{i} " + 99 * "word " for i in range(99)]
    shape = {"model": "default", "batch": 2, "T": 16, "pause_rate": 0.0}

    def a_token_late(reading):
        places = lambda step: [place + 1 for place in reading.places(step)]  # noqa: E731
        return data.crops(SimpleNamespace(pause_rate=0, shard=reading.shard, T=reading.T, places=places))

    late = Rival("a token late", "torch", a_token_late)
    monkeypatch.setattr(train, "shapes", lambda *_: [("step", shape)])
    monkeypatch.setattr(train, "DATA", tmp_path)
    monkeypatch.setattr(data, "documents", lambda: iter(texts))
    monkeypatch.setattr(data, "MODEL_OF", {"bytes": "default"})
    monkeypatch.setattr(data, "LOADERS", (*data.LOADERS, late))
    prepare("pydocs", [""], lambda _: texts, tmp_path, "bytes", val_fraction=0.3, workers=1)
    result = result_of(bench, data, "data")
    assert of(result, "load", pause_rate=0.0).keys() == {OURS, "crops of a memory map"}
    assert of(result, "load", pause_rate=0.1).keys() == {OURS}
    assert of(result, "prepare").keys() == {OURS, "tiktoken alone"}
    assert all(row["needed"] > 0 and row["error"] == 0 for row in result["rows"])
    row = of(result, "prepare")[OURS]
    assert row["tokens_per_second"] * row["p50_ms"] == pytest.approx(1e3 * sum(len(text) + 1 for text in texts[:50]))
    missing = {(lack["name"], lack["shape"]["pause_rate"]): lack["reason"] for lack in result["missing"]}
    assert missing["a token late", 0.0].startswith("Wrong: ")
    assert missing["crops of a memory map", 0.1] == "NotImplementedError: it has no pauses"


@pytest.fixture
def gsm8k(tmp_path):
    """A folder with as much of it as the benches need, in the dataset's form."""
    rows = [{"question": f"What is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(40)]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


TINY = dict(n_layer=1, n_head=2, n_embd=16)


def test_dit_bench(bench, monkeypatch, gsm8k):
    monkeypatch.setitem(dit.MODELS, "small", TINY)
    dit.main(quick=True, data_dir=gsm8k)
    (file,) = harness.RESULTS.rglob("dit.quick.json")
    rows = {row["shape"]["placement"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == list(dit.PLACEMENTS) and "| sft |" in shown("dit", json.loads(file.read_text()))
    assert rows["sft"]["ratio"] == rows["sft"]["flops_ratio"] == 1 and rows["sft"]["pauses"] == 0
    assert rows["dit"]["pauses"] == rows["ran"]["pauses"] == rows["appd"]["pauses"] > 0
    assert rows["dit"]["flops_ratio"] > 1.3 > rows["ran"]["flops_ratio"] > 1  # two forward passes of three


def test_finetune_bench(bench, monkeypatch, gsm8k):
    monkeypatch.setitem(finetune.MODELS, "small", TINY)
    finetune.main(quick=True, data_dir=gsm8k)
    (file,) = harness.RESULTS.rglob("finetune.quick.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == [OURS, *(rival.name for rival in finetune.RIVALS)]
    tokens = rows[0]["tokens_per_second"] * rows[0]["p50_ms"]
    assert all(row["tokens_per_second"] * row["p50_ms"] == pytest.approx(tokens) for row in rows)
    assert "| padded to block_size |" in shown("finetune", json.loads(file.read_text()))


@pytest.mark.parametrize("main", [dit.main, finetune.main])
def test_a_bench_without_its_data_writes_nothing(bench, monkeypatch, tmp_path, main):
    with pytest.raises(UserError, match="gsm8k_train"):
        main(quick=True, data_dir=str(tmp_path))
    assert not [*harness.RESULTS.rglob("*.json")]


def test_a_checkout_that_is_not_there_is_missing(bench):
    for path, why in (("", "no checkout: give --nanogpt=PATH"), ("/nowhere", "/nowhere/model.py: give --nanogpt=PATH")):
        rivals = [Rival("nanoGPT", "torch", lambda problem, path=path: harness.nanogpt(path, None))]
        assert not bench.functions(rivals, None, SHAPE) and why in bench.missing[-1]["reason"]


def test_nano_gpt_has_no_other_model(tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    llama = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, **harness.LLAMA))
    with pytest.raises(UserError, match="nanoGPT has GPT-2's model alone"):
        harness.nanogpt(str(tmp_path), llama)


def test_the_memory_s_speed_is_that_of_a_data_sheet_or_measured(monkeypatch):
    speed, source = harness.peak_bytes_per_second(CPU[0])
    assert 1e8 < speed < 1e13 and source == "measured by a sum of 256 MiB"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert harness.peak_bytes_per_second(torch.device("cuda")) == (3.35e12, "data sheet of NVIDIA H100 80GB HBM3")


def test_memory_is_what_a_call_holds_at_its_peak():
    """Two tensors of a megabyte at a time, of three."""

    def call():
        a, b = torch.zeros(1 << 18), torch.zeros(1 << 18)
        a = torch.zeros(1 << 16)
        return {"out": a, "b": b}

    assert (2 << 20) <= harness.peak_extra_bytes(call, CPU[0]) < (2 << 20) + (1 << 19)


# The report


def a_result(**changes):
    def row(name, p50_ms, ratio, T=8):
        return {"what": "step", "shape": {"model": "small", "T": T}, "name": name, "p50_ms": p50_ms, "ratio": ratio,
                "ratio_p10": 0.9 * ratio, "ratio_p90": 1.1 * ratio, "tokens_per_second": 1e3 * T / p50_ms}  # fmt: skip

    rows = [row(OURS, 4, 1), row("theirs", 6, 1.5), row(OURS, 10, 1, T=16), row("theirs", 8, 0.8, T=16),
            row(OURS, 20, 1, T=32), row("theirs", 21, 1.05, T=32)]  # fmt: skip
    missing = [{"name": "absent", "what": None, "shape": {"T": 8}, "reason": "not here"},
               {"name": "theirs", "what": None, "shape": {"T": 4}, "reason": "Wrong: by far"},
               {"name": "all", "what": None, "shape": {"T": 64}, "reason": "no time was left"}]  # fmt: skip
    return {"device": "A chip", "cpu": "A chip", "threads": 2, "dtype": "float32", "torch": "2",
            "command": "python -m bench data", "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789",
            "dirty": False, "rows": rows, "missing": missing} | changes  # fmt: skip


def test_the_readme_says_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    results = report.load(harness.RESULTS)
    assert report.text(readme, results) == readme, "run: python -m bench report"
    assert report.all_devices(results) == (harness.RESULTS / "README.md").read_text(), "run: python -m bench report"
    for bench, devices in results.items():
        assert f"<!-- bench: {bench} -->" in readme
        for device in devices:
            for suffix in report.PAGES[bench].figures:
                drawn = harness.RESULTS / device / f"{bench}{suffix}.svg"
                date = f"<dc:date>{devices[device]['date']}</dc:date>"
                assert date in drawn.read_text() and drawn.with_suffix(".png").exists(), "run: python -m bench report"


def test_a_damaged_result_is_one_sentence(tmp_path):
    (tmp_path / "chip").mkdir()
    (tmp_path / "chip" / "loss.json").write_text("{")
    with pytest.raises(UserError, match="loss.json is no JSON: run python -m bench loss again"):
        report.load(tmp_path)


def test_a_place_is_filled_by_the_device_measured_last():
    readme = "before\n<!-- bench: finetune -->\nstale\n<!-- end -->\n<!-- bench: loss -->\nstale\n<!-- end -->\nafter\n"
    older = a_result(device="B chip", cpu="B chip", dirty=True, date="2025-12-31T03:04:05+00:00")
    results = {"finetune": {"b-chip": older, "c-chip": a_result()}}
    said, everything = report.text(readme, results), report.all_devices(results)
    assert said.startswith(
        "before\n<!-- bench: finetune -->\nA chip, 2 threads, float32, torch 2 (`python -m bench data`"
    )
    assert "commit 0123456):" in said and "(bench/results/c-chip/finetune.png)" in said
    assert "Also measured: [B chip, 2 threads](bench/results/README.md#finetune).\n<!-- end -->" in said
    assert "## finetune\n\n### A chip, 2 threads\n\nA chip" in everything and "(c-chip/finetune.png)" in everything
    assert "\n\n### B chip, 2 threads\n\nB chip" in everything and "commit 0123456 with changes):" in everything
    assert "## loss" not in everything
    assert said.endswith("<!-- end -->\n<!-- bench: loss -->\n<!-- end -->\nafter\n") and "stale" not in said
    assert report.text(said, results) == said
    lines = said.splitlines()
    assert "| T 8 | 2000 | 1333 (1.50) |" in lines
    assert "| T 16 | 1600 | **2000 (0.80)** |" in lines  # where we lose
    assert lines[lines.index("| T 16 | 1600 | **2000 (0.80)** |") + 1] == "| T 32 | 1600 | *1524 (1.05)* |"
    assert lines[lines.index("| T 16 | 1600 | **2000 (0.80)** |") + 3] == (
        "Bold, 1 of 3: faster than ours (theirs). Italics, 1 of 3: faster in some rounds, slower in others. "
        "Missing: absent: not here; theirs (1 case): Wrong: by far. Not measured, for want of time: T 64."
    )


@pytest.mark.parametrize(
    "readme, why",
    [
        ("<!-- bench: spead -->\n<!-- end -->\n", "the bench 'spead'"),
        ("<!-- bench: data -->\n", "without `<!-- end -->`"),
        ("<!-- bench: data -->\n<!-- bench: loss -->\n<!-- end -->\n", "without `<!-- end -->`"),
    ],
)
def test_a_wrong_place_is_one_sentence(readme, why):
    with pytest.raises(UserError, match=why):
        report.text(readme, {})


def test_two_results_side_by_side(tmp_path, capsys):
    for name, factor in (("old", 1), ("new", 2)):
        (tmp_path / name).mkdir()
        rows = [row | {"p50_ms": factor * row["p50_ms"]} for row in a_result()["rows"]][factor - 1 :]
        (tmp_path / name / "data.json").write_text(json.dumps(a_result(rows=rows)))
    (tmp_path / "new" / "loss.json").write_text(json.dumps({"rows": rows}))
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    compare.main(old, new)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "step small T=8 theirs 6.00 12.0 2.00 1.50 1.50".split() in printed
    assert "step small T=8 ours 4.00 – – 1.00 –".split() in printed  # only the old one has it
    assert f"a: {old}: A chip, 2026-01-02T03:04:05+00:00, commit 0123456".split() in printed
    assert ["only", new, "has", "loss"] in printed
    # With a second device, devices are told apart.
    assert compare.by_bench(compare.load(old), compare.load(new))[1].keys() == {"data", "loss"}
    assert compare.by_bench(compare.load(old), compare.load(str(tmp_path)))[0].keys() == {"old data"}


def test_a_commit_has_its_results():
    if harness._output("git", "rev-parse", "HEAD") is None:
        pytest.skip("no repository of git")
    found = compare.load("HEAD")
    assert any(bench == "generate" and measured.rows for (_, bench), measured in found.items())


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="nope is neither a folder nor a commit"):
        compare.load("nope")
    with pytest.raises(UserError, match="holds no results"):
        compare.load(str(tmp_path))
    (tmp_path / "data.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="data.json of .* is not a result of a bench"):
        compare.load(str(tmp_path))
