"""The paper's grid [Goyal et al. 2023, Table 1]: standard or pause pretraining, then standard or pause finetuning.

    python experiments/four_variants.py --tasks=gsm8k,squad --pretrained_std=out/standard --pretrained_pause=out/pause
    python experiments/four_variants.py … --pauses=10 --inference_pauses=0,2,5,10,25,50
    python experiments/four_variants.py … --train="--max_steps=500 --learning_rate=1e-3" --limit=200

Every job is a train.py of its own, from one of the two models, with a number of pauses M_ft and a seed, and then an
evaluate.py on the checkpoint with the lowest validation loss. StdFT is M_ft = 0; evaluation has M_inf = M_ft pauses,
and where PauseFT models are asked for others, StdFT ones stay at 0. Learning rates, steps and batches are those of
config/tasks. On several GPUs every GPU has a job.

    out_dir/table.md              mean ± standard deviation over seeds, beside the paper's row
    out_dir/results.json          the same with every seed's values, versions and settings
    out_dir/variants.png          the table as bars; inference.png: the metric against M_inf
    out_dir/gsm8k/PausePT_PauseFT10/seed0/    log.txt, the run, its evaluation

What is done is not done again, what broke off goes on with the same command, and more tasks, seeds or pauses add to
what is there. A job that fails is named, and the others go on.
"""

import fcntl
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import loads
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from nanopause import cli, errors, hub
from nanopause.config import load_config
from nanopause.errors import UserError
from nanopause.evaluation import claim, fingerprint, numbers, versions, words, write_json
from nanopause.files import replace_file
from nanopause.progress import Ticker
from nanopause.tasks import get_task, load

ROOT = Path(__file__).resolve().parent.parent


class Variant(NamedTuple):
    """pretraining: "Std" or "Pause". pauses: M_ft, 0 of standard finetuning."""

    pretraining: str
    pauses: int

    @property
    def finetuning(self) -> str:
        return f"Pause{self.pauses}" if self.pauses else "Std"

    def __str__(self) -> str:
        return f"{self.pretraining}PT_" + (f"PauseFT{self.pauses}" if self.pauses else "StdFT")


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
class Settings:
    tasks: str = ""
    """With commas: gsm8k, squad, coqa, csqa, piqa, hellaswag, lambada, webq, nq."""
    pretrained_std: str = ""
    """The model pretrained without pauses: folder of a run, or whatever else init_from of train.py takes."""
    pretrained_pause: str = ""
    """The one pretrained with them."""
    seeds: int = 5
    """Seeds 0, 1, … of finetuning, as many as this."""
    pauses: str = "10,50"
    """M_ft: numbers of pauses of PauseFT, with commas."""
    inference_pauses: str = ""
    """M_inf besides M_ft itself, with commas, of PauseFT models."""
    size: Literal["130m", "1b"] = "130m"
    """Whose learning rates, steps and batches: config/tasks/gsm8k_130m.py, …"""
    train: str = ""
    """More arguments of train.py, as one text: --train="--max_steps=500 --batch_size=8"."""
    checkpoint: Literal["best", "latest"] = "best"
    """Which one of a run is evaluated: of the lowest validation loss, or the last."""
    eval_batch_size: int = 8
    """Sequences at a time in an evaluation."""
    limit: int | None = None
    """Evaluate on only the first so many examples of a task. None: all."""
    data_dir: str = ""
    """Folder of the tasks' files, such as gsm8k_train.jsonl.gz. Empty: the hub."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda: a job on each GPU. cpu: one at a time. auto: GPUs where there are any."""
    keep: bool = True
    """Keep a job's checkpoints after its evaluation: up to three, of 12 bytes a parameter each."""
    out_dir: str = "out/four_variants"
    """Folder of everything."""


@dataclass(frozen=True, eq=False)
class Job:
    """A finetuning and its evaluation. What of it is done is read off its folder."""

    settings: Settings
    task: str
    variant: Variant
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.variant} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.settings.out_dir, self.task, str(self.variant), f"seed{self.seed}")

    @property
    def inference_pauses(self) -> list[int]:
        """Every M_inf."""
        more = numbers("inference_pauses", self.settings.inference_pauses) if self.variant.pauses else []
        return sorted({self.variant.pauses, *more})

    def train_arguments(self) -> list[str]:
        s = self.settings
        configs = [str(ROOT / "config" / name) for name in ("finetune.py", f"tasks/{self.task}_{s.size}.py")]
        init_from = s.pretrained_pause if self.variant.pretraining == "Pause" else s.pretrained_std
        return [*configs, *shlex.split(s.train), f"--init_from={init_from}", f"--pauses={self.variant.pauses}",
                f"--seed={self.seed}", f"--out_dir={self.folder / 'run'}", "--resume", *self._common()]  # fmt: skip

    def _common(self) -> list[str]:
        s = self.settings
        return [f"--device={s.device}"] + ([f"--data_dir={s.data_dir}"] if s.data_dir else [])

    def _results(self) -> Path:
        limit = "" if self.settings.limit is None else f"_{self.settings.limit}"
        return self.folder / f"evaluation_{self.settings.checkpoint}{limit}"

    def scores(self) -> dict[int, dict]:
        """The lines of evaluate.py's results.json by M_inf, as far as they are there."""
        file = self._results() / "results.json"
        return {row["pauses"]: row for row in loads(file.read_text())["results"]} if file.exists() else {}

    def command(self) -> list[str] | None:
        """What there is to do next; None: the job is done."""
        if set(self.inference_pauses) <= self.scores().keys():
            return None
        s, run, arguments = self.settings, self.folder / "run", self.train_arguments()
        last = f"step_{load_config(arguments).max_steps:08d}"
        if not (run / "latest").exists() or (run / "latest").read_text() != last:
            return [sys.executable, str(ROOT / "train.py"), *arguments]
        limit = [] if s.limit is None else [f"--limit={s.limit}"]
        return [sys.executable, str(ROOT / "evaluate.py"), f"--out_dir={run / s.checkpoint}", f"--tasks={self.task}",
                f"--pauses={','.join(map(str, self.inference_pauses))}", f"--results={self._results()}", *limit,
                f"--batch_size={s.eval_batch_size}", *self._common()]  # fmt: skip

    def discard(self) -> None:
        """Delete the checkpoints."""
        for name in ("latest", "best"):
            (self.folder / "run" / name).unlink(missing_ok=True)
        for folder in (self.folder / "run").glob("step_*"):
            shutil.rmtree(folder)


def checked(settings: Settings) -> list[Job]:
    """The jobs, after everything that can be wrong has been looked at. Raises UserError."""
    tasks, counts = words(settings.tasks), numbers("pauses", settings.pauses)
    numbers("inference_pauses", settings.inference_pauses)
    if not tasks:
        raise UserError("no task: name some by --tasks=gsm8k,squad")
    if not counts or 0 in counts:
        raise UserError(f"--pauses={settings.pauses} must be numbers from 1, such as 10,50: no pauses are StdFT, which "
                        f"is always there")  # fmt: skip
    errors.check("seeds", settings.seeds, 1, 10_000)
    errors.check("eval_batch_size", settings.eval_batch_size, 1, 2**20)
    if settings.limit is not None:
        errors.check("limit", settings.limit, 1, 2**62)
    try:
        shlex.split(settings.train)
    except ValueError as error:
        raise UserError(f"--train={settings.train} cannot be split into arguments: {error}") from None
    for name in tasks:
        for split in ("train", "validation", "test"):
            load(get_task(name), split, settings.data_dir or None, 1)
    variants = [Variant(pretraining, pauses) for pretraining in ("Std", "Pause") for pauses in (0, *counts)]
    jobs = [Job(settings, *job) for job in ((task, variant, seed) for seed in range(settings.seeds)
                                            for task in tasks for variant in variants)]  # fmt: skip
    weights = {}
    for pretraining, key in (("Std", "pretrained_std"), ("Pause", "pretrained_pause")):
        if not (source := getattr(settings, key)):
            raise UserError(f"no --{key}: name the folder of a run, or whatever else init_from of train.py takes")
        try:
            model, tokenizer, state = hub.load(source)
        except UserError as error:
            raise UserError(f"--{key}: {error}") from None
        if state and state["knows_pauses"] != (pretraining == "Pause"):
            raise UserError(f"--{key}={source} has {'' if state['knows_pauses'] else 'not '}been trained with pauses")
        weights[key] = fingerprint(model)
        for job in jobs[: len(tasks) * len(variants)]:
            if job.variant.pretraining == pretraining:
                load_config(job.train_arguments()).shaped(model.config, tokenizer)
    same = {key: getattr(settings, key) for key in ("size", "train", "data_dir")}
    claim(Path(settings.out_dir), weights | same, "out_dir")
    return jobs


def devices_of(settings: Settings) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for the jobs that run at the same time."""
    count = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if settings.device == "cuda" and not count:
        raise UserError("--device=cuda: there is no GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[:count] or [""]


def start(command: list[str], log: Path, device: str, lock: int) -> subprocess.Popen:
    """A process that writes into `log`, and holds the lock for as long as it lives. A Ctrl-C of the terminal does not
    reach it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": device, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True, pass_fds=[lock])  # fmt: skip


def why(log: Path, code: int) -> str:
    """The last error that a process told."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    *_, last = log.read_text(errors="replace").rpartition("\n$ ")
    lines = [line.strip() for line in last.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1]) if code else "was stopped"


def run(jobs: list[Job], devices: list[str], ticker: Ticker, lock: int) -> dict[str, str]:
    """Do the jobs, one at a time on each device. Returns those that failed, and why."""
    todo, free, running, failed, since, n_done = deque(jobs), list(devices), {}, {}, {}, 0
    try:
        while todo or running:
            while todo and free:
                job, device = todo.popleft(), free.pop()
                command, log = job.command(), job.folder / "log.txt"
                if job not in since:
                    ticker.say(f"{job}: starts" + (f" on GPU {device}" if device else ""))
                since.setdefault(job, time.perf_counter())
                running[device] = job, command, log, start(command, log, device, lock)
            ticker.step(n_done, ", ".join(str(job) for job, *_ in running.values()), False)
            time.sleep(0.1)
            for device, (job, command, log, process) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[device]
                free.append(device)
                after = job.command()
                if code == 0 and after not in (None, command):
                    todo.appendleft(job)
                    continue
                n_done += 1
                seconds = f"{time.perf_counter() - since[job]:,.0f} s"
                if code or after:
                    failed[str(job)] = f"{why(log, code)} ({log})"
                    ticker.say(f"{job}: failed after {seconds}: {failed[str(job)]}")
                    continue
                if not job.settings.keep:
                    job.discard()
                (metric, figure), *_ = job.scores()[job.variant.pauses]["metrics"].items()
                ticker.say(f"{job}: done after {seconds}, {metric} {100 * figure['value']:.1f} %")
    finally:  # where it was interrupted: train.py saves first, and a second interrupt does not wait for it
        for *_, process in running.values():
            process.terminate()
        try:
            for *_, process in running.values():
                process.wait()
        finally:
            for *_, process in running.values():
                process.kill()
    return failed


# What came of it


def cells(jobs: list[Job]) -> list[dict]:
    """For every task, variant and M_inf: the seeds' values, their mean and sample standard deviation, in %, and mean
    and deviation of the paper where it has them."""
    made = {}
    for job in jobs:
        for m_inf, row in job.scores().items():
            if m_inf not in job.inference_pauses:
                continue
            metric, figure = next(iter(row["metrics"].items()))
            cell = {"task": job.task, "metric": metric, "n": row["n"], "pretraining": job.variant.pretraining}
            cell |= {"m_ft": job.variant.pauses, "m_inf": m_inf, "mean": 0.0, "std": None, "values": {}}
            cell["paper"] = PAPER[job.task].get(job.variant) if m_inf == job.variant.pauses else None
            values = made.setdefault((job.task, job.variant, m_inf), cell)["values"]
            values[job.seed] = 100 * figure["value"]
    for cell in made.values():
        values = list(cell["values"].values())
        cell |= {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
    return list(made.values())


def variant_of(cell: dict) -> Variant:
    return Variant(cell["pretraining"], cell["m_ft"])


def table(jobs: list[Job], found: list[dict]) -> list[list[str]]:
    """The paper's Table 1: the columns' names, then of every task our row and the paper's."""
    n_seeds, variants = jobs[0].settings.seeds, list(dict.fromkeys(job.variant for job in jobs))

    def said(mean: float, std: float | None, n: int = n_seeds) -> str:
        return f"{mean:.1f}" + (f" ± {std:.1f}" if std is not None else "") + f" ({n} of {n_seeds})" * (n < n_seeds)

    rows = [["%", *(f"{variant.pretraining}/{variant.finetuning}" for variant in variants)]]
    for task in dict.fromkeys(job.task for job in jobs):
        at = {variant_of(cell): cell for cell in found if cell["task"] == task and cell["m_inf"] == cell["m_ft"]}
        ours = [said(at[v]["mean"], at[v]["std"], len(at[v]["values"])) if v in at else "–" for v in variants]
        rows.append([f"{task}, {next(iter(get_task(task).metrics)).replace('_', ' ')}", *ours])
        rows.append(["[G] 1B", *(said(*PAPER[task][v]) if v in PAPER[task] else "–" for v in variants)])
    return rows


def plot(found: list[dict], file: Path, title: str, draw: Callable) -> None:
    """A panel a task, in which draw(axis, its cells, a colour for every M_ft) draws, and one legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, counts = ({cell[key]: None for cell in found} for key in ("task", "m_ft"))
    colours = dict(zip(sorted(counts), plt.get_cmap("viridis")(np.linspace(0.9, 0.2, len(counts)))))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (max(6, 4.6 * columns), 3.4 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks):
        some = [cell for cell in found if cell["task"] == task]
        axis.set_title(f"{task}, {some[0]['n']:,} examples", fontsize=10)
        axis.set_ylabel(f"{some[0]['metric'].replace('_', ' ')} (%)")
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
        draw(axis, some, colours)
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom, max(top, bottom + 1))  # where all values are the same there would be no scale
    handles = {text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def bars(axis, some: list[dict], colours: dict) -> None:
    """The table, with the paper's values as hollow markers."""
    gap, middle = len(colours) + 0.6, (len(colours) - 1) / 2
    for cell in (cell for cell in some if cell["m_inf"] == cell["m_ft"]):
        x = list(colours).index(cell["m_ft"]) + gap * (cell["pretraining"] == "Pause")
        axis.bar(x, cell["mean"], 0.9, yerr=cell["std"], capsize=3, color=colours[cell["m_ft"]], edgecolor="black",
                 linewidth=0.6, label=f"{variant_of(cell).finetuning} finetuning")  # fmt: skip
        if cell["paper"]:
            axis.errorbar(x + 0.25, *cell["paper"], fmt="D", mfc="none", color="tab:red", capsize=2, label="[G], 1B")
    axis.set_xticks([middle, middle + gap], ["standard pretraining", "pause pretraining"])
    axis.tick_params(axis="x", length=0)


def lines(axis, some: list[dict], colours: dict) -> None:
    """The metric against M_inf, a line a variant: dashed after standard pretraining; StdFT is level, at no pauses."""
    for variant in sorted({variant_of(cell) for cell in some}, key=lambda v: (v.pretraining == "Pause", v.pauses)):
        points = sorted((c["m_inf"], c["mean"], c["std"] or 0) for c in some if variant_of(c) == variant)
        style = {} if variant.pretraining == "Pause" else {"linestyle": "--", "mfc": "white"}
        style |= {"color": colours[variant.pauses], "label": str(variant)}
        marker = "os^Dv"[list(colours).index(variant.pauses) % 5]
        if not variant.pauses:
            axis.axhline(points[0][1], linestyle=style.get("linestyle"), color=style["color"], linewidth=1.2)
        axis.errorbar(*zip(*points), marker=marker, markersize=5, capsize=3, elinewidth=0.8, **style)
    axis.set_xticks(sorted({cell["m_inf"] for cell in some}))
    axis.set_xlabel("M_inf, pauses after the prompt (tokens)")


def report(jobs: list[Job], failed: dict[str, str], ticker: Ticker) -> None:
    """Show and write everything that is there."""
    settings, out_dir, found = jobs[0].settings, Path(jobs[0].settings.out_dir), cells(jobs)
    header, *rows = table(jobs, found)
    shown = Table(*header)
    for i, row in enumerate(rows):
        shown.add_row(*map(Text, row), style="dim" if i % 2 else "", end_section=bool(i % 2))
    ticker.show(shown)
    seeds = f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''} of finetuning"
    note = f"Mean ± sample standard deviation over {seeds}, M_inf = M_ft. {SOURCE}"
    ticker.say(note)
    text = "".join(f"| {' | '.join(row)} |\n" for row in (header, len(header) * ["---"], *rows))
    replace_file(out_dir / "table.md", f"{text}\n{note}\n")
    written = {"settings": asdict(settings), "versions": versions(), "unit": "%", "cells": found, "failed": failed}
    write_json(out_dir / "results.json", written)
    title = f"{seeds}; error bars: ± sample standard deviation"
    if found:
        plot(found, out_dir / "variants.png", title, bars)
    if any(cell["m_inf"] != cell["m_ft"] for cell in found):
        plot(found, out_dir / "inference.png", title, lines)
    ticker.say(f"written: {out_dir} (table.md, results.json and figures)")


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def main() -> None:
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(each, interrupted)
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/four_variants.py", __doc__)
    devices, jobs = devices_of(settings), checked(settings)
    with open(Path(settings.out_dir, "lock"), "w") as lock:  # jobs hold it too: no other grid meets a live one
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another grid, or a job that one left behind, works in {settings.out_dir}: wait for it, "
                            f"or choose another --out_dir") from None  # fmt: skip
        todo = [job for job in jobs if job.command()]
        with Ticker(len(todo), enabled=True) as ticker:
            ticker.say(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them done already; {len(devices)} at a time")
            failed = run(todo, devices, ticker, lock.fileno())
            report(jobs, failed, ticker)
    if failed:
        named = "; ".join(f"{job}: {reason}" for job, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed, and the same command tries them again: {named}")


if __name__ == "__main__":
    errors.run(main)
