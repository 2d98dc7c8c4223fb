"""Grids of finetunings, run by submitit, for four_variants.py and dit_table.py. A job is in grid_job.py.

    pip install -e '.[experiments]'
    python experiments/four_variants.py …                             # on this machine: one job per GPU at a time
    python experiments/four_variants.py … --slurm_partition=NAME      # on a Slurm cluster: every job with one GPU

    out_dir/table.md, results.json        mean ± sample standard deviation over seeds; every seed's values
    out_dir/gsm8k/<variant>/seed0/        log.txt, the run, its evaluation
    out_dir/submitit/<start>/             files of submitit: submissions and their own logs

With Slurm, start the grid on a login node, with --out_dir on a file system that all nodes share. Ctrl-C and SIGTERM
stop the jobs; train.py saves first. The same command continues: finished jobs are not repeated. A job that fails is
named with its log, and the others go on. One out_dir is for one grid at a time.
"""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from experiments import grid_job
from experiments.grid_job import Job, Settings, run_commands
from nanopause import cli, errors
from nanopause.errors import UserError
from nanopause.progress import Ticker


def slots(settings: Settings) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of the jobs that run at the same time; None: Slurm sets it. Raises UserError."""
    if settings.slurm_partition:
        return 1000 * [None]  # Slurm has its own queue
    count = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if settings.device == "cuda" and not count:
        raise UserError("--device=cuda: there is no GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[:count] or [""]


def executor_of(settings: Settings):
    """submitit's executor. Raises UserError where it or Slurm is not installed."""
    submitit, on_slurm = errors.needs("submitit", "experiments"), bool(settings.slurm_partition)
    errors.needs("cloudpickle", "experiments").register_pickle_by_value(grid_job)
    folder = Path(settings.out_dir, "submitit", time.strftime("%Y-%m-%d_%H-%M-%S"))
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm" if on_slurm else "local")
    except RuntimeError:
        raise UserError(f"--slurm_partition={settings.slurm_partition}: there is no srun on this machine, start the "
                        f"grid on a login node of the cluster") from None  # fmt: skip
    # On this machine a time limit would only be in the way: a year.
    executor.update_parameters(
        name="nanopause", timeout_min=60 * (settings.slurm_hours if on_slurm else 24 * 365),
        gpus_per_node=None if settings.device == "cpu" else 1, slurm_partition=settings.slurm_partition or None,
    )  # fmt: skip
    return executor


def submit(executor, job: Job, gpu: str | None):
    """Submit a job, which inherits that SIGINT is blocked: Ctrl-C in a terminal reaches all its processes, and is meant
    for the grid alone."""
    job.folder.mkdir(parents=True, exist_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(run_commands, job.commands(), job.log, gpu)
    except RuntimeError as error:
        raise UserError(f"{job} cannot be submitted: {str(error).strip().splitlines()[-1]}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def failure(job: Job, submitted) -> str:
    """Why a job that has ended is not done; "" where it is."""
    if not job.commands():
        return ""
    try:
        return f"{submitted.result() or 'was stopped'} ({job.log})"
    except RuntimeError:  # of submitit, where the job's own process was killed, for example
        return f"its process ended early ({submitted.paths.stderr})"


def stop_all(executor, submitted: list) -> None:
    """End the jobs, and wait until train.py has saved. A second Ctrl-C does not wait."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if executor.cluster == "slurm":  # it sends SIGTERM, and SIGKILL later
        for each in submitted:
            each.cancel(check=False)
        return
    # cancel() of local jobs kills after one second, which can be too early for a save.
    while submitted := [each for each in submitted if not each.done()]:
        for each in submitted:
            os.kill(int(each.job_id), signal.SIGTERM)
        time.sleep(0.5)


def run(jobs: list[Job], gpus: list[str | None], ticker: Ticker) -> dict[str, str]:
    """Run the jobs, one per entry of gpus at a time. Returns those that failed and why."""
    executor, stop = executor_of(jobs[0].settings), []
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: stop.append(True))
    todo, free, running, failed = deque(jobs), list(gpus), {}, {}
    while (todo or running) and not stop:
        while todo and free and not stop:
            job, gpu = todo.popleft(), free.pop()
            ticker.say(f"{job}: starts" + (f" on GPU {gpu}" if gpu else ""))
            running[job] = submit(executor, job, gpu), gpu, time.perf_counter()
        for job in [job for job, (submitted, *_) in running.items() if submitted.done()]:
            submitted, gpu, start = running.pop(job)
            free.append(gpu)
            seconds = f"after {time.perf_counter() - start:,.0f} s"
            if reason := failure(job, submitted):
                failed[str(job)] = reason
                ticker.say(f"{job}: failed {seconds}: {reason}")
                continue
            ticker.say(f"{job}: done {seconds}, {job.score()}")
            if not job.settings.keep:
                job.discard()
        names = [str(job) for job in running]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        ticker.step(len(jobs) - len(todo) - len(running), ", ".join(names[:3]) + more, False)
        time.sleep(0.2)
    if stop:
        ticker.say("stopping: train.py saves first; a second Ctrl-C does not wait")
        stop_all(executor, [submitted for submitted, *_ in running.values()])
        raise KeyboardInterrupt
    return failed


def main(kind: type[Settings], prog: str, about: str, checked: Callable, report: Callable) -> None:
    """A script: checked(settings) gives the jobs, report(jobs, failed, ticker) shows and writes their results."""
    settings = cli.parse(kind, sys.argv[1:], prog, about)
    gpus, jobs = slots(settings), checked(settings)
    todo = [job for job in jobs if job.commands()]
    with Ticker(len(todo), enabled=True) as ticker:
        n = min(len(gpus), len(todo))
        ticker.say(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them done already" + f"; {n} at a time" * bool(todo))
        failed = run(todo, gpus, ticker) if todo else {}
        report(jobs, failed, ticker)
        ticker.say(f"written: {settings.out_dir} (table.md, results.json and figures)")
    if failed:
        named = "; ".join(f"{job}: {reason}" for job, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed, and the same command tries them again: {named}")
