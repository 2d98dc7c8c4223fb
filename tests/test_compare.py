"""nanopause.compare: on runs of train.py, and on hand-written metrics with known differences."""

import json
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import scripts
from conftest import TINY
from scipy import stats

from nanopause import compare, errors
from nanopause.config import Config
from nanopause.model import GPTConfig


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory):
    """Runs of train.py with two seeds at each of two pause rates."""
    folder, made = tmp_path_factory.mktemp("runs"), []
    for rate in (0.0, 0.1):
        for seed in (1, 2):
            made.append(folder / f"rate{rate}_seed{seed}")
            arguments = [f"--pause_rate={rate}", f"--seed={seed}", f"--out_dir={made[-1]}", f"--dataset={tiny_corpus}"]
            ended = scripts.run(
                "train.py", *TINY, *arguments, "--max_steps=10", "--eval_interval=4", "--log_interval=2"
            )
            assert ended.returncode == 0, ended.stdout + ended.stderr
    return made


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, rows, **config): a run of these metrics, every one with a training loss, tokens and FLOPs."""

    def write(name, rows, **config):
        folder = tmp_path / name
        (folder / "step_00000001").mkdir(parents=True)
        state = {"step": 1, "config": asdict(Config(**{"max_steps": 1000} | config)), "model": asdict(GPTConfig())}
        (folder / "step_00000001" / "checkpoint.json").write_text(json.dumps(state))
        rows = [{"loss": 3.0, "tokens": 10 * row["step"], "flops": 1.0, "val_loss": 1.0} | row for row in rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*folders): what the command prints, and compare.json. draw=True makes the picture, which takes seconds."""
    plot = compare.plot

    def run(*arguments, out=tmp_path / "made" / "compare.png", draw=False):
        monkeypatch.setattr(compare, "plot", plot if draw else lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments), f"--out={out}"])
        errors.run(compare.main)
        printed = capsys.readouterr()
        assert not printed.err and (not draw or out.read_bytes()[:4] == b"\x89PNG")
        return printed.out, json.loads(out.with_suffix(".json").read_text())

    return run


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """refusal(*arguments): the one sentence with which the command refuses."""

    def refusal(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", f"--out={tmp_path / 'compare.png'}", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            errors.run(compare.main)
        printed = capsys.readouterr()
        assert ended.value.code == 1 and printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert not (tmp_path / "compare.png").exists()
        return printed.err

    return refusal


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    return drawn


def bpb(**points):
    """Validations from step=(val_bpb, FLOPs)."""
    return [{"step": int(step[1:]), "val_bpb": value, "flops": flops} for step, (value, flops) in points.items()]


def lines(made, axis, quantity="val_bpb"):
    return [line for line in made["differences"] if (line["axis"], line["quantity"]) == (axis, quantity)]


def metric(folder, step, key):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row[key] for row in rows if row["step"] == step)


def test_runs_of_train_are_groups_of_seeds(trained, run):
    printed, made = run(*trained)
    assert [(group["label"], group["seeds"]) for group in made["groups"]] == [
        ("pause_rate=0.0", [1, 2]),
        ("pause_rate=0.1", [1, 2]),
    ]
    standard, pause = lines(made, "step")
    last = [metric(folder, 10, "val_bpb") for folder in trained]
    assert standard["at"] == pause["at"] == 10 and standard["n"] == pause["n"] == 2
    assert standard["values"] == last[:2] and pause["value"] == pytest.approx(np.mean(last[2:]))
    interval = stats.ttest_rel(last[2:], last[:2]).confidence_interval(0.95)
    assert pause["method"] == "paired t" and pause["interval"] == pytest.approx(interval)
    assert pause["difference"] == pytest.approx(np.mean(last[2:]) - np.mean(last[:2]))
    for text in (f"{pause['difference']:+.4f}", "paired t", "steps: 10", "n", "95% interval", "compare.json"):
        assert text in printed
    curve = made["groups"][1]["curves"]["val_bpb_pauses"]
    values = np.array([[metric(folder, step, "val_bpb_pauses") for step in (4, 8, 10)] for folder in trained[2:]])
    low, high = stats.t.interval(0.95, 1, values.mean(0), stats.sem(values))
    assert curve["step"] == [4, 8, 10] and curve["val_bpb_pauses"] == pytest.approx(values.mean(0))
    assert curve["low"] == pytest.approx(low) and curve["high"] == pytest.approx(high)
    assert made["groups"][0]["curves"]["loss"]["step"] == [2, 4, 6, 8, 10]
    assert "val_bpb_pauses" not in made["groups"][0]["curves"]


def test_the_command_of_the_docstring(trained, tmp_path):
    ended = scripts.run("nanopause/compare.py", *map(str, trained[::2]), f"--out={tmp_path / 'a.png'}")
    assert ended.returncode == 0 and not ended.stderr and "One seed shows no spread" in ended.stdout, ended.stderr
    assert (tmp_path / "a.png").exists() and (tmp_path / "a.json").exists()
    ended = scripts.run("nanopause/compare.py", "--help")
    assert ended.returncode == 0 and "RUN RUN [RUN" in ended.stdout and "FILE.png" in ended.stdout


def test_equal_flops_interpolate_between_validations(write_run, run):
    one = write_run("one", bpb(s10=(4.0, 100.0), s20=(3.0, 200.0), s30=(2.0, 300.0)))
    other = write_run("other", bpb(s10=(5.0, 50.0), s20=(3.0, 150.0), s30=(1.0, 250.0)), pause_rate=0.1)
    printed, made = run(one, other)
    first, second = lines(made, "flops")
    assert first["at"] == 250 and first["value"] == pytest.approx(2.5) and second["value"] == 1.0
    assert second["difference"] == pytest.approx(-1.5) and "interval" not in second
    assert [line["value"] for line in lines(made, "step")] == [2.0, 1.0] and "FLOPs: 250" in printed
    assert "One seed shows no spread: no interval for pause_rate=0.0; pause_rate=0.1" in printed


def test_the_validation_of_the_whole_split_is_not_mixed_with_others(write_run, run):
    short = write_run("short", bpb(s10=(4.0, 100.0), s20=(3.0, 200.0), s30=(9.0, 300.0)), max_steps=30)
    long = write_run("long", bpb(s10=(4.0, 100.0), s20=(3.5, 200.0), s30=(2.5, 300.0), s40=(9.0, 400.0)), max_steps=40)
    printed, made = run(short, long)
    assert [line["at"] for line in lines(made, "step")] == [20, 20]
    assert lines(made, "flops")[1]["at"] == 200 and lines(made, "flops")[1]["difference"] == 0.5
    assert "the last validations of the runs are excluded" in printed
    equal = write_run("equal", bpb(s10=(4.0, 100.0), s30=(8.0, 300.0)), max_steps=30, learning_rate=0.1)
    _, made = run(short, equal)
    assert [(line["at"], line["value"]) for line in made["differences"]] == [(30, 9), (30, 8), (300, 9), (300, 8)]
    assert made["differences"][3]["whole_split"]


def test_intervals_are_paired_where_seeds_are_equal_and_else_of_welch(write_run, run):
    def group(name, values, **config):
        return [
            write_run(f"{name}{seed}", bpb(s10=(value, 1.0)), seed=seed, **config) for seed, value in values.items()
        ]

    first = group("a", {1: 3.0, 2: 3.2, 3: 3.1})
    paired = group("b", {1: 2.9, 2: 3.15, 3: 2.95}, pause_rate=0.1)
    other = group("c", {1: 2.7, 2: 2.8, 4: 2.6, 5: 2.9}, pause_rate=0.2)
    _, made = run(*first, *reversed(paired), *other)
    _, by_pairs, of_welch = lines(made, "step")
    interval = stats.ttest_rel([2.9, 3.15, 2.95], [3.0, 3.2, 3.1]).confidence_interval()
    assert by_pairs["interval"] == pytest.approx(interval) and by_pairs["method"] == "paired t"
    test = stats.ttest_ind([2.7, 2.8, 2.6, 2.9], [3.0, 3.2, 3.1], equal_var=False)
    assert of_welch["interval"] == pytest.approx(test.confidence_interval()) and of_welch["method"] == "Welch's t"
    assert [line["n"] for line in lines(made, "step")] == [3, 3, 4]


def test_settings_that_change_no_result_do_not_part_a_group(write_run, run):
    rows = bpb(s10=(4.0, 1.0))
    neutral = {"log_interval": 5, "tracker": "tensorboard", "device": "cuda", "resume": True, "out_dir": "elsewhere"}
    runs = [write_run("a", rows, seed=1), write_run("b", rows, seed=2, **neutral)]
    printed, made = run(*runs)
    assert [group["label"] for group in made["groups"]] == ["all runs"] and "Differences" not in printed
    _, made = run(*runs, write_run("c", rows, seed=2, learning_rate=0.5, n_layer=7))
    assert [group["label"] for group in made["groups"]] == [
        "n_layer=3, learning_rate=0.03",
        "n_layer=7, learning_rate=0.5",
    ]


def test_validations_with_pauses_at_another_rate_have_no_difference(write_run, run):
    rows = [{"step": 10, "val_bpb": 4.0, "val_bpb_pauses": 4.5, "flops": 1.0}]
    runs = [write_run("a", rows, pause_rate=0.1), write_run("b", rows, pause_rate=0.1, n_layer=4)]
    _, made = run(*runs, write_run("c", rows, pause_rate=0.2))
    assert ["difference" in line for line in lines(made, "step", "val_bpb_pauses")] == [False, True, False]
    assert ["difference" in line for line in lines(made, "step")] == [False, True, True]


def test_finetuning_is_compared_by_loss_and_accuracy(write_run, run, figures):
    rows = [{"step": step, "val_loss": 2 - step / 10, "val_bpb": 1.0, "val_exact_match": step / 20, "flops": 1.0 * step}
            for step in (5, 10)]  # fmt: skip
    settings = {"task": "gsm8k", "max_steps": 10}
    one, other = write_run("one", rows, **settings), write_run("other", rows[:1], pauses=10, **settings)
    _, made = run(one, other, draw=True)
    assert [line["value"] for line in lines(made, "step", "val_loss")] == [1.5, 1.5]
    assert [line["value"] for line in lines(made, "flops", "val_exact_match")] == [0.25, 0.25]
    assert not lines(made, "step")
    rows = [axis.get_ylabel().partition("\n")[0] for axis in figures[0].axes[::3]]
    assert rows == ["training loss", "validation loss", "validation exact match"]
    # A longer context cuts fewer examples, and a corpus is not used.
    run(one, write_run("longer", rows=[{"step": 5, "flops": 1.0}], **settings, block_size=512, dataset="unused"))


def test_a_quantity_is_not_extrapolated_to_validations_without_it(write_run, run):
    rows = [{"step": 5, "val_exact_match": 0.5, "flops": 5.0}, {"step": 10, "flops": 10.0}]
    _, made = run(write_run("one", rows, task="gsm8k"), write_run("other", rows, task="gsm8k", pauses=10))
    assert [line["at"] for line in lines(made, "flops", "val_loss")] == [10, 10]
    assert not lines(made, "flops", "val_exact_match") and not lines(made, "step", "val_exact_match")


def test_the_picture_has_units_and_can_be_read_in_grey(trained, run, figures):
    run(*trained, draw=True)
    (figure,) = figures
    labels = [axis.get_xlabel() for axis in figure.axes]
    n = len(labels) // 2  # axes of the picture
    assert labels[:n] == n * [""] and labels[n : n + 2] == ["steps", "tokens (pauses included)"]
    assert [axis.get_ylabel() for axis in figure.axes[::n]] == [
        "training loss\n(nats per token)",
        "validation loss\n(bits per byte)",
    ]
    standard, pause, with_pauses = figure.axes[n].get_lines()
    assert len({line.get_linestyle() for line in (standard, pause, with_pauses)}) == 3
    assert with_pauses.get_linestyle() == "--" and standard.get_marker() != pause.get_marker()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    rates = "pause_rate=0.0 (n=2)", "pause_rate=0.1 (n=2)"
    assert texts == [*rates, "pause_rate=0.1 (n=2), validation with pauses"]
    assert len(figure.axes[0].collections) == 2  # shades


@pytest.mark.parametrize("setting, text", [
    ({"dataset": "openwebtext"}, "has dataset='pydocs', but"),
    ({"tokenizer": "gpt2"}, "different tokens"),
    ({"task": "gsm8k"}, "has task='', but"),
    ({"limit": 5}, "has limit=None, but"),
    ({"eval_blocks": 8}, "validations on different blocks are not comparable"),
    ({"block_size": 512}, "bits per byte depend on the context"),
])  # fmt: skip
def test_runs_that_do_not_compare_are_refused(write_run, refusal, setting, text):
    rows = bpb(s10=(4.0, 1.0))
    one, other = write_run("one", rows), write_run("other", rows, **setting)
    (key,) = setting
    error = refusal(one, other)
    assert text in error and f"same --{key}" in error and str(one) in error and str(other) in error


def test_what_is_no_two_runs_is_refused(write_run, refusal, tmp_path):
    rows = bpb(s10=(4.0, 1.0))
    one = write_run("one", rows)
    assert "two or more runs, not 0" in refusal()
    assert "two or more runs, not 1" in refusal(one)
    assert f"{one} and {one} are the same run" in refusal(one, one)
    shutil.copytree(one, tmp_path / "copy")
    assert f"{tmp_path / 'copy'} are the same run" in refusal(one, tmp_path / "copy")
    assert f"{tmp_path / 'missing'} is not a run" in refusal(one, tmp_path / "missing")
    assert "has no validation yet" in refusal(one, write_run_without_validation(write_run))
    (tmp_path / "new").mkdir()
    shutil.copy(one / "metrics.jsonl", tmp_path / "new")
    assert f"{tmp_path / 'new'} has no checkpoint" in refusal(one, tmp_path / "new")
    (tmp_path / "copy" / "step_00000001" / "checkpoint.json").write_text("{")
    assert "checkpoint.json is damaged" in refusal(one, tmp_path / "copy")
    assert "must be a .png file" in refusal(one, one, f"--out={tmp_path / 'compare.json'}")


def write_run_without_validation(write_run):
    folder = write_run("early", bpb(s10=(4.0, 1.0)))
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0, "tokens": 100}\n')
    return folder


def test_runs_without_a_step_in_common_get_no_table_but_a_picture(write_run, run):
    one = write_run("one", bpb(s10=(4.0, 100.0)))
    other = write_run("other", bpb(s20=(3.0, 200.0)), pause_rate=0.1)
    printed, made = run(one, other, draw=True)
    assert not made["differences"] and "quantity" not in printed
    assert "No table at equal steps" in printed and "No table at equal FLOPs" in printed
