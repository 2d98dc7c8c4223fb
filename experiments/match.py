"""Do filler tokens help without a chain of thought? 3SUM and 2SUM [Pfau et al. 2024], in minutes on a CPU.

    python experiments/match.py                       # one seed
    python experiments/match.py --seeds=3             # the tables of docs/evidence.md
    python experiments/match.py --seeds=3 --tasks=match3_6 --arms=none,dots,mix --max_steps=7500 --out_dir=out/match_mix
    python experiments/match.py --tasks=match3_12_d3 --size=paper --max_steps=50000     # on a GPU

Arms, with the same number of steps, examples and parameters:
    hints     pauses, with the chain of thought as targets at them (hints); the inputs are still pauses
    pauses    pauses, with the answer as the only target
    none      no pauses
    dots      fillers as in the paper: an ordinary token
    mix       half of the training examples have a chain of thought in their text, half have dots; tested on dots

    out/match/results.json, results.md       accuracies by arm and seed; chance is 0.5
    out/match/match3_6/hints/seed0/          a run of train.py
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.runs import ROOT, Run, accuracy, measurement, over_seeds, report, shown, train_all
from nanopause import cli, errors
from nanopause.errors import UserError
from nanopause.evaluation import words
from nanopause.tasks import get_task
from nanopause.tasks.match import problem_of

# [Pfau et al. 2024, section 4]: 4 layers, width 384, 6 heads, batch 256, Adam 1e-4.
PAPER = ("--n_embd=384", "--n_head=6", "--batch_size=256", "--optimizer=adamw", "--learning_rate=1e-4")


class Arm(NamedTuple):
    name: str
    label: str
    form: str = ""
    has_pauses: bool = False
    hints: str = ""


ARMS = [
    Arm("hints", "pauses, chain of thought as hints at them", "", True, "thought"),
    Arm("pauses", "pauses, no hints", "", True),
    Arm("none", "no pauses"),
    Arm("dots", "dots", "_dots"),
    Arm("mix", "half of training with chain of thought, half with dots; tested on dots", "_mix"),
]


@dataclass
class Settings:
    arms: str = "hints,pauses,none,dots,mix"
    """Arms, with commas."""
    tasks: str = "match3_6,match2_8"
    """match3_N or match2_N, with commas; match3_12_d3 has vectors of 3 digits, as in the paper."""
    seeds: int = 1
    """Number of seeds: 0, 1, …"""
    max_steps: int = 900
    """Steps of every arm."""
    size: Literal["small", "paper"] = "small"
    """Width 32, or the paper's 384."""
    out_dir: str = "out/match"
    """Folder of runs and results."""


def run_of(settings: Settings, task: str, arm: Arm, seed: int) -> Run:
    problem, steps = problem_of(task), settings.max_steps
    n_pauses = (problem.n_thoughts + 1) * arm.has_pauses
    length = (problem.n + 1) * problem.d + 2 * problem.n_thoughts + 16
    return Run(
        Path(settings.out_dir, task, arm.name, f"seed{seed}"),
        (str(ROOT / "config/match.py"), f"--task={task}{arm.form}", f"--pauses={n_pauses}", f"--hints={arm.hints}",
         *PAPER * (settings.size == "paper"), f"--block_size={length}", f"--seed={seed}", f"--max_steps={steps}",
         f"--eval_interval={max(1, steps // 5)}", f"--checkpoint_interval={steps}", "--log_interval=50"),
    )  # fmt: skip


def counts_baseline(task: str) -> float:
    """Accuracy of a linear classifier on how often each number occurs (after the shift of 2SUM), fitted by least
    squares to three quarters of 40 batches and tested on the rest: what frequencies predict without matching. Examples
    without a solution have fewer distinct numbers."""
    problem = problem_of(task)
    rng = np.random.default_rng(0)
    batches = [problem.numbers(rng) for _ in range(40)]
    x = np.concatenate([numbers for numbers, _ in batches])
    y = np.concatenate([has_solution for _, has_solution in batches])
    values = x @ problem.modulus ** np.arange(problem.d)  # [examples, n]
    counts = (values[:, :, None] == np.arange(problem.modulus**problem.d)).sum(1)
    features = np.concatenate((counts, np.minimum(counts, 1), counts**2), axis=1).astype(float)
    features -= features.mean(0)
    n = len(y) * 3 // 4
    weights = np.linalg.lstsq(features[:n], y[:n] - 0.5, rcond=None)[0]
    is_right = (features[n:] @ weights > 0) == y[n:]
    return float(is_right.mean())


def measure(folder: Path) -> dict:
    """Accuracy of the last checkpoint on the test texts, without a chain of thought."""
    model, tokenizer, config, measured = measurement(folder)
    return measured | {"accuracy": accuracy(config, model, tokenizer, config.pauses)}


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/match.py", __doc__)
    errors.check("seeds", settings.seeds, 1, 1000)
    errors.check("max_steps", settings.max_steps, 5, 10**7)
    tasks = [get_task(name).name for name in words(settings.tasks)]
    names = words(settings.arms)
    if not all(problem_of(task) for task in tasks) or not {*names} <= {arm.name for arm in ARMS}:
        raise UserError(f"--tasks={settings.tasks} must be tasks such as match3_6, and --arms={settings.arms} must be "
                        f"some of {','.join(arm.name for arm in ARMS)}")  # fmt: skip
    arms = [arm for arm in ARMS if arm.name in names]
    runs = {(task, arm): [run_of(settings, task, arm, seed) for seed in range(settings.seeds)]
            for task in tasks for arm in arms}  # fmt: skip
    train_all([run for seeds in runs.values() for run in seeds], measure)
    results = []
    for (task, arm), seeds in runs.items():
        measured = [run.measured() for run in seeds]
        about = {key: value for key, value in measured[0].items() if key != "accuracy"}
        figures = over_seeds([run["accuracy"] for run in measured], is_share=True)
        results.append({"on": task, **arm._asdict(), **about, "command": seeds[0].command(), "accuracy": figures})
    by_arm = {(row["on"], row["name"]): row for row in results}
    rows = [["accuracy", *tasks]]
    rows += [[arm.label, *(shown(by_arm[task, arm.name]["accuracy"], 3) for task in tasks)] for arm in arms]
    baselines = {task: counts_baseline(task) for task in tasks}
    rows.append(["a linear rule on how often each number occurs", *(f"{baselines[task]:.3f}" for task in tasks)])
    note = (f"{settings.seeds} seed{'s' * (settings.seeds > 1)}, mean [95 % interval of Student's t, where the seeds "
            f"differ]; {results[0]['steps']:,} steps of {results[0]['batch_size']} examples per arm; 2,000 test texts "
            f"per run; chance is 0.5.")  # fmt: skip
    results += [{"on": task, "name": "counts", "accuracy": {"mean": value}} for task, value in baselines.items()]
    report(Path(settings.out_dir), "results", rows, note, asdict(settings), results)


if __name__ == "__main__":
    errors.run(main)
