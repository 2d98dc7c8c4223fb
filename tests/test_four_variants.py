"""The grid of variants: real jobs, forked where their start would take longer than they do; table, figures, resume."""

import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time

import matplotlib
import pytest
import scripts
from conftest import ROOT, TINY, Forked

from experiments import four_variants
from experiments import grid as grids
from experiments.four_variants import PAPER, Settings, Variant, bars, checked, coloured
from experiments.grid_results import over_seeds, plot
from nanopause import cli
from nanopause.errors import UserError
from nanopause.progress import Ticker

SHAPE = [*TINY, "--block_size=96"]
TRAIN = "--optimizer=adamw --max_steps=4 --batch_size=4 --log_interval=2 --eval_interval=2 --eval_blocks=4"


@pytest.fixture(scope="module")
def ready(tiny_corpus, tmp_path_factory):
    """Two tiny pretrained models, and a task's files."""
    folder = tmp_path_factory.mktemp("grid")
    for name, rate in (("std", 0), ("pause", 0.1)):
        args = [*SHAPE, f"--dataset={tiny_corpus}", f"--out_dir={folder / name}", f"--pause_rate={rate}"]
        ended = scripts.run("train.py", *args, "--max_steps=2")
        assert ended.returncode == 0, ended.stderr
    for split, n in (("train", 120), ("val", 10)):
        rows = [{"goal": f"{i} {split}?", "sol1": f"say {i}", "sol2": f"not {7 * i}", "label": i % 2} for i in range(n)]
        (folder / f"piqa_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(ready, tmp_path):
    return ["--tasks=piqa", f"--pretrained_std={ready / 'std'}", f"--pretrained_pause={ready / 'pause'}",
            "--seeds=2", "--pauses=2", f"--data_dir={ready}", "--device=cpu", f"--out_dir={tmp_path / 'out'}",
            f"--train={TRAIN}"]  # fmt: skip


def test_a_grid(grid, arguments, ready, tmp_path, capsys):
    out = tmp_path / "out"
    arguments += ["--inference_pauses=0,4", "--limit=8", "--eval_batch_size=16"]
    damaged = out / "piqa" / "PausePT_PauseFT2" / "seed1" / "run" / "step_00000001"
    damaged.mkdir(parents=True)

    # A job fails, and the others do not mind.
    with pytest.raises(UserError, match="1 of 8 jobs failed.*: piqa PausePT_PauseFT2 seed 1: error: .*log.txt"):
        grid(four_variants, *arguments)
    said = capsys.readouterr().out
    assert "8 jobs, 0 of them done already; 1 at a time" in said and "piqa PausePT_PauseFT2 seed 1: failed" in said
    assert said.count(": starts") == 8 and said.count(": done after") == 7 and len(Forked.started) == 15
    assert "(1 of 2)" in (out / "table.md").read_text()

    # It alone is done again, and then nothing is.
    damaged.rmdir()
    said, n_started = grid(four_variants, *arguments)
    assert "8 jobs, 7 of them done already" in said and n_started == 2
    written = (out / "results.json").read_text()
    said, n_started = grid(four_variants, *arguments)
    assert "8 jobs, 8 of them done already" in said and n_started == 0 and (out / "results.json").read_text() == written

    # Every value is that of a run, at its own numbers of pauses; means and deviations are of seeds.
    results = json.loads(written)
    assert results["unit"] == "%" and results["failed"] == {} and results["versions"]["torch"]
    found = {(c["pretraining"], c["m_ft"], c["m_inf"]): c for c in results["cells"]}
    assert sorted(found) == [(p, m, k) for p in ("Pause", "Std") for m, k in ((0, 0), (2, 0), (2, 2), (2, 4))]
    for (pretraining, m_ft, m_inf), cell in found.items():
        values = []
        for seed in (0, 1):
            folder = out / "piqa" / str(Variant(pretraining, m_ft)) / f"seed{seed}"
            evaluated = json.loads((folder / "evaluation_best_8" / "results.json").read_text())
            (row,) = [row for row in evaluated["results"] if row["pauses"] == m_inf]
            values.append(100 * row["metrics"]["accuracy"]["value"])
            trained = json.loads(
                (folder / "run" / (folder / "run" / "best").read_text() / "checkpoint.json").read_text()
            )
            config = trained["config"]
            assert (config["pauses"], config["seed"], config["max_steps"], row["n"]) == (m_ft, seed, 4, 8)
            assert config["init_from"] == str(ready / pretraining.lower()) and config["attention"] == "prefix"
            assert (evaluated["settings"]["step"], evaluated["settings"]["attention"]) == (trained["step"], "prefix")
        assert list(cell["values"].values()) == values
        assert cell["mean"] == pytest.approx(sum(values) / 2) and cell["std"] == pytest.approx(statistics.stdev(values))
        assert cell["paper"] == ([73.3, 0.2] if (pretraining, m_ft) == ("Std", 0) else
                                 [74.1, 0.2] if (pretraining, m_ft) == ("Pause", 0) else None)  # fmt: skip
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "| % | Std/Std | Std/Pause2 | Pause/Std | Pause/Pause2 |"
    cells = [found[key] for key in (("Std", 0, 0), ("Std", 2, 2), ("Pause", 0, 0), ("Pause", 2, 2))]
    assert lines[2] == "| piqa, accuracy | " + " | ".join(f"{c['mean']:.1f} ± {c['std']:.1f}" for c in cells) + " |"
    assert lines[3] == "| [G] 1B | 73.3 ± 0.2 | – | 74.1 ± 0.2 | – |"
    assert (out / "variants.png").stat().st_size > 10_000 and (out / "inference.png").stat().st_size > 10_000
    grid(four_variants, *arguments, "--seeds=1")
    *_, row, _, _, note = (out / "table.md").read_text().splitlines()
    assert row.startswith("| piqa, accuracy | ") and "±" not in row + note and note.startswith("1 seed of finetuning, ")
    with pytest.raises(UserError, match="has results with train=.*choose another --out_dir"):
        grid(four_variants, *arguments, "--train=--max_steps=5")


@pytest.mark.filterwarnings("error")
def test_one_seed_has_no_error_bar():
    """Nor one of zero length, whose caps would show."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axis = plt.figure().subplots()
    cells = [{"pretraining": "Std", "m_ft": 2, "m_inf": m_inf, "mean": 30.0, "std": std, "paper": None}
             for m_inf, std in ((0, None), (2, None), (4, 1.5))]  # fmt: skip
    four_variants.lines(axis, cells, {2: "black"})
    (bars,) = axis.collections
    (drawn,) = [bar.tolist() for bar in bars.get_segments() if len(bar)]
    assert drawn == [[4, 28.5], [4, 31.5]]
    assert all(sum(map(math.isfinite, caps.get_ydata())) == 1 for caps in axis.lines[1:])
    axis = plt.figure().subplots()
    four_variants.bars(axis, cells, {2: "black"})
    assert len(axis.patches) == 1 and not axis.collections
    plt.close("all")


def test_a_grid_continues_after_ctrl_c(grid, arguments, tmp_path):
    """With submitit's processes: a terminal sends Ctrl-C to all of them, and train.py saves all the same."""
    train = TRAIN.replace("max_steps=4", "max_steps=600").replace("eval_interval=2", "eval_interval=600")
    args = [*arguments, "--seeds=1", f"--train={train} --checkpoint_interval=50", "--keep=False"]
    run_folder = tmp_path / "out" / "piqa" / "StdPT_StdFT" / "seed0" / "run"
    command = [sys.executable, str(ROOT / "experiments" / "four_variants.py"), *args]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as process:  # fmt: skip
        while process.poll() is None and not (run_folder / "latest").exists():
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130 and output.endswith("interrupted\n") and "Traceback" not in output, output
    log = run_folder.parent / "log.txt"
    assert "stopped by SIGTERM after step" in log.read_text() and not (run_folder.parent / "evaluation_best").exists()
    step = int((run_folder / "latest").read_text()[5:])

    job, *_ = checked(cli.parse(Settings, args, "test"))
    assert len(job.commands()) == 2
    with Ticker(1, enabled=False) as ticker:
        assert grids.run([job], [""], ticker) == {}
    assert f"from step {step}\n" in log.read_text()
    assert job.commands() == [] and 0 in job.scores() and not list(run_folder.glob("step_*"))


@pytest.mark.parametrize(
    "change, text",
    [
        ("--tasks=piqe", "task 'piqe' is not known: did you mean 'piqa'?"),
        ("--tasks=", "no task: name some by --tasks=gsm8k,squad"),
        ("--tasks=csqa", "has no csqa_train.jsonl"),
        ("--pauses=", "must be numbers from 1, such as 10,50"),
        ("--pauses=0,10", "must be numbers from 1, such as 10,50"),
        ("--pauses=ten", "not 'ten'"),
        ("--inference_pauses=-1", "not '-1'"),
        ("--seeds=0", "seeds=0 must be 1 to"),
        ("--limit=0", "limit=0 must be 1 to"),
        ("--pretrained_std=", "no --pretrained_std: name"),
        ("--pretrained_std=nowhere", "--pretrained_std: nowhere holds no checkpoint"),
        ("--pretrained_std={pause}", "has been trained with pauses"),
        ("--pretrained_pause={std}", "has not been trained with pauses"),
        ("--train=--batch_size=0", "batch_size=0 must be at least 1"),
        ("--train=--n_layer=9", "n_layer=9 is not what"),
        ("--train='--seed=1", "cannot be split into arguments: No closing quotation"),
        ("--device=cuda", "there is no GPU"),
        ("--slurm_hours=0", "slurm_hours=0 must be 1 to"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_any_job(grid, arguments, ready, tmp_path, change, text, monkeypatch):
    monkeypatch.setattr(grids.torch.cuda, "device_count", lambda: 0)
    change = change.format(std=ready / "std", pause=ready / "pause")
    with pytest.raises(UserError) as error:
        grid(four_variants, *[arg for arg in arguments if not arg.startswith(change.partition("=")[0] + "=")], change)
    assert text in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_bar_of_zero_can_be_seen(tmp_path, monkeypatch):
    """By its number above the line at 0; with one seed there is no error bar."""
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    found = [{"task": "gsm8k", "metric": "accuracy", "n": 9, "pretraining": "Std", "m_ft": m_ft, "m_inf": m_ft,
              "paper": None} | over_seeds({0: value}, 1) for m_ft, value in ((0, 0.0), (10, 4.0))]  # fmt: skip
    plot(found, tmp_path / "variants.png", "", functools.partial(bars, colours=coloured(found)))
    (axis,) = drawn[0].axes
    assert [text.get_text() for text in axis.texts] == ["0.0", "4.0"] and axis.get_ylim()[0] < 0
    assert not axis.collections


def test_the_papers_row():
    assert len(PAPER) == 9 and all(len(row) == 6 for row in PAPER.values())
    assert {str(variant): cell for variant, cell in PAPER["squad"].items()} == {
        "StdPT_StdFT": (36.4, 2.5), "StdPT_PauseFT10": (36.6, 2.2), "StdPT_PauseFT50": (40.2, 3.2),
        "PausePT_StdFT": (38.4, 2.9), "PausePT_PauseFT10": (51.7, 2.3), "PausePT_PauseFT50": (55.9, 1.0)}  # fmt: skip
