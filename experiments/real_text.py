"""Do pauses help in pretraining on ordinary text, at sizes that a CPU can train?

    python experiments/real_text.py --seeds=5                    # pauses at random places, three widths
    python experiments/real_text.py --between --seeds=3          # a pause after every token

Random places [Goyal et al. 2023, Algorithm 1]: config/standard.py and config/pause.py on the default corpus, at half,
once and twice the default width. A pause after every token: blocks of 128 text tokens and 128 pauses, with the loss at
the pause or at token and pause; the baseline has no pauses. All arms of a width have the same number of steps,
sequences and parameters.

    out/real_text/random.json, random.md      validation bits per byte by arm and seed, and their differences
    out/real_text/between.json, between.md
    out/real_text/width128/pause/seed0/       a run of train.py
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.runs import ROOT, Run, over_seeds, report, shown, train_all
from nanopause import cli, errors, metrics

WITHOUT, WITH = "val_bpb", "val_bpb_pauses"  # keys of metrics.jsonl: validation without and with pauses in the input


class Arm(NamedTuple):
    """label: in the table. score: key of metrics.jsonl. base: name of the arm to which the difference is taken."""

    name: str
    label: str
    arguments: tuple[str, ...]
    score: str = WITHOUT
    base: str = ""


@dataclass
class Settings:
    seeds: int = 1
    """Number of seeds: 0, 1, …"""
    widths: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Widths of the model for pauses at random places, with commas."""
    max_steps: int | None = None
    """Steps of every arm. None: 1100 with pauses at random places, 500 with a pause after every token."""
    between: bool = False
    """A pause after every token, instead of random places."""
    dataset: str = "pydocs"
    """The corpus, see train.py."""
    out_dir: str = "out/real_text"
    """Folder of runs and results."""


def random_arms(width: int) -> list[Arm]:
    size = (f"--n_embd={width}",)
    name = f"width{width}"
    standard = Arm(f"{name}/standard", f"width {width}, standard pretraining", ("config/standard.py", *size))
    pause = Arm(f"{name}/pause", f"width {width}, pause pretraining", ("config/pause.py", *size), base=standard.name)
    # Blocks with pauses have less text, so a difference would not be paired.
    with_pauses = pause._replace(label=f"width {width}, pause pretraining, pauses in the input", score=WITH, base="")
    return [standard, pause, with_pauses]


def between_arms() -> list[Arm]:
    size = ("--batch_size=32",)
    none = Arm("between/none", "no pauses", ("config/standard.py", *size, "--block_size=128"))
    pauses = "config/standard.py", *size, "--block_size=256", "--placement=between", "--pauses=1"
    return [
        none,
        Arm("between/last", "a pause after every token, loss at the pause", pauses, WITH, none.name),
        Arm("between/all", "a pause after every token, loss at both", (*pauses, "--hints=next_token"), WITH, none.name),
    ]


def run_of(settings: Settings, arm: Arm, seed: int) -> Run:
    config, *arguments = arm.arguments
    steps = settings.max_steps or (500 if settings.between else 1100)
    return Run(
        Path(settings.out_dir, arm.name, f"seed{seed}"),
        (str(ROOT / config), *arguments, f"--dataset={settings.dataset}", f"--seed={seed}", f"--max_steps={steps}",
         f"--eval_interval={steps}", f"--checkpoint_interval={steps}"),
    )  # fmt: skip


def measure(folder: Path) -> dict:
    """The last line of metrics.jsonl, with the validation after the last step."""
    return metrics.read(folder / "metrics.jsonl")[-1]


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/real_text.py", __doc__)
    errors.check("seeds", settings.seeds, 1, 1000)
    arms = between_arms() if settings.between else [arm for w in settings.widths for arm in random_arms(w)]
    runs = {arm.name: [run_of(settings, arm, seed) for seed in range(settings.seeds)] for arm in arms}
    train_all([run for seeds in runs.values() for run in seeds], measure)
    scores = {(name, key): [run.measured().get(key) for run in seeds] for name, seeds in runs.items()
              for key in (WITHOUT, WITH)}  # fmt: skip
    rows = [["validation bits per byte", "mean [95 % interval]", "difference [95 % interval]"]]
    results = []
    for arm in arms:
        values = scores[arm.name, arm.score]
        figures = over_seeds(values)
        difference = None
        if arm.base:  # paired: runs of a seed have the same initial weights and the same blocks in each step
            difference = over_seeds([value - base for value, base in zip(values, scores[arm.base, WITHOUT])])
        results.append({**arm._asdict(), "bpb": figures, "difference": difference})
        rows.append([arm.label, shown(figures, 4), shown(difference, 4, "+") if difference else "–"])
    note = f"{settings.seeds} seeds; Student's t; differences paired by seed; lower is better."
    report(Path(settings.out_dir), "between" if settings.between else "random", rows, note, asdict(settings), results)


if __name__ == "__main__":
    errors.run(main)
