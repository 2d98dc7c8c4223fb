"""The paper's grid [Goyal et al. 2023, Table 1]: standard or pause pretraining, then standard or pause finetuning.

    python experiments/four_variants.py --tasks=gsm8k,squad --pretrained_std=out/standard --pretrained_pause=out/pause
    python experiments/four_variants.py … --pauses=10 --inference_pauses=0,2,5,10,25,50
    python experiments/four_variants.py … --train="--max_steps=500 --learning_rate=1e-3" --limit=200

Every job finetunes one of the two models with M_ft pauses and one seed (train.py), then evaluates the checkpoint with
the lowest validation loss (evaluate.py). StdFT is M_ft = 0. Evaluation has M_inf = M_ft pauses; --inference_pauses adds
others for PauseFT models. Learning rates, steps and batches are the recipes of nanopause/recipes.py.

Jobs run on this machine, one per GPU at a time, or with --slurm_partition=NAME on a Slurm cluster; experiments/grid.py
has the details, and needs pip install -e '.[experiments]'.

    out_dir/table.md              mean ± standard deviation over seeds, beside the paper's row
    out_dir/results.json          the same with every seed's values, versions and settings
    out_dir/variants.png          the table as bars; inference.png: the metric against M_inf
    out_dir/gsm8k/PausePT_PauseFT10/seed0/    log.txt, the run, its evaluation

The same command continues after an interruption; finished jobs are not repeated. Table, results and figures have the
tasks, seeds and pauses of the command. A job that fails is named, and the others go on.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import grid, grid_job, grid_results
from experiments.grid_job import ROOT, Job
from experiments.grid_results import mean_and_std, plot
from nanopause import errors
from nanopause.errors import UserError
from nanopause.evaluation import claim, numbers
from nanopause.progress import Ticker
from nanopause.tasks import get_task


class Variant(NamedTuple):
    """pretraining: "Std" or "Pause". m_ft: pauses of finetuning, 0 of standard finetuning."""

    pretraining: str
    m_ft: int

    @property
    def finetuning(self) -> str:
        return f"Pause{self.m_ft}" if self.m_ft else "Std"

    @property
    def label(self) -> str:
        """Of the finetuning, for a figure."""
        return f"finetuned with {self.m_ft} pauses" if self.m_ft else "finetuned without pauses"

    def __str__(self) -> str:
        return f"{self.pretraining}PT_" + (f"PauseFT{self.m_ft}" if self.m_ft else "StdFT")


SOURCE = "[G] 1B: Goyal et al. 2023, Table 1, 1B parameters, five seeds."
_COLUMNS = [Variant(pretraining, pauses) for pretraining in ("Std", "Pause") for pauses in (0, 10, 50)]
_TABLE_1 = """
gsm8k 7.5±0.5 6.9±1.0 6.5±0.8 7.7±0.5 8.5±0.9 7.7±0.3
squad 36.4±2.5 36.6±2.2 40.2±3.2 38.4±2.9 51.7±2.3 55.9±1.0
csqa 26.9±2.9 28.8±2.8 28.7±2.0 27.7±2.7 34.8±1.2 32.3±0.8
lambada 16.4±1.7 18.4±0.3 18.5±0.6 13.7±5.1 18.8±0.1 18.5±0.2
webq 13.7±2.1 9.0±4.4 12.4±2.6 15.0±2.5 13.8±3.7 16.0±1.6
nq 23.6±1.2 24.3±1.4 23.9±1.3 24.3±7.5 24.9±1.3 26.9±0.4
coqa 29.9±1.0 30.7±0.5 30.3±0.5 31.1±0.3 31.3±1.1 31.6±0.5
piqa 73.3±0.2 73.9±0.2 74.0±0.2 74.1±0.2 74.1±0.1 74.2±0.2
hellaswag 37.8±0.1 37.9±0.2 37.8±0.2 37.9±0.1 37.7±0.2 37.8±0.2
"""
PAPER = {  # task to variant to mean and standard deviation, %
    task: {variant: tuple(map(float, cell.split("±"))) for variant, cell in zip(_COLUMNS, cells)}
    for task, *cells in map(str.split, _TABLE_1.strip().splitlines())
}


@dataclass
class Settings(grid_job.Settings):
    pretrained_std: str = ""
    """The model pretrained without pauses: a run or any other value of init_from of train.py."""
    pretrained_pause: str = ""
    """The model pretrained with pauses."""
    pauses: str = "10,50"
    """M_ft: numbers of pauses of PauseFT, with commas."""
    inference_pauses: str = ""
    """M_inf besides M_ft itself, with commas, of PauseFT models."""
    size: Literal["130m", "1b"] = "130m"
    """The recipes that give learning rates, steps and batches: gsm8k_130m, …"""
    out_dir: str = "out/four_variants"
    """Folder of everything."""


def job_of(settings: Settings, task: str, variant: Variant, seed: int) -> Job:
    init_from = settings.pretrained_pause if variant.pretraining == "Pause" else settings.pretrained_std
    recipe = str(ROOT / "config/finetune.py"), f"--recipe={task}_{settings.size}"
    more = numbers("inference_pauses", settings.inference_pauses) if variant.m_ft else []
    m_inf = dict.fromkeys((variant.m_ft, *more))
    return Job(settings, task, variant, seed, init_from, (*recipe, f"--pauses={variant.m_ft}"), tuple(m_inf))


def checked(settings: Settings) -> list[Job]:
    """The jobs, after all settings are checked. Raises UserError."""
    counts = numbers("pauses", settings.pauses)
    if not counts or 0 in counts:
        raise UserError(f"--pauses={settings.pauses} must be numbers from 1, such as 10,50: no pauses are StdFT, which "
                        f"is always there")  # fmt: skip
    tasks = grid_job.check(settings)
    variants = [Variant(pretraining, m_ft) for pretraining in ("Std", "Pause") for m_ft in (0, *counts)]
    jobs = [job_of(settings, task, variant, seed) for seed in range(settings.seeds)
            for task in tasks for variant in variants]  # fmt: skip
    same = {}
    for pretraining, key in (("Std", "pretrained_std"), ("Pause", "pretrained_pause")):
        some = [job for job in jobs if job.variant.pretraining == pretraining and job.seed == 0]
        same[key], state = grid_job.check_model(key, source := getattr(settings, key), some)
        if state and state["knows_pauses"] != (pretraining == "Pause"):
            raise UserError(f"--{key}={source} has {'' if state['knows_pauses'] else 'not '}been trained with pauses")
    same |= {key: getattr(settings, key) for key in ("size", "train", "data_dir", "eval_batch_size")}
    claim(Path(settings.out_dir), same, "out_dir")
    return jobs


# Results


def variant_of(cell: dict) -> Variant:
    return Variant(cell["pretraining"], cell["m_ft"])


def table(jobs: list[Job], found: list[dict]) -> tuple[list[str], list[list[list[str]]]]:
    """The paper's Table 1: the column names, and for every task our row and the paper's."""
    variants, groups = list(dict.fromkeys(job.variant for job in jobs)), []
    for task in dict.fromkeys(job.task for job in jobs):
        at = {variant_of(cell): cell for cell in found if cell["task"] == task and cell["m_inf"] == cell["m_ft"]}
        ours = [mean_and_std(at.get(variant)) for variant in variants]
        paper = PAPER.get(task, {})
        theirs = [f"{paper[v][0]:.1f} ± {paper[v][1]:.1f}" if v in paper else "–" for v in variants]
        metric = next(iter(get_task(task).metrics)).replace("_", " ")
        groups.append([[f"{task}, {metric}", *ours], ["[G] 1B", *theirs]])
    return ["%", *(f"{variant.pretraining}/{variant.finetuning}" for variant in variants)], groups


def coloured(found: list[dict]) -> dict[int, np.ndarray]:
    """A colour for each M_ft."""
    import matplotlib

    counts = sorted({cell["m_ft"] for cell in found})
    return dict(zip(counts, matplotlib.colormaps["viridis"](np.linspace(0.9, 0.2, len(counts)))))


def bars(axis, some: list[dict], colours: dict) -> None:
    """The table, with the paper's values as hollow markers. The numbers show where a bar is 0."""
    gap, middle = len(colours) + 0.6, (len(colours) - 1) / 2
    for cell in (cell for cell in some if cell["m_inf"] == cell["m_ft"]):
        x = list(colours).index(cell["m_ft"]) + gap * (cell["pretraining"] == "Pause")
        axis.bar(x, cell["mean"], 0.9, yerr=cell["std"], capsize=3, color=colours[cell["m_ft"]], edgecolor="black",
                 linewidth=0.6, label=variant_of(cell).label)  # fmt: skip
        top = cell["mean"] + (cell["std"] or 0)
        axis.annotate(f"{cell['mean']:.1f}", (x - 0.1, top), (0, 2), textcoords="offset points", ha="center",
                      fontsize=7)  # fmt: skip
        if cell["paper"]:
            axis.errorbar(x + 0.3, *cell["paper"], fmt="D", mfc="white", markersize=5, color="tab:red", capsize=2,
                          label="Goyal et al. 2023, 1B")  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks([middle, middle + gap], ["standard pretraining", "pause pretraining"])
    axis.tick_params(axis="x", length=0)


def lines(axis, some: list[dict], colours: dict) -> None:
    """The metric against M_inf, one line per variant: dashed after standard pretraining; StdFT is level."""
    for variant in sorted({variant_of(cell) for cell in some}, key=lambda v: (v.pretraining == "Pause", v.m_ft)):
        cells = [cell for cell in some if variant_of(cell) == variant]
        points = sorted((c["m_inf"], c["mean"], np.nan if c["std"] is None else c["std"]) for c in cells)  # nan: no bar
        style = {} if variant.pretraining == "Pause" else {"linestyle": "--", "mfc": "white"}
        pretraining = "pause" if variant.pretraining == "Pause" else "standard"
        style |= {"color": colours[variant.m_ft], "label": f"{pretraining} pretraining, {variant.label}"}
        marker = "os^Dv"[list(colours).index(variant.m_ft) % 5]
        if not variant.m_ft:
            axis.axhline(points[0][1], linestyle=style.get("linestyle"), color=style["color"], linewidth=1.2)
        axis.errorbar(*zip(*points), marker=marker, markersize=5, capsize=3, elinewidth=0.8, **style)
    axis.set_xticks(sorted({cell["m_inf"] for cell in some}))
    axis.set_xlabel("pauses at inference, M_inf (tokens)")


def report(jobs: list[Job], failed: dict[str, str], ticker: Ticker) -> None:
    """Show and write the results of the jobs that are done."""
    found, seeds, out_dir = grid_results.cells(jobs), grid_results.seeds_of(jobs), Path(jobs[0].settings.out_dir)
    for cell in found:
        paper = PAPER.get(cell["task"], {}).get(variant_of(cell))
        cell["paper"] = paper if cell["m_inf"] == cell["m_ft"] else None
    note = f"{grid_results.spread_of(jobs)}, M_inf = M_ft. {SOURCE}"
    grid_results.report(jobs, found, failed, *table(jobs, found), note, ticker)
    several = jobs[0].settings.seeds > 1
    title, colours = seeds + "; error bars: ± sample standard deviation" * several, coloured(found)
    if found:
        plot(found, out_dir / "variants.png", title, partial(bars, colours=colours))
    if any(cell["m_inf"] != cell["m_ft"] for cell in found):
        plot(found, out_dir / "inference.png", title, partial(lines, colours=colours))


def main() -> None:
    grid.main(Settings, "python experiments/four_variants.py", __doc__, checked, report)


if __name__ == "__main__":
    errors.run(main)
