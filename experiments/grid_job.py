"""One job of a grid: a finetuning by train.py, then its evaluation by evaluate.py. Its folder shows what is done."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from nanopause import errors, hub, metrics
from nanopause.config import load_config
from nanopause.errors import UserError
from nanopause.evaluation import fingerprint, words
from nanopause.tasks import get_task, load

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    """What all jobs of a grid share."""

    tasks: str = ""
    """With commas: gsm8k, squad, coqa, csqa, piqa, hellaswag, lambada, webq, nq, aqua, mbpp."""
    seeds: int = 5
    """Seeds 0, 1, … of finetuning, as many as this."""
    train: str = ""
    """More arguments of train.py, as one text: --train="--max_steps=500 --batch_size=8"."""
    checkpoint: Literal["best", "latest"] = "best"
    """Which checkpoint of a run is evaluated: the one with the lowest validation loss, or the last."""
    eval_batch_size: int = 8
    """Sequences at a time in an evaluation."""
    limit: int | None = None
    """Evaluate on only the first so many examples of a task. None: all."""
    data_dir: str = ""
    """Folder of the tasks' files, such as gsm8k_train.jsonl.gz. Empty: the hub."""
    allow_code_execution: bool = False
    """Run the programs that a model writes for mbpp, each in a sandbox of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda: one job per GPU at a time. cpu: one job at a time. auto: GPUs where there are any."""
    slurm_partition: str = ""
    """Submit every job to this partition of a Slurm cluster, with one GPU. Empty: processes on this machine."""
    slurm_hours: int = 24
    """Time limit of a Slurm job. train.py saves before it, and the same command continues the job."""
    keep: bool = True
    """Keep a job's checkpoints after its evaluation: up to three, of 12 bytes a parameter each."""
    out_dir: str = ""
    """Folder of everything."""


@dataclass(frozen=True, eq=False)
class Job:
    """variant: what is compared; its text names a folder. init_from: the model that is finetuned. arguments: more
    arguments of train.py; None: the model is evaluated without finetuning. pauses: the numbers M_inf of the evaluation,
    finetuning's first; empty: as many as prompts had in finetuning."""

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

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def train_arguments(self) -> list[str]:
        return [*shlex.split(self.settings.train), *self.arguments, f"--init_from={self.init_from}",
                f"--seed={self.seed}", f"--out_dir={self.folder / 'run'}", "--resume", *self._common()]  # fmt: skip

    def _common(self) -> list[str]:
        s = self.settings
        return [f"--device={s.device}"] + ([f"--data_dir={s.data_dir}"] if s.data_dir else [])

    def _results(self) -> Path:
        limit = "" if self.settings.limit is None else f"_{self.settings.limit}"
        return self.folder / f"evaluation_{self.settings.checkpoint}{limit}" / "results.json"

    def evaluated(self) -> dict:
        """results.json of evaluate.py; {} before the evaluation."""
        return json.loads(self._results().read_text()) if self._results().exists() else {}

    def scores(self) -> dict[int, dict]:
        """The evaluated rows of results.json by M_inf."""
        rows = {row["pauses"]: row for row in self.evaluated().get("results", [])}
        return {m: rows[m] for m in self.pauses if m in rows} if self.pauses else rows

    def score(self) -> str:
        """The primary metric at the first M_inf, for a line of progress."""
        (metric, figure), *_ = next(iter(self.scores().values()))["metrics"].items()
        return f"{metric} {100 * figure['value']:.1f} %"

    def val_loss(self) -> float | None:
        """Validation loss of the evaluated checkpoint, nats per target token; None without finetuning."""
        step = self.evaluated()["settings"]["step"]
        losses = {row["step"]: row.get("val_loss") for row in metrics.read(self.folder / "run" / "metrics.jsonl")}
        return losses.get(step)

    def commands(self) -> list[tuple[list[str], Path]]:
        """The commands that are left to run, each with the file that it writes last. Empty: the job is done."""
        if (scores := self.scores()) and set(self.pauses) <= scores.keys():
            return []
        s, run, model, commands = self.settings, self.folder / "run", self.init_from, []
        if self.arguments is not None:
            model = str(run / s.checkpoint)
            if not ((run / "latest").exists() and (run / "loss.png").exists()):
                train = [sys.executable, str(ROOT / "train.py"), *self.train_arguments()]
                commands.append((train, run / "loss.png"))
        evaluate = [sys.executable, str(ROOT / "evaluate.py"), f"--out_dir={model}", f"--tasks={self.task}",
                    f"--pauses={','.join(map(str, self.pauses))}", f"--results={self._results().parent}",
                    *([] if s.limit is None else [f"--limit={s.limit}"]), f"--batch_size={s.eval_batch_size}",
                    f"--allow_code_execution={s.allow_code_execution}", *self._common()]  # fmt: skip
        return [*commands, (evaluate, self._results())]

    def discard(self) -> None:
        """Delete the checkpoints."""
        for name in ("latest", "best"):
            (self.folder / "run" / name).unlink(missing_ok=True)
        for folder in (self.folder / "run").glob("step_*"):
            shutil.rmtree(folder)


def check(settings: Settings) -> list[str]:
    """The tasks. Raises UserError where one of these settings is wrong."""
    tasks = words(settings.tasks)
    if not tasks:
        raise UserError("no task: name some by --tasks=gsm8k,squad")
    errors.check("seeds", settings.seeds, 1, 10_000)
    errors.check("eval_batch_size", settings.eval_batch_size, 1, 2**20)
    errors.check("slurm_hours", settings.slurm_hours, 1, 10_000)
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
    """The fingerprint and the checkpoint.json, if any, of the model that --key names. Raises UserError, also where the
    settings of these jobs do not fit it."""
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


def run_commands(commands: list[tuple[list[str], Path]], log: Path, gpu: str | None) -> str:
    """Run commands one after the other, in a process that submitit starts. Returns why one failed; "" where none did.

    commands: each with the file that it writes last, as train.py exits with 0 also after SIGTERM. log: for their
    output. gpu: CUDA_VISIBLE_DEVICES; None: as it is. SIGTERM ends the running command, and train.py saves."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    for command, last_file in commands:
        with open(log, "a") as stream:
            stream.write(f"$ {shlex.join(command)}\n")
            stream.flush()
            # In a session of its own, signals of Slurm reach the command only through this process.
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                  env=environment, start_new_session=True) as process:  # fmt: skip
                try:
                    while process.poll() is None and not stop:
                        time.sleep(0.1)
                finally:  # submitit raises here at Slurm's time limit
                    process.terminate()
        if process.returncode < 0:
            return f"ended by {signal.Signals(-process.returncode).name}"
        if process.returncode:
            *_, output = log.read_text(errors="replace").rpartition("\n$ ")
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            return [*lines, *(line for line in lines if line.startswith("error:"))][-1]
        if stop or not last_file.exists():
            return "was stopped"
    return ""
