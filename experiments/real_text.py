"""Do pauses help on ordinary text, from scratch, at the sizes that a CPU can train?

    python experiments/real_text.py --seeds=5                    # pauses at random places, at three widths
    python experiments/real_text.py --between --seeds=3          # a pause after every token

At random places [Goyal et al. 2023, Algorithm 1]: config/standard.py and config/pause.py on the default corpus, at
half, once and twice the default width. A pause after every token: 128 tokens of text, one pause after each, with the
loss at the last slot of a token or at both, beside none. All arms of a width have the same number of steps, sequences
and parameters.

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

WITHOUT, WITH = "val_bpb", "val_bpb_pauses"  # of metrics.jsonl: pauses in the validation's input


class Arm(NamedTuple):
    """label: in the table. score: the key of metrics.jsonl. base: the arm from which its difference is taken."""

    name: str
    label: str
    arguments: tuple[str, ...]
    score: str = WITHOUT
    base: str = ""


@dataclass
class Settings:
    seeds: int = 1
    """Seeds 0, 1, …, as many as this."""
    widths: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Widths of the model, with commas, of pauses at random places."""
    max_steps: int | None = None
    """Steps of every arm. None: 1100 of pauses at random places, 500 of a pause after every token."""
    between: bool = False
    """A pause after every token, instead of random places."""
    dataset: str = "pydocs"
    """The corpus, as of train.py."""
    out_dir: str = "out/real_text"
    """Folder of everything."""


def random_arms(width: int) -> list[Arm]:
    size = (f"--n_embd={width}",)
    name = f"width{width}"
    standard = Arm(f"{name}/standard", f"width {width}, standard pretraining", ("config/standard.py", *size))
    pause = Arm(f"{name}/pause", f"width {width}, pause pretraining", ("config/pause.py", *size), base=standard.name)
    # Blocks with pauses have less text: no difference is taken.
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
    """The validation after the last step, of the whole split."""
    return metrics.read(folder / "metrics.jsonl")[-1]


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/real_text.py", __doc__)
    errors.check("seeds", settings.seeds, 1, 1000)
    arms = between_arms() if settings.between else [arm for w in settings.widths for arm in random_arms(w)]
    runs = {arm.name: [run_of(settings, arm, seed) for seed in range(settings.seeds)] for arm in arms}
    train_all([run for some in runs.values() for run in some], measure)
    scores = {(name, key): [run.measured().get(key) for run in some] for name, some in runs.items()
              for key in (WITHOUT, WITH)}  # fmt: skip
    rows, found = [["validation bits per byte", "mean [95 % interval]", "difference [95 % interval]"]], []
    for arm in arms:
        values = scores[arm.name, arm.score]
        figures, gain = over_seeds(values), None
        if arm.base:  # paired: the same seed has the same weights at the start and the same blocks in each step
            gain = over_seeds([value - base for value, base in zip(values, scores[arm.base, WITHOUT])])
        found.append({**arm._asdict(), "bpb": figures, "difference": gain})
        rows.append([arm.label, shown(figures, 4), shown(gain, 4, "+") if gain else "–"])
    note = f"{settings.seeds} seeds; Student's t; differences paired by seed; lower is better."
    report(Path(settings.out_dir), "between" if settings.between else "random", rows, note, asdict(settings), found)


if __name__ == "__main__":
    errors.run(main)
