"""Do pauses help? Two published effects at a small scale, in minutes on a CPU.

    python experiments/counting.py                             # n = 20, one seed
    python experiments/counting.py --n=16,20,24 --seeds=5      # the table of docs/evidence.md
    python experiments/counting.py --border --n=12,16,24 --max_steps=1000 --batch_size=512 --seeds=3
                                                               # where pauses in pretraining alone are enough
    python experiments/counting.py --n=100 --max_steps=20000 --seeds=3     # the paper's sizes, on a GPU

1. Parity of n random bits [London & Kanade 2025, section 5]. With M pauses after the bits, the targets at the pauses
   are the count in unary (hints). Controls: no hints; no pauses and other hints at the bits; a larger model without
   pauses; dots, an ordinary token, in place of pauses.
2. The four variants of Goyal et al. 2023 on a function of the count: parity in pretraining, as above, then finetuning
   on the count modulo 3, without hints.

All arms have the same number of steps and examples and, except for the larger model, of parameters. Test strings do not
occur in training. Chance is 1/2 for parity and 1/3 modulo 3.

    out/counting/results.json    every arm with its settings, parameters and accuracies by seed
    out/counting/results.md, counting.png
    out/counting/n20/count_20/seed0/     a run of train.py, for sample.py and evaluate.py
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.runs import ROOT, Run, accuracy, measurement, over_seeds, report, shown, train_all
from nanopause import cli, errors
from nanopause.model import GPT


class Arm(NamedTuple):
    """The settings that differ between arms. name: of the folder. pauses: in training. changed: arguments for the model
    or the optimizer. pretraining: name of the arm that it continues. is_held: whether hold_answer edits the weights."""

    name: str
    label: str
    task: str
    pauses: int = 0
    hints: str = ""
    changed: tuple[str, ...] = ()
    pretraining: str = ""
    is_held: bool = False


BORDER_MLP = (8, 16, 32)  # widths of the MLP
LARGER = ("--n_embd=32", "--n_mlp=64")  # twice the width and four times the MLP
MUON = ("--optimizer=muon", "--matrix_learning_rate=0.02")


def parity_arms(n: int) -> list[Arm]:
    """Arms of parity of n bits: pause pretraining, standard pretraining, controls, and fewer pauses."""
    task = f"parity_{n}"
    return [
        Arm(f"count_{n}", "n pauses, count as hints at them", task, n, "count"),
        Arm("none_parity", "no pauses, parities so far as hints at the bits", task, 0, "prefix_parity"),
        Arm("no_hints", "n pauses, no hints", task, n),
        Arm("none_no_hints", "no pauses, no hints", task),
        Arm("none_count", "no pauses, hints about the count at the bits", task, 0, "prefix_count"),
        Arm("none_larger", "no pauses, parities as hints, width ×2, MLP ×4", task, 0, "prefix_parity", LARGER),
        Arm("none_muon", "no pauses, parities as hints, Muon in place of AdamW", task, 0, "prefix_parity", MUON),
        Arm(f"count_{n}_muon", "n pauses, count as hints at them, Muon", task, n, "count", MUON),
        Arm("dots", "n dots (an ordinary token), count as hints at them", f"{task}_dots", 0, "count"),
        *(Arm(f"count_{m}", f"{m} pauses, count as hints at them", task, m, "count") for m in (8, 4, 2) if m < n),
        Arm("one", "1 pause, which has no hint", task, 1),
    ]


def variants(n: int) -> list[Arm]:
    """The four variants: standard or pause pretraining on parity, standard or pause finetuning on count modulo 3; and
    the same from pretraining with hints about the count but no pauses, and with pauses but no hints."""
    pretraining = {
        "StdPT": ("none_parity", ""),
        "PausePT": (f"count_{n}", ""),
        "StdPT_count": ("none_count", "; pretraining with hints about the count, without pauses"),
        "PausePT_no_hints": ("no_hints", "; pretraining with pauses, without hints"),
    }
    held = Arm("PausePT_StdFT_held", "PausePT_StdFT; the answer keeps its position embedding", f"mod3_{n}",
               pretraining=f"count_{n}", is_held=True)  # fmt: skip
    return [
        Arm(f"{pt}_{ft}FT", f"{pt.partition('_')[0]}_{ft}FT{about}", f"mod3_{n}", m, pretraining=first)
        for pt, (first, about) in pretraining.items()
        for ft, m in (("Std", 0), ("Pause", n))
    ] + [held]


def hold_answer(n: int, model: GPT) -> None:
    """Copy the position embeddings after n bits and n pauses to the positions after n bits. In finetuning without
    pauses the answer then starts with the position embedding that it had in pause pretraining."""
    table = model.position_embedding.weight.data
    table[n : 2 * n] = table[2 * n : 3 * n].clone()


@dataclass
class Settings:
    n: list[int] = field(default_factory=lambda: [20])
    """Numbers of bits, with commas."""
    seeds: int = 1
    """Number of seeds: 0, 1, …"""
    max_steps: int = 500
    """Steps of every arm, also of every finetuning."""
    batch_size: int = 128
    """Examples per step."""
    border: bool = False
    """Instead of all arms: pause pretraining, then standard finetuning with hold_answer, by number of bits and width of
    the MLP."""
    out_dir: str = "out/counting"
    """Folder of runs and results."""


def run_of(settings: Settings, n: int, arm: Arm, seed: int, n_mlp: int = 16) -> Run:
    """The run of an arm. Settings that are not in Arm are the same for all arms."""
    group = f"border/n{n}_mlp{n_mlp}" if settings.border else f"n{n}"
    first = None
    if arm.pretraining:
        first = next(a for a in parity_arms(n) if a.name == arm.pretraining)
        first = run_of(settings, n, first, seed, n_mlp)
    return Run(
        Path(settings.out_dir, group, arm.name, f"seed{seed}"),
        (str(ROOT / "config/counting.py"), f"--task={arm.task}", f"--pauses={arm.pauses}", f"--hints={arm.hints}",
         f"--n_mlp={n_mlp}", *arm.changed, f"--batch_size={settings.batch_size}", f"--block_size={3 * n + 16}",
         f"--seed={seed}", f"--max_steps={settings.max_steps}", f"--eval_interval={max(1, settings.max_steps // 5)}",
         f"--checkpoint_interval={settings.max_steps}", "--log_interval=50"),
        first,
        partial(hold_answer, n) if arm.is_held else None,
    )  # fmt: skip


def measure(folder: Path) -> dict:
    """Accuracy of a run's last checkpoint on the test strings by number of pauses: as many as in training, and for
    pause finetuning also 0 … 2n."""
    model, tokenizer, config, measured = measurement(folder)
    kind, n = config.task.split("_")[:2]
    n = int(n)
    counts = {config.pauses}
    if kind == "mod3" and config.pauses:
        counts |= {0, n // 4, n // 2, 3 * n // 4, n - 1, n + 1, 5 * n // 4, 3 * n // 2, 2 * n}
    return measured | {"accuracy": {m: accuracy(config, model, tokenizer, m) for m in sorted(counts)}}


def summary(n: int, n_mlp: int, arm: Arm, runs: list[Run]) -> dict:
    """An arm's entry of results.json. accuracy: by pauses at inference, the mean over seeds and its 95 % interval."""
    measured = [run.measured() for run in runs]
    accuracy = {
        int(m): over_seeds([one["accuracy"][m] for one in measured], is_share=True) for m in measured[0]["accuracy"]
    }
    about = {key: measured[0][key] for key in ("parameters", "steps", "batch_size")}
    return {"n": n, "n_mlp": n_mlp, **arm._asdict(), **about, "command": runs[0].command(),
            "seeds": len(runs), "accuracy": accuracy}  # fmt: skip


def table(results: list[dict], border: bool) -> list[list[str]]:
    """Rows of text, the header first: one row per arm, one column per number of bits."""
    columns = sorted({(row["n"], row["n_mlp"]) for row in results})
    names = [f"n = {n}" + f", MLP {n_mlp}" * border for n, n_mlp in columns]
    rows = [["accuracy", "parameters", *names]]
    for label in dict.fromkeys(row["label"] for row in results):
        by_size = {(row["n"], row["n_mlp"]): row for row in results if row["label"] == label}
        sizes = sorted({row["parameters"] for row in by_size.values()})
        size = "–".join(f"{size:,}" for size in sizes[:: max(1, len(sizes) - 1)])
        figures = {column: row["accuracy"][row["pauses"]] for column, row in by_size.items()}
        rows.append([label, size, *(shown(figures[key], 3) if key in figures else "–" for key in columns)])
    return rows


CHANCE = {"parity": 0.5, "mod3": 1 / 3}


def error_bars(figures: list[dict]) -> list[list[float]]:
    """Distances from the means to the lower and upper ends of their intervals; 0 without an interval."""
    return [[0 if f["low"] is None else f["mean"] - f["low"] for f in figures],
            [0 if f["high"] is None else f["high"] - f["mean"] for f in figures]]  # fmt: skip


def plot(results: list[dict], file: Path) -> None:
    """Accuracy against pauses in training; the controls; the four variants; accuracy against pauses at inference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["n"] for row in results})
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", width_ratios=(1, 1))
    grey = [str(0.15 + 0.5 * i / max(1, len(sizes) - 1)) for i in range(len(sizes))]

    def rows_of(n: int, names: list[str]) -> list[dict]:
        return [row for name in names for row in results if (row["n"], row["name"]) == (n, name)]

    def training_figures(rows: list[dict]) -> list[dict]:
        return [row["accuracy"][row["pauses"]] for row in rows]

    def bars(axis, names: list[str], labels: list[str]) -> None:
        height = 0.8 / len(sizes)
        for i, n in enumerate(sizes):
            names_here = [name.format(n=n) for name in names]
            rows = rows_of(n, names_here)
            figures = training_figures(rows)
            places = [names_here.index(row["name"]) + (i - (len(sizes) - 1) / 2) * height for row in rows]
            axis.barh(places, [f["mean"] for f in figures], height * 0.9, xerr=error_bars(figures), capsize=2,
                      color=grey[i], label=f"n = {n} bits")  # fmt: skip
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
        axis.set_xlabel("accuracy on test strings")

    for i, n in enumerate(sizes):
        names = ["none_parity", "one", *(f"count_{m}" for m in sorted({2, 4, 8, n}))]
        rows = rows_of(n, names)
        figures = training_figures(rows)
        axes[0, 0].errorbar([row["pauses"] for row in rows], [f["mean"] for f in figures], error_bars(figures),
                            marker="os^Dv"[i % 5], color=grey[i], capsize=3, label=f"n = {n} bits")  # fmt: skip
        (row,) = rows_of(n, ["PausePT_PauseFT"])
        for m, figures in row["accuracy"].items():
            axes[1, 1].plot(
                len(figures["values"]) * [m], figures["values"], "o", markersize=4, color=grey[i], mfc="white"
            )
        axes[1, 1].plot(list(row["accuracy"]), [f["mean"] for f in row["accuracy"].values()], color=grey[i],
                        marker="os^Dv"[i % 5], label=f"n = {n}, mean")  # fmt: skip
    axes[0, 0].set(title="Parity: the count as hints at pauses", xlabel="pauses after the bits",
                   ylabel="accuracy on test strings")  # fmt: skip
    bars(axes[0, 1], ["count_{n}", "dots", "no_hints", "none_no_hints", "none_parity", "none_count", "none_larger",
          "none_muon", "count_{n}_muon"],
         ["n pauses, count as hints", "n dots, count as hints", "n pauses, no hints", "no pauses, no hints",
          "no pauses, parities as hints", "no pauses, hints about the count", "no pauses, larger model",
          "no pauses, Muon", "n pauses, Muon"])  # fmt: skip
    axes[0, 1].set_title("Parity: the controls")
    bars(axes[1, 0], ["StdPT_StdFT", "StdPT_PauseFT", "PausePT_StdFT", "PausePT_PauseFT"],
         ["standard pretraining\nstandard finetuning", "standard pretraining\npause finetuning",
          "pause pretraining\nstandard finetuning", "pause pretraining\npause finetuning"])  # fmt: skip
    axes[1, 0].set_title("The four variants: count modulo 3")
    axes[1, 1].set(title="Pause pretraining and finetuning with n pauses", ylabel="accuracy on test strings",
                   xlabel="pauses at inference; an open dot is a seed")  # fmt: skip
    for axis, kind, is_bar in zip(axes.flat, ("parity", "parity", "mod3", "mod3"), (False, True, True, False)):
        line = axis.axvline if is_bar else axis.axhline
        line(CHANCE[kind], color="black", linewidth=1, linestyle=":", label="chance")
        (axis.set_xlim if is_bar else axis.set_ylim)(0, 1.05)
        if not is_bar:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3, axis="x" if is_bar else "y")
        axis.set_axisbelow(True)
        axis.legend(fontsize=8, loc="best")
    seeds = results[0]["seeds"]
    figure.suptitle(f"{seeds} seeds; error bars: 95 % interval over seeds" if seeds > 1 else "one seed, no error bars")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/counting.py", __doc__)
    errors.check("seeds", settings.seeds, 1, 1000)
    errors.check("max_steps", settings.max_steps, 5, 10**7)
    errors.check("batch_size", settings.batch_size, 1, 2**20)
    for n in settings.n:
        errors.check("n", n, 8, 1000)
    cells = [(n, n_mlp) for n in settings.n for n_mlp in (BORDER_MLP if settings.border else (16,))]
    runs = {
        (n, n_mlp, arm): [run_of(settings, n, arm, seed, n_mlp) for seed in range(settings.seeds)]
        for n, n_mlp in cells
        for arm in parity_arms(n) + variants(n)
        if not settings.border or arm.name in (f"count_{n}", "PausePT_StdFT_held")
    }
    train_all([run for seeds in runs.values() for run in seeds], measure)
    results = [summary(*key, seeds) for key, seeds in runs.items()]
    results.sort(key=lambda row: (row["task"].startswith("mod3"), row["n"]))
    note = (f"{settings.seeds} seed{'s' * (settings.seeds > 1)}, mean [95 % interval of Student's t, where the seeds "
            f"differ]; {results[0]['steps']:,} steps of {results[0]['batch_size']} examples per arm; up to 2,000 test "
            f"strings per run; chance is 0.5 for parity, 0.333 for the variants.")  # fmt: skip
    folder = Path(settings.out_dir)
    if not settings.border:
        plot(results, folder / "counting.png")
    report(folder, "border" if settings.border else "results", table(results, settings.border), note, asdict(settings),
           results)  # fmt: skip


if __name__ == "__main__":
    errors.run(main)
