"""The paper's table [Kim et al. 2025, Table 1]: dynamic inserting beside finetuning with other pauses, and with none.

    python experiments/dit_table.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --tasks=gsm8k,aqua
    python experiments/dit_table.py … --tasks=gsm8k,aqua,mbpp --allow_code_execution
    python experiments/dit_table.py … --out_dir=out/ablation --methods=sft,focal,dit,dit_pause_loss --seeds=3
    python experiments/dit_table.py … --out_dir=out/short --train="--max_steps=500" --limit=200

Every job finetunes with config/dit.py, the task's recipe, one placement and one seed (train.py), then evaluates the
checkpoint with the lowest validation loss (evaluate.py): greedy, without pauses but for appd's, which are in its
prompts. `untrained` is the model without finetuning, evaluated once.

Jobs run on this machine, one per GPU at a time, or with --slurm_partition=NAME on a Slurm cluster; experiments/grid.py
has the details, and needs pip install -e '.[experiments]'.

    out_dir/table.md              mean ± standard deviation over seeds, the validation loss, and the paper's rows
    out_dir/results.json          the same with every seed's values, versions and settings
    out_dir/methods.png, val_loss.png       the metric and the validation loss, one dot per seed
    out_dir/gsm8k/dit/seed0/      log.txt, the run, its evaluation

The same command continues after an interruption; finished jobs are not repeated. Table, results and figures have the
tasks, seeds and methods of the command. A job that fails is named, and the others go on.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import grid, grid_job, grid_results
from experiments.grid_job import ROOT, Job
from experiments.grid_results import mean_and_std, plot
from nanopause import errors
from nanopause.errors import UserError
from nanopause.evaluation import claim, words
from nanopause.progress import Ticker
from nanopause.tasks import get_task

METHODS = {  # name in the table and arguments of train.py; None: not finetuned
    "untrained": ("no finetuning", None),
    "sft": ("SFT (no pauses)", ("--placement=sft",)),
    "ran": ("RAN (random places)", ("--placement=ran",)),
    "appd": ("APPD (after the prompt)", ("--placement=appd",)),
    "aaw": ("AAW (after words)", ("--placement=aaw",)),
    "dit": ("DIT (unlikely tokens)", ("--placement=dit",)),
    "focal": ("SFT, focal loss γ = 2", ("--placement=sft", "--focal=2")),
    "dit_pause_loss": ("DIT, loss on pauses", ("--placement=dit", "--pause_loss")),
}
SOURCE = "[D]: Kim et al. 2025, Table 1, which does not report seeds and deviations."
_TABLE_1 = """
Phi-2: 51.63/40.15/14.0 54.20/32.03/0.0 52.38/41.43/10.4 39.04/17.03/5.4 56.33/43.38/17.4
Phi-3 Mini: 78.84/62.46/32.2 75.43/48.00/17.0 79.45/63.22/29.6 73.84/19.83/22.4 78.62/62.82/32.2
Llama-3-8B: 65.04/70.71/12.6 60.95/54.92/9.4 63.83/72.18/11.0 64.06/19.25/9.2 66.86/69.96/14.0
"""
_ROWS = [(model, cells.split()) for model, _, cells in (line.partition(":") for line in _TABLE_1.strip().splitlines())]
PAPER = {  # task to model to method to its metric, %
    task: {
        model: {method: float(cell.split("/")[i]) for method, cell in zip(("sft", "ran", "appd", "aaw", "dit"), cells)}
        for model, cells in _ROWS
    }
    for i, task in enumerate(("gsm8k", "aqua", "mbpp"))
}


class Method(NamedTuple):
    """One of METHODS."""

    method: str

    def __str__(self) -> str:
        return self.method


@dataclass
class Settings(grid_job.Settings):
    tasks: str = "gsm8k"
    """With commas: gsm8k, aqua, mbpp."""
    init_from: str = ""
    """The model that is finetuned: a hub id, a transformers folder, a GGUF file, or the folder of a run."""
    methods: str = "untrained,sft,ran,appd,aaw,dit"
    """With commas: these, focal, dit_pause_loss."""
    out_dir: str = "out/dit_table"
    """Folder of everything."""


def job_of(settings: Settings, task: str, method: str, seed: int) -> Job:
    _, arguments = METHODS[method]
    if arguments is not None:
        arguments = str(ROOT / "config/dit.py"), f"--recipe={task}_dit", *arguments
    return Job(settings, task, Method(method), seed, settings.init_from, arguments)


def checked(settings: Settings) -> list[Job]:
    """The jobs, after all settings are checked. Raises UserError."""
    methods = words(settings.methods)
    if not methods or not set(methods) <= METHODS.keys():
        raise UserError(f"--methods={settings.methods} must be some of {','.join(METHODS)}")
    tasks = grid_job.check(settings)
    jobs = [job_of(settings, task, method, seed) for seed in range(settings.seeds)
            for task in tasks for method in methods if seed == 0 or method != "untrained"]  # fmt: skip
    weights, _ = grid_job.check_model("init_from", settings.init_from, [job for job in jobs if job.seed == 0])
    same = {"init_from": weights, **{key: getattr(settings, key) for key in ("train", "data_dir", "eval_batch_size")}}
    claim(Path(settings.out_dir), same, "out_dir")
    return jobs


# Results


def table(jobs: list[Job], found: list[dict]) -> tuple[list[str], list[list[list[str]]]]:
    """The paper's Table 1: column names, and for every task our metric and validation loss, then the paper's rows."""
    methods, groups = list(dict.fromkeys(job.variant.method for job in jobs)), []
    for task in dict.fromkeys(job.task for job in jobs):
        at = {cell["method"]: cell for cell in found if cell["task"] == task}
        metric = next(iter(get_task(task).metrics))
        losses = [mean_and_std(at[method]["val_loss"], 3) if method in at else "–" for method in methods]
        groups.append([
            [f"{task}, {metric} (%)", *(mean_and_std(at.get(method)) for method in methods)],
            ["validation loss (nats per token)", *losses],
        ])  # fmt: skip
        for model, row in PAPER.get(task, {}).items():
            groups[-1].append([f"[D] {model}", *(str(row.get(method, "–")) for method in methods)])
    return ["", *(METHODS[method][0] for method in methods)], groups


def dots(axis, some: list[dict], key: str | None = None) -> None:
    """One dot per seed, and with several seeds mean ± standard deviation, of the metric or of the entry `key`."""
    names = []
    for cell in some:
        if figures := cell[key] if key else cell:
            x = len(names)
            names.append(METHODS[cell["method"]][0].replace(", ", ",\n").replace(" (", "\n("))
            values = list(figures["values"].values())
            axis.scatter(len(values) * [x - 0.15], values, s=14, color="0.55", label="one seed")
            if figures["std"] is not None:
                axis.errorbar(x + 0.1, figures["mean"], figures["std"], fmt="D", color="black", capsize=4,
                              label="mean ± sample standard deviation")  # fmt: skip
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=30, ha="right", rotation_mode="anchor")
    axis.margins(x=0.1)
    if key:
        axis.set_title(some[0]["task"], fontsize=10)
        axis.set_ylabel("validation loss (nats per token)")


def report(jobs: list[Job], failed: dict[str, str], ticker: Ticker) -> None:
    """Show and write the results of the jobs that are done."""
    found, seeds, settings = grid_results.cells(jobs), grid_results.seeds_of(jobs), jobs[0].settings
    for cell in found:
        cell["paper"] = {model: row.get(cell["method"]) for model, row in PAPER.get(cell["task"], {}).items()}
    note = f"{grid_results.spread_of(jobs)} of {settings.init_from}. {SOURCE}"
    grid_results.report(jobs, found, failed, *table(jobs, found), note, ticker)
    title = f"{Path(settings.init_from).name}, {seeds}"
    if found:
        plot(found, Path(settings.out_dir, "methods.png"), title, dots)
    if any(cell["val_loss"] for cell in found):
        plot(found, Path(settings.out_dir, "val_loss.png"), title, partial(dots, key="val_loss"), span=0.01)


def main() -> None:
    grid.main(Settings, "python experiments/dit_table.py", __doc__, checked, report)


if __name__ == "__main__":
    errors.run(main)
