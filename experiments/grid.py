"""A grid of finetunings, each a train.py of its own and then an evaluate.py, for four_variants.py and dit_table.py.

    out_dir/table.md, results.json        mean ± sample standard deviation over seeds; every seed's values
    out_dir/gsm8k/<variant>/seed0/        log.txt, the run, its evaluation

On several GPUs every GPU has a job. What is done is not done again, and what broke off goes on with the same command.
Table and results are of what is asked for. A job that fails is named, and the others go on.
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

import torch
from rich.table import Table
from rich.text import Text

from nanopause import cli, errors, hub, metrics
from nanopause.config import load_config
from nanopause.errors import UserError
from nanopause.evaluation import fingerprint, panels, versions, words, write_json
from nanopause.files import replace_file
from nanopause.progress import Ticker
from nanopause.tasks import get_task, load

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    tasks: str = ""
    """With commas: gsm8k, squad, coqa, csqa, piqa, hellaswag, lambada, webq, nq, aqua, mbpp."""
    seeds: int = 5
    """Seeds 0, 1, … of finetuning, as many as this."""
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
    allow_code_execution: bool = False
    """Run the programs that a model writes for mbpp, each in a sandbox of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda: a job on each GPU. cpu: one at a time. auto: GPUs where there are any."""
    keep: bool = True
    """Keep a job's checkpoints after its evaluation: up to three, of 12 bytes a parameter each."""
    out_dir: str = ""
    """Folder of everything."""


@dataclass(frozen=True, eq=False)
class Job:
    """A finetuning and its evaluation. What of it is done is read off its folder.

    variant: what is compared; its text names a folder. init_from: the model that is finetuned. arguments: of train.py
    besides; None: the model is evaluated as it is. pauses: the numbers M_inf to evaluate with, finetuning's first; none
    given: as many as prompts had in finetuning."""

    settings: Settings
    task: str
    variant: NamedTuple
    seed: int
    init_from: str
    arguments: tuple[str, ...] | None
    pauses: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.task} {self.variant} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.settings.out_dir, self.task, str(self.variant), f"seed{self.seed}")

    def train_arguments(self) -> list[str]:
        return [*shlex.split(self.settings.train), *self.arguments, f"--init_from={self.init_from}",
                f"--seed={self.seed}", f"--out_dir={self.folder / 'run'}", "--resume", *self._common()]  # fmt: skip

    def _common(self) -> list[str]:
        s = self.settings
        return [f"--device={s.device}"] + ([f"--data_dir={s.data_dir}"] if s.data_dir else [])

    def _results(self) -> Path:
        limit = "" if self.settings.limit is None else f"_{self.settings.limit}"
        return self.folder / f"evaluation_{self.settings.checkpoint}{limit}"

    def evaluated(self) -> dict:
        """evaluate.py's results.json; {} where it is not there yet."""
        file = self._results() / "results.json"
        return loads(file.read_text()) if file.exists() else {}

    def scores(self) -> dict[int, dict]:
        """The lines of results.json by M_inf, as far as they are there."""
        rows = {row["pauses"]: row for row in self.evaluated().get("results", [])}
        return {m: rows[m] for m in self.pauses if m in rows} if self.pauses else rows

    def val_loss(self) -> float | None:
        """Held-out loss of the checkpoint that was evaluated, nats a token of a target; None where nothing is
        finetuned."""
        step = self.evaluated()["settings"]["step"]
        losses = {row["step"]: row.get("val_loss") for row in metrics.read(self.folder / "run" / "metrics.jsonl")}
        return losses.get(step)

    def command(self) -> list[str] | None:
        """What there is to do next; None: the job is done."""
        if (scores := self.scores()) and set(self.pauses) <= scores.keys():
            return None
        s, model = self.settings, self.init_from
        if self.arguments is not None:
            arguments, run = self.train_arguments(), self.folder / "run"
            last = f"step_{load_config(arguments).max_steps:08d}"
            if not (run / "latest").exists() or (run / "latest").read_text() != last:
                return [sys.executable, str(ROOT / "train.py"), *arguments]
            model = str(run / s.checkpoint)
        limit = [] if s.limit is None else [f"--limit={s.limit}"]
        return [sys.executable, str(ROOT / "evaluate.py"), f"--out_dir={model}", f"--tasks={self.task}",
                f"--pauses={','.join(map(str, self.pauses))}", f"--results={self._results()}", *limit,
                f"--batch_size={s.eval_batch_size}", f"--allow_code_execution={s.allow_code_execution}",
                *self._common()]  # fmt: skip

    def discard(self) -> None:
        """Delete the checkpoints."""
        for name in ("latest", "best"):
            (self.folder / "run" / name).unlink(missing_ok=True)
        for folder in (self.folder / "run").glob("step_*"):
            shutil.rmtree(folder)


# What can be wrong, before any job


def check(settings: Settings) -> list[str]:
    """The tasks, after they and what every grid has are found to be as they should. Raises UserError."""
    tasks = words(settings.tasks)
    if not tasks:
        raise UserError("no task: name some by --tasks=gsm8k,squad")
    errors.check("seeds", settings.seeds, 1, 10_000)
    errors.check("eval_batch_size", settings.eval_batch_size, 1, 2**20)
    if settings.limit is not None:
        errors.check("limit", settings.limit, 1, 2**62)
    try:
        shlex.split(settings.train)
    except ValueError as error:
        raise UserError(f"--train={settings.train} cannot be split into arguments: {error}") from None
    for name in tasks:
        task = get_task(name).permitted(settings.allow_code_execution)
        for split in ("train", "validation", "test"):
            load(task, split, settings.data_dir or None, 1)
    return tasks


def check_model(key: str, source: str, jobs: list[Job]) -> tuple[str, dict]:
    """The fingerprint and the checkpoint.json, if any, of the model that --key names, to which the settings of these
    jobs are found to fit. Raises UserError."""
    if not source:
        raise UserError(f"no --{key}: name the folder of a run, or whatever else init_from of train.py takes")
    try:
        model, tokenizer, state = hub.load(source)
    except UserError as error:
        raise UserError(f"--{key}: {error}") from None
    for job in jobs:
        if job.arguments is not None:
            load_config(job.train_arguments()).shaped(model.config, tokenizer)
    return fingerprint(model), state


def devices_of(settings: Settings) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for the jobs that run at the same time."""
    count = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if settings.device == "cuda" and not count:
        raise UserError("--device=cuda: there is no GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[:count] or [""]


# The jobs


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
                row = next(iter(job.scores().values()))
                (metric, figure), *_ = row["metrics"].items()
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


def spread(values: dict[int, float], n_seeds: int) -> dict:
    """By seed, of which there are to be n_seeds, with their mean and sample standard deviation."""
    mine = list(values.values())
    std = statistics.stdev(mine) if len(mine) > 1 else None
    return {"mean": statistics.fmean(mine), "std": std, "values": values, "n_seeds": n_seeds}


def cells(jobs: list[Job]) -> list[dict]:
    """For every task, variant (its fields) and M_inf: the primary metric in %, and val_loss, the held-out loss in nats
    a token, None without finetuning."""
    found = {}
    for job in jobs:
        for m_inf, row in job.scores().items():
            found.setdefault((job.task, job.variant, m_inf), []).append((job, row))
    made = []
    for (task, variant, m_inf), those in found.items():
        (metric, *_), n = those[0][1]["metrics"], those[0][1]["n"]
        n_seeds = sum((job.task, job.variant) == (task, variant) for job in jobs)
        losses = {job.seed: loss for job, _ in those if (loss := job.val_loss()) is not None}
        cell = {"task": task, "metric": metric, "n": n, **variant._asdict(), "m_inf": m_inf}
        cell |= spread({job.seed: 100 * row["metrics"][metric]["value"] for job, row in those}, n_seeds)
        made.append(cell | {"val_loss": spread(losses, n_seeds) if losses else None})
    return made


def said(figures: dict | None, digits: int = 1) -> str:
    """mean ± standard deviation, and how many seeds there are where some are not."""
    if figures is None:
        return "–"
    std = "" if figures["std"] is None else f" ± {figures['std']:.{digits}f}"
    n, n_seeds = len(figures["values"]), figures["n_seeds"]
    return f"{figures['mean']:.{digits}f}{std}" + f" ({n} of {n_seeds})" * (n < n_seeds)


def plot(found: list[dict], file: Path, title: str, draw: Callable, span: float = 1) -> None:
    """A panel a task, in which draw(axis, its cells) draws, at least `span` high, and one legend."""
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
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom, max(top, bottom + span))  # where all values are the same there would be no scale
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def seeds_of(jobs: list[Job]) -> str:
    n = jobs[0].settings.seeds
    return f"{n} seed{'s' * (n > 1)} of finetuning"


def spread_of(jobs: list[Job]) -> str:
    """What the values of a table are. One seed has no standard deviation."""
    return ("Mean ± sample standard deviation over " if jobs[0].settings.seeds > 1 else "") + seeds_of(jobs)


def report(
    jobs: list[Job], found: list[dict], failed: dict[str, str], header: list[str], groups: list[list[list[str]]],
    note: str, ticker: Ticker,
) -> None:  # fmt: skip
    """Show the table, a group of rows a task, in which those of a paper begin with a bracket, and write it and the
    cells."""
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


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def main(kind: type[Settings], prog: str, about: str, checked: Callable, report: Callable) -> None:
    """A script: checked(settings) gives the jobs, report(jobs, failed, ticker) shows and writes what came of them."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(each, interrupted)
    settings = cli.parse(kind, sys.argv[1:], prog, about)
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
            ticker.say(f"written: {settings.out_dir} (table.md, results.json and figures)")
    if failed:
        named = "; ".join(f"{job}: {reason}" for job, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed, and the same command tries them again: {named}")
