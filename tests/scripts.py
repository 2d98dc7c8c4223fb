"""Runs scripts of the root in processes of their own, forked from one that has imported torch and the rest already,
which takes longer than most of these runs."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(
    ["nanopause.distributed", "nanopause.engine", "nanopause.finetune", "nanopause.hub", "nanopause.prepare",
     "matplotlib.pyplot", "torch._dynamo", "torch.nn.parallel"]
)  # fmt: skip


def _main(args: list[str], folder: Path, stdout: Connection, stderr: Connection) -> None:
    os.chdir(folder)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close(), stderr.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    sys.path[0] = str(ROOT)
    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        runpy.run_path(str(ROOT / args[0]), run_name="__main__")


def start(*args: str, folder: Path = ROOT) -> ForkServerProcess:
    """A started process with `stdout` and `stderr` to read. args: as after `python`."""
    (stdout, child_stdout), (stderr, child_stderr) = (forked.Pipe(duplex=False) for _ in range(2))
    process = forked.Process(target=_main, args=(list(args), folder, child_stdout, child_stderr))
    process.start()
    child_stdout.close(), child_stderr.close()
    process.stdout, process.stderr = (open(os.dup(end.fileno())) for end in (stdout, stderr))
    return process


def run(*args: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """What subprocess.run(["python", *args], cwd=folder, capture_output=True, text=True) returns."""
    process = start(*args, folder=folder)
    with process.stdout, process.stderr, ThreadPoolExecutor(1) as pool:
        errors = pool.submit(process.stderr.read)
        output = process.stdout.read()
    process.join()
    return subprocess.CompletedProcess(list(args), process.exitcode, output, errors.result())
