"""The results of a grid: a cell per task, variant and M_inf, the table, the figures and results.json."""

import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from experiments.grid_job import Job
from nanopause.evaluation import versions, write_json
from nanopause.files import replace_file
from nanopause.progress import Ticker
from nanopause.results import panels


def over_seeds(values: dict[int, float], n_seeds: int) -> dict:
    """Values by seed, their mean and sample standard deviation, and the number of seeds that were requested."""
    std = statistics.stdev(values.values()) if len(values) > 1 else None
    return {"mean": statistics.fmean(values.values()), "std": std, "values": values, "n_seeds": n_seeds}


def cells(jobs: list[Job]) -> list[dict]:
    """For every task, variant (its fields) and M_inf: the primary metric in %, and val_loss, the validation loss in
    nats per token, None without finetuning."""
    groups, found = {}, []
    for job in jobs:
        for m_inf, row in job.scores().items():
            groups.setdefault((job.task, job.variant, m_inf), []).append((job, row))
    for (task, variant, m_inf), group in groups.items():
        (metric, *_), n = group[0][1]["metrics"], group[0][1]["n"]
        n_seeds = sum((job.task, job.variant) == (task, variant) for job in jobs)
        losses = {job.seed: loss for job, _ in group if (loss := job.val_loss()) is not None}
        cell = {"task": task, "metric": metric, "n": n, **variant._asdict(), "m_inf": m_inf}
        cell |= over_seeds({job.seed: 100 * row["metrics"][metric]["value"] for job, row in group}, n_seeds)
        found.append(cell | {"val_loss": over_seeds(losses, n_seeds) if losses else None})
    return found


def mean_and_std(figures: dict | None, digits: int = 1) -> str:
    """mean ± standard deviation of over_seeds, and the number of seeds where some are missing."""
    if figures is None:
        return "–"
    std = "" if figures["std"] is None else f" ± {figures['std']:.{digits}f}"
    n, n_seeds = len(figures["values"]), figures["n_seeds"]
    return f"{figures['mean']:.{digits}f}{std}" + f" ({n} of {n_seeds})" * (n < n_seeds)


def plot(found: list[dict], file: Path, title: str, draw: Callable, span: float = 1) -> None:
    """One panel per task, in which draw(axis, its cells) draws, at least `span` high, and one legend."""
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(cell["task"] for cell in found))
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        some = [cell for cell in found if cell["task"] == task]
        axis.set_title(f"{task}, {some[0]['n']:,} examples", fontsize=10)
        axis.set_ylabel(f"{some[0]['metric'].replace('_', ' ')} (%)")
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
        draw(axis, some)
        low, high = axis.dataLim.intervaly  # error bars included
        high = max(high, low + span)  # where all values are equal there would be no scale
        margin = 0.08 * (high - low)  # for markers and numbers at the edge
        axis.set_ylim(low - margin, high + margin)
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def seeds_of(jobs: list[Job]) -> str:
    n = jobs[0].settings.seeds
    return f"{n} seed{'s' * (n > 1)} of finetuning"


def spread_of(jobs: list[Job]) -> str:
    """What the values of a table are, for its note. One seed has no standard deviation."""
    return ("Mean ± sample standard deviation over " if jobs[0].settings.seeds > 1 else "") + seeds_of(jobs)


def report(
    jobs: list[Job], found: list[dict], failed: dict[str, str], header: list[str], groups: list[list[list[str]]],
    note: str, ticker: Ticker,
) -> None:  # fmt: skip
    """Show the table, one group of rows per task (rows of a paper begin with a bracket), and write it and the cells."""
    shown = Table(*header)
    for group in groups:
        for row in group:
            shown.add_row(*map(Text, row), style="dim" * row[0].startswith("["), end_section=row is group[-1])
    ticker.show(shown)
    ticker.say(note)
    rows = [header, len(header) * ["---"], *(row for group in groups for row in group)]
    out_dir = Path(jobs[0].settings.out_dir)
    replace_file(out_dir / "table.md", "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{note}\n")
    written = {"settings": asdict(jobs[0].settings), "versions": versions(), "unit": "%", "cells": found}
    write_json(out_dir / "results.json", written | {"failed": failed})
