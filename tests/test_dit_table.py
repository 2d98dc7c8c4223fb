"""The table of methods: real jobs, forked; what is evaluated with pauses, resume, the paper's rows."""

import gzip
import json
import math
import statistics

import pytest
import scripts
from conftest import TINY, Forked

from experiments import dit_table
from experiments.dit_table import METHODS, PAPER, checked, job_of
from experiments.grid_results import cells, mean_and_std, over_seeds, plot
from nanopause import cli
from nanopause.config import load_config
from nanopause.errors import UserError

TRAIN = "--max_steps=4 --pauses=2 --learning_rate=1e-2 --log_interval=2 --eval_interval=2 --eval_blocks=4"


@pytest.fixture(scope="module")
def ready(tiny_corpus, tmp_path_factory):
    """A tiny pretrained model, and two tasks' files."""
    folder = tmp_path_factory.mktemp("dit_table")
    args = [*TINY, "--block_size=128", f"--dataset={tiny_corpus}", f"--out_dir={folder / 'std'}", "--max_steps=2"]
    ended = scripts.run("train.py", *args)
    assert ended.returncode == 0, ended.stderr
    for split, n in (("train", 120), ("test", 10)):
        rows = [{"question": f"{i} {split}?", "answer": f"so\n#### {i}"} for i in range(n)]
        with gzip.open(folder / f"gsm8k_{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture
def arguments(ready, tmp_path):
    return [f"--init_from={ready / 'std'}", "--tasks=gsm8k", "--seeds=2", f"--data_dir={ready}", "--device=cpu",
            "--limit=2", f"--out_dir={tmp_path / 'out'}", f"--train={TRAIN}"]  # fmt: skip


def test_a_table(grid, arguments, ready, tmp_path):
    out = tmp_path / "out"
    said, n_started = grid(dit_table, *arguments, "--methods=untrained,appd,dit")
    assert "5 jobs, 0 of them done already" in said and n_started == 9
    results = json.loads((out / "results.json").read_text())
    assert results["unit"] == "%" and results["failed"] == {} and results["settings"]["limit"] == 2
    found = {cell["method"]: cell for cell in results["cells"]}
    assert list(found) == ["untrained", "appd", "dit"]
    assert {method: cell["m_inf"] for method, cell in found.items()} == {"untrained": 0, "appd": 2, "dit": 0}
    for method, cell in found.items():
        values, losses = {}, {}
        for seed in ("0", "1") if method != "untrained" else "0":
            folder = out / "gsm8k" / method / f"seed{seed}"
            evaluated = json.loads((folder / "evaluation_best_2" / "results.json").read_text())
            (row,) = evaluated["results"]
            values[seed] = 100 * row["metrics"]["accuracy"]["value"]
            assert row["n"] == 2 and row["pauses"] == cell["m_inf"]
            if method == "untrained":
                assert evaluated["checkpoint"]["source"] == str(ready / "std") and not (folder / "run").exists()
                continue
            best = folder / "run" / (folder / "run" / "best").read_text()
            config = json.loads((best / "checkpoint.json").read_text())["config"]
            assert (config["placement"], config["pauses"], config["seed"]) == (method, 2, int(seed))
            assert config["init_from"] == str(ready / "std") and config["attention"] == "causal"
            rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            losses[seed] = min(row.get("val_loss", math.inf) for row in rows)
        assert cell["values"] == values and cell["mean"] == pytest.approx(statistics.fmean(values.values()))
        assert cell["paper"]["Phi-2"] == {"untrained": None, "appd": 52.38, "dit": 56.33}[method]
        if losses:
            loss = cell["val_loss"]
            assert loss["values"] == losses and loss["std"] == pytest.approx(statistics.stdev(losses.values()))
        else:
            assert cell["val_loss"] is None and cell["std"] is None
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "|  | no finetuning | APPD (after the prompt) | DIT (unlikely tokens) |" and lines[2].startswith(
        "| gsm8k, accuracy (%) | 0.0 | 0.0 ± "
    )
    loss = [found[method]["val_loss"] for method in ("appd", "dit")]
    assert lines[3] == "| validation loss (nats per token) | – | " + " | ".join(
        f"{each['mean']:.3f} ± {each['std']:.3f}" for each in loss) + " |"  # fmt: skip
    assert lines[4:7] == ["| [D] Phi-2 | – | 52.38 | 56.33 |", "| [D] Phi-3 Mini | – | 79.45 | 78.62 |",
                          "| [D] Llama-3-8B | – | 63.83 | 66.86 |"]  # fmt: skip
    assert all((out / name).stat().st_size > 10_000 for name in ("methods.png", "val_loss.png"))

    # What is done is not done again, and a seed that is not there yet is missed.
    said, n_started = grid(dit_table, *arguments, "--methods=dit", "--seeds=1")
    assert "1 jobs, 1 of them done already" in said and n_started == 0
    text = (out / "table.md").read_text()
    assert "1 seed of finetuning of " in text and "±" not in text + said  # one value has no deviation
    settings = cli.parse(dit_table.Settings, [*arguments, "--methods=untrained,dit", "--seeds=3"], "test")
    shown = {cell["method"]: mean_and_std(cell) for cell in cells(checked(settings))}
    assert shown["dit"].endswith(" (2 of 3)") and shown["untrained"] == "0.0"

    # With accuracies that models this small do not reach, every one is in its cell.
    planted = {("untrained", 0): 0.25, ("appd", 0): 0.5, ("appd", 1): 0.75, ("dit", 0): 0.125, ("dit", 1): 1.0}
    for (method, seed), value in planted.items():
        file = out / "gsm8k" / method / f"seed{seed}" / "evaluation_best_2" / "results.json"
        evaluated = json.loads(file.read_text())
        evaluated["results"][0]["metrics"]["accuracy"]["value"] = value
        file.write_text(json.dumps(evaluated))
    grid(dit_table, *arguments, "--methods=untrained,appd,dit")
    row = "| gsm8k, accuracy (%) | 25.0 | 62.5 ± 17.7 | 56.2 ± 61.9 |"
    assert (out / "table.md").read_text().splitlines()[2] == row


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_the_figure_of_methods(tmp_path, monkeypatch, n_seeds):
    """Every point is inside the axes, also where all are 0, and one seed has no error bar."""
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    found = [{"task": task, "metric": "accuracy", "n": 9, "method": method}
             | over_seeds(dict.fromkeys(range(n_seeds), value), 2)
             for task, value in (("gsm8k", 7.0), ("aqua", 0.0)) for method in ("sft", "dit")]  # fmt: skip
    plot(found, tmp_path / "methods.png", "", dit_table.dots)
    for axis, value in zip(drawn[0].axes, (7, 0)):
        low, high = axis.get_ylim()
        assert low < value < high and high - low < 2
        assert len(axis.containers) == (0 if n_seeds == 1 else 2)  # error bars


def test_what_each_method_trains_with():
    settings = dit_table.Settings(init_from="out/pause", train="--pauses=3 --placement=ran --focal=1")
    configs = {}
    for name, (_, arguments) in METHODS.items():
        job = job_of(settings, "aqua", name, 7)
        assert (job.arguments is None) == (arguments is None) == (name == "untrained")
        if arguments:
            configs[name] = load_config(job.train_arguments())
    of = {name: (c.placement, c.prefix_pauses, c.focal, c.pause_loss) for name, c in configs.items()}
    assert of == {
        "sft": ("sft", 0, 1, False), "ran": ("ran", 0, 1, False), "appd": ("appd", 3, 1, False),
        "aaw": ("aaw", 0, 1, False), "dit": ("dit", 0, 1, False), "focal": ("sft", 0, 2, False),
        "dit_pause_loss": ("dit", 0, 1, True)}  # fmt: skip
    assert all((c.task, c.seed, c.learning_rate, c.batch_size) == ("aqua", 7, 3e-5, 4) for c in configs.values())


@pytest.mark.parametrize(
    "change, text",
    [
        ("--methods=dit,sfd", "--methods=dit,sfd must be some of untrained,sft,ran"),
        ("--methods=", "must be some of"),
        ("--tasks=", "no task: name some"),
        ("--tasks=piqa", "has no piqa_train.jsonl"),
        ("--tasks=mbpp", "allow it by --allow_code_execution"),
        ("--init_from=", "no --init_from: name the folder"),
        ("--init_from=nowhere", "--init_from: nowhere holds no checkpoint"),
        ("--train=--n_layer=9", "n_layer=9 is not what"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_any_job(grid, arguments, tmp_path, change, text):
    with pytest.raises(UserError) as error:
        grid(dit_table, *arguments, change)
    assert text in str(error.value) and not Forked.started and not (tmp_path / "out").exists()


def test_the_papers_rows():
    def best(task, model):
        return max(PAPER[task][model], key=PAPER[task][model].get)

    assert all(set(row) <= METHODS.keys() and len(row) == 5 for rows in PAPER.values() for row in rows.values())
    assert {task: list(rows) for task, rows in PAPER.items()} == dict.fromkeys(
        ("gsm8k", "aqua", "mbpp"), ["Phi-2", "Phi-3 Mini", "Llama-3-8B"])  # fmt: skip
    assert PAPER["mbpp"]["Phi-2"] == {"sft": 14.0, "ran": 0.0, "appd": 10.4, "aaw": 5.4, "dit": 17.4}
    assert PAPER["aqua"]["Phi-3 Mini"] == {"sft": 62.46, "ran": 48.0, "appd": 63.22, "aaw": 19.83, "dit": 62.82}
    assert (best("gsm8k", "Llama-3-8B"), best("aqua", "Llama-3-8B"), best("mbpp", "Llama-3-8B")) == (
        "dit",
        "appd",
        "dit",
    )
