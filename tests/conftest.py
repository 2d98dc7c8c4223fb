import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

# Operations this small take longer on several threads, which wait for each other, than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import scripts
import torch

if find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels is imported
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        """A kernel function's call of another. Triton patches its language anew for every one, which takes half of the
        time, and never undoes it: once is enough."""
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    patched = set()
    interpreter.InterpretedFunction.__call__ = call

    # Small tiles, for GPUs' registers, take the interpreter several times as long. test_resources compiles them.
    attention, loss = (import_module(f"nanopause.kernels.{name}") for name in ("attention", "linear_cross_entropy"))
    attention.ODD_WIDTHS.update({kernel: {256: attention.Tile(64, 64, 4, 2)} for kernel in attention.ODD_WIDTHS})
    # float32 at a width of 64 keeps its tiles: with others its rounding errors are at the tests' bound.
    for kernel, table in attention.FLOAT32.items():
        attention.FLOAT32[kernel] = {32: attention.Tile(64, 64, 4, 2), 64: table[64], 256: attention.Tile(64, 64, 4, 2)}
    loss.FLOAT32 = loss.ODD_WIDTHS = 3 * (loss.Tile(64, 64, 64, 4, 2),)

from experiments import grid as grids
from experiments import grid_job, runs
from nanopause.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=32", "--batch_size=4", "--eval_interval=1000",
        "--eval_blocks=8", "--device=cpu"]  # fmt: skip


def pytest_terminal_summary(terminalreporter):
    """What tests recorded to be seen, whichever process ran them."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            terminalreporter.section(name)
            terminalreporter.write_line(text)


@pytest.fixture
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that an element no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def tiny_documents():
    rng = random.Random(0)
    words = "a pause gives the model room to think before it has to say the next word of its answer".split()
    for _ in range(120):
        yield " ".join(rng.choices(words, k=rng.randint(5, 60)))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A prepared corpus of about 20,000 bytes in several shards: the folder above its tokenizer."""
    data_dir = tmp_path_factory.mktemp("data")
    for tokenizer in ("bytes", "gpt2"):
        prepare("tiny", ["words"], lambda _: tiny_documents(), data_dir, tokenizer, val_fraction=0.2,
                shard_tokens=4000, workers=1)  # fmt: skip
    return data_dir / "tiny"


@pytest.fixture
def train(tiny_corpus):
    """Runs train.py on the tiny corpus: train(out_dir, "--max_steps=2", …). launcher: the command that starts it, where
    it is not to be forked."""

    def run(out_dir, *args, launcher=(), check=True, **options):
        args = [*TINY, f"--dataset={tiny_corpus}", f"--out_dir={out_dir}", *args]
        if launcher:
            command = [*launcher, "train.py", *args]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
        else:
            ended = scripts.run("train.py", *args)
        assert not check or ended.returncode == 0, ended.stdout + ended.stderr
        return ended

    return run


class Forked:
    """A subprocess.Popen of a script, forked from a process that has imported torch."""

    started = []

    def __init__(self, command, stdout, **_):
        self.process, self.log, self.returncode = scripts.start(*command[1:]), stdout, None
        self.started.append(command)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.join()
        self.poll()

    def poll(self):
        if self.returncode is None and self.process.exitcode is not None:
            self.returncode = self.process.exitcode
            with self.process.stdout as output, self.process.stderr as errors:
                self.log.write(output.read() + errors.read())
        return self.returncode

    def terminate(self):
        if self.returncode is None:
            self.process.terminate()


class Inline:
    """A ProcessPoolExecutor or an executor of submitit that runs everything in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def experiment(monkeypatch, capsys, tmp_path):
    """Runs an experiment's script with its runs in this process: experiment(module, "--n=8") returns what it printed
    and the arms of the JSON of this name, by name."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", Inline)

    def experiment(script, *args, name="results"):
        monkeypatch.setattr(sys, "argv", [script.__name__, f"--out_dir={tmp_path}", *args])
        script.main()
        arms = json.loads((tmp_path / f"{name}.json").read_text())["arms"]
        return capsys.readouterr().out, arms

    yield experiment
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def grid(monkeypatch, capsys):
    """Runs a grid's script here, its commands forked, and returns what it printed and how many commands it started."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(grids, "executor_of", Inline)
    monkeypatch.setattr(grid_job, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=None, STDOUT=None))

    def grid(script, *args):
        monkeypatch.setattr(sys, "argv", [script.__name__, *args])
        Forked.started.clear()
        script.main()
        return capsys.readouterr().out, len(Forked.started)

    yield grid
    for each, handler in before.items():
        signal.signal(each, handler)
