"""Small training runs in parallel processes: train.py's `train`, a measurement of the last checkpoint, and a table.

A run that has been measured is not repeated. An interrupted run continues from its newest checkpoint.
"""

import contextlib
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanopause import checkpoint, metrics  # noqa: E402
from nanopause.compare import NEUTRAL  # noqa: E402
from nanopause.config import Config, load_config  # noqa: E402
from nanopause.distributed import Processes  # noqa: E402
from nanopause.errors import UserError  # noqa: E402
from nanopause.evaluation import versions, write_json  # noqa: E402
from nanopause.files import replace_file  # noqa: E402
from nanopause.finetune import load_pairs  # noqa: E402
from nanopause.intervals import t_interval  # noqa: E402
from nanopause.model import GPT  # noqa: E402
from nanopause.prepare import n_cores  # noqa: E402
from nanopause.progress import Ticker  # noqa: E402
from nanopause.scripts.train import train  # noqa: E402
from nanopause.tokenizer import Tokenizer  # noqa: E402

SECONDS_BETWEEN_LINES = 20.0  # of progress, without a terminal


class Run(NamedTuple):
    """folder: out_dir of the run. arguments: other arguments of train.py. first: the run that it continues. edit:
    modifies the initial weights, a function of the model."""

    folder: Path
    arguments: tuple[str, ...]
    first: "Run | None" = None
    edit: Callable[[GPT], None] | None = None

    def init_from(self) -> Path | None:
        if self.first is None:
            return None
        return self.first.folder if self.edit is None else self.folder.with_name(f"{self.folder.name}_start")

    def all_arguments(self) -> list[str]:
        return [*self.arguments, *([f"--init_from={self.init_from()}"] if self.first else [])]

    def config(self) -> Config:
        return load_config([*self.all_arguments(), f"--out_dir={self.folder}", "--resume", "--compile=False"])

    def command(self) -> str:
        """The command that repeats the run in another folder."""
        return shlex.join(["python", "train.py", *(one.removeprefix(f"{ROOT}/") for one in self.all_arguments())])

    def write_start(self) -> None:
        """Save the edited weights of `first` as the initial weights of this run."""
        model, _, state = checkpoint.load(self.first.folder, torch.device("cpu"))
        self.edit(model)
        checkpoint.save(self.init_from(), state["step"], model, [], Config(**state["config"]), knows_pauses=True)

    def check(self) -> None:
        """Raises UserError if the folder has a run with other settings."""
        folders = sorted(self.folder.glob("step_" + 8 * "[0-9]"))
        if not folders:
            return
        then, now = checkpoint.read_state(folders[-1])["config"], asdict(self.config())
        for key in sorted(then.keys() - NEUTRAL - {"init_from", "vocab_size"} | {"seed"}):
            if then[key] != now.get(key):
                raise UserError(f"{self.folder} has a run with {key}={then[key]}, not {now.get(key)}: choose another "
                                f"--out_dir, or delete it")  # fmt: skip

    def is_trained(self) -> bool:
        latest = self.folder / "latest"
        return latest.exists() and latest.read_text() == f"step_{self.config().max_steps:08d}"

    def measured(self) -> dict:
        """The measurement, or {} if there is none yet."""
        file = self.folder / "measured.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def progress(self) -> str:
        rows = metrics.read(self.folder / "metrics.jsonl")
        return f"{'/'.join(self.folder.parts[-3:])}" + (f" step {rows[-1]['step']}" if rows else "")


Measure = Callable[[Path], dict]


def _start_worker(numbers, n_gpus: int) -> None:
    """One thread per process on a CPU, one GPU per process on GPUs. The parent handles interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if n_gpus:
        os.environ["LOCAL_RANK"] = str(numbers.get() % n_gpus)
    else:
        torch.set_num_threads(1)


def _work(run: Run, measure: Measure) -> None:
    """Train and measure. A run's output goes to a log file next to its folder, such as seed0.log."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run.folder}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if not run.is_trained():
                if run.edit:
                    run.write_start()
                train(run.config())
            if run.is_trained():  # train also returns when SIGTERM stops it
                write_json(run.folder / "measured.json", measure(run.folder))
        except Exception:
            traceback.print_exc()
            raise


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def n_workers() -> int:
    """Number of processes: one per core, or four per GPU, as a small model does not saturate a GPU."""
    return 4 * torch.cuda.device_count() or n_cores()


def train_all(runs: Sequence[Run], measure: Measure) -> None:
    """Train and measure every unfinished run, and show the progress.

    Raises UserError that names the failed runs, after all others are finished."""
    signal.signal(signal.SIGTERM, _interrupt)
    for run in runs:
        run.check()
    todo, failed = [run for run in runs if not run.measured()], []
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for i in range(n_workers()):
        numbers.put(i)
    started: dict[Future, Run] = {}
    with (
        Ticker(len(runs), enabled=True) as ticker,
        ProcessPoolExecutor(n_workers(), context, _start_worker, (numbers, torch.cuda.device_count())) as pool,
    ):
        shown, n_done = 0.0, len(runs) - len(todo)
        try:
            while todo or started:
                ready = [run for run in todo if run.first is None or run.first.measured()]
                for run in ready[: n_workers() - len(started)]:
                    todo.remove(run)
                    started[pool.submit(_work, run, measure)] = run
                if not started:  # the remaining runs depend on failed ones
                    break
                ended, _ = wait(started, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ended:
                    run, n_done = started.pop(future), n_done + 1
                    if isinstance(error := future.exception(), BrokenProcessPool):
                        raise UserError("a process was killed, perhaps for lack of memory: start the command again")
                    if error:
                        failed.append(f"{run.folder}: {error} ({run.folder}.log)")
                show = time.monotonic() - shown > SECONDS_BETWEEN_LINES
                shown = time.monotonic() if show else shown
                ticker.step(n_done, f"{n_done} of {len(runs)} runs; "
                            + ", ".join(run.progress() for run in started.values()), show)  # fmt: skip
        except KeyboardInterrupt:  # SIGTERM makes each worker save its run and exit
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    if unfinished := [run for run in runs if not run.measured()]:
        raise UserError(f"{len(unfinished)} of {len(runs)} runs are not finished, the same command continues "
                        f"them: {'; '.join(failed)}")  # fmt: skip


# Measurements


def measurement(folder: Path) -> tuple[GPT, Tokenizer, Config, dict]:
    """Model, tokenizer and config of a run's last checkpoint, and the entries common to all measurements."""
    model, tokenizer, state = checkpoint.load(folder, Processes("auto").device)
    config = Config(**state["config"])
    n_parameters = sum(p.numel() for p in model.parameters())
    return model, tokenizer, config, {
        "parameters": n_parameters, "steps": state["step"], "batch_size": config.batch_size
    }  # fmt: skip


@torch.no_grad()
def accuracy(config: Config, model: GPT, tokenizer: Tokenizer, pauses: int) -> float:
    """Share of a generated task's test texts whose answer has the highest logit of all answers. The input is the text,
    this number of pauses, and the space before the answer (END of London & Kanade 2025). All texts have one length."""
    pairs, _ = load_pairs(replace(config, pauses=pauses, hints=""), "test", tokenizer)
    tokens = torch.from_numpy(np.stack([pair.tokens for pair in pairs])).to(model.head.weight.device)
    n_prompt = pairs[0].n_prefix + 1
    if tokenizer.decode(tokens[0, n_prompt - 1 :][:1].tolist()) != " ":
        raise UserError(f"the answers of {config.task} do not begin with a separate space token: use --tokenizer=bytes")
    answers = tokens[:, n_prompt].unique()
    logits = torch.cat([model.head(model.hidden(some)[:, -1]) for some in tokens[:, :n_prompt].split(250)])
    return (answers[logits[:, answers].argmax(1)] == tokens[:, n_prompt]).double().mean().item()


# The table


def over_seeds(values: Sequence[float], is_share: bool = False) -> dict:
    """The values, one per seed, their mean, and the 95 % interval of the mean (low, high; None for one seed or equal
    values). is_share: values lie in [0, 1], and the interval is clipped to [0, 1]."""
    low, high = t_interval(values) or (None, None)
    if is_share and low is not None:
        low, high = max(0.0, low), min(1.0, high)
    return {"values": list(values), "mean": statistics.fmean(values), "low": low, "high": high}


def shown(figures: dict, digits: int, sign: str = "") -> str:
    """Mean and interval of over_seeds as text."""
    text = f"{figures['mean']:{sign}.{digits}f}"
    if figures["low"] is None:
        return text
    return f"{text} [{figures['low']:{sign}.{digits}f}, {figures['high']:{sign}.{digits}f}]"


def report(folder: Path, name: str, rows: list[list[str]], note: str, settings: dict, arms: list[dict]) -> None:
    """Print the table and write name.md and name.json. rows: the header first."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    replace_file(folder / f"{name}.md", "".join(f"| {' | '.join(row)} |\n" for row in lines) + f"\n{note}\n")
    write_json(folder / f"{name}.json", {"settings": settings, "versions": versions(), "arms": arms})
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    with Ticker(0, enabled=True) as ticker:
        ticker.show(table)
        ticker.say(f"{note}\nwritten: {folder} ({name}.md, {name}.json)")
