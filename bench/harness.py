"""The shared part of all benches: interleaved timing, the comparison with a truth, and the JSON result.

candidate   a callable without arguments that returns its output tensors by name; ours has the name "ours"
baseline    another implementation of the same computation
shape       a dictionary that describes one measured case, such as {"N": 512, "C": 128}
row         one candidate on one shape: times in milliseconds, and what else was measured
"""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanopause import kernels
from nanopause.errors import UserError
from nanopause.files import replace_file
from nanopause.flops import cpu_name, peak_flops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OURS = "ours"
ALL = "all"  # the name of a missing entry that concerns every candidate
NO_TIME = "no time was left"

Shape = dict[str, int | float | str]
Candidate = Callable[[], dict[str, Tensor]]
Timer = Callable[[Candidate, int], float]  # (call, n) → mean seconds per call
Row = dict

# The largest error of ours in any entry, relative to the largest entry. Several bfloat16 roundings of 2⁻⁹ add up to
# about 0.01; a mask that is off by one key gives 0.15 or more. Baselines are allowed four times as much, because some
# sum in bfloat16 or skip small terms by design; each row records its error.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}


class WrongOutput(Exception):
    """The output of a candidate differs from the truth by more than the tolerance."""


def check(outputs: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> float:
    """The largest error of the outputs, relative to the largest entry of each tensor. Raises WrongOutput above the
    tolerance."""
    largest = 0.0
    for name, output in outputs.items():
        expected = truth[name]
        if output.shape != expected.shape:
            raise WrongOutput(f"{name} has shape {list(output.shape)} instead of {list(expected.shape)}")
        error = ((output.to(expected.dtype) - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:  # this order rejects NaN
            raise WrongOutput(f"{name} is off by {error:.2g} of its largest entry, more than {tolerance:.2g}")
        largest = max(largest, error)
    return largest


def forward_and_backward(function: Callable, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Candidate]:
    """Two candidates for function(*inputs) → out: "forward", without autograd, and "forward+backward", which also
    returns d<name> for each input, given the gradient `upstream` of the output."""
    constants = [x.detach() for x in inputs.values()]
    variables = [x.detach().requires_grad_() for x in inputs.values()]

    def forward():
        with torch.no_grad():
            return {"out": function(*constants)}

    def forward_backward():
        out = function(*variables)
        gradients = torch.autograd.grad(out, variables, upstream.to(out.dtype))
        return {"out": out.detach(), **{f"d{name}": gradient for name, gradient in zip(inputs, gradients)}}

    return {"forward": forward, "forward+backward": forward_backward}


def wall_clock(call: Candidate, n: int) -> float:
    """Seconds per call, the mean of n, with the host's work included."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = perf_counter()
    for _ in range(n):
        call()
    synchronize()
    return (perf_counter() - start) / n


def gpu_time(call: Candidate, n: int, flush: Tensor) -> float:
    """Seconds per call on the GPU, the mean of n, without the host's work. Writing `flush` evicts the inputs from the
    L2 cache before each call."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    # About 3 ms, in which the host queues the launches: Python's launch time is not part of a kernel's time.
    torch.cuda._sleep(6_000_000)
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / n / 1000


def time_interleaved(calls: dict[str, Candidate], timer: Timer, seconds: float) -> dict[str, list[float]]:
    """Seconds per call, one sample per candidate and round. Rounds interleave the candidates: A B C, A B C, …

    A sample is the mean of up to 10 calls, as many as take a millisecond. There are 5 to 25 rounds, which take about
    `seconds`; 3 if one round takes more than 20 seconds.
    """
    repeats, round_seconds = {}, 0.0
    for name, call in calls.items():
        timer(call, 1)  # warms up
        estimate = max(timer(call, 1), 1e-6)
        repeats[name] = min(max(round(1e-3 / estimate), 1), 10)
        round_seconds += repeats[name] * estimate
    rounds = 3 if round_seconds > 20 else min(max(int(seconds / round_seconds), 5), 25)
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timer(call, repeats[name]))
    return samples


def peak_extra_bytes(call: Candidate, device: torch.device) -> int:
    """The peak of the memory allocated during a call, above what was allocated before it, its outputs included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # On a CPU the profiler records every allocation and release of PyTorch's allocator in this thread.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs its start and stop
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    events = list(reversed(profile.profiler.kineto_results.experimental_event_tree()))
    while events:
        event = events.pop()
        events.extend(reversed(event.children))
        if event.tag == torch._C._profiler._EventType.Allocation:
            held += event.extra_fields.alloc_size
            peak = max(peak, held)
    return peak


class Baseline(NamedTuple):
    """Another implementation. make(problem) returns what the bench measures; an exception in it, or later in a call,
    lists the baseline as missing. package: the name whose version is recorded, or a file, of which the hash is."""

    name: str
    package: str | Path
    make: Callable

    @property
    def version(self) -> str:
        if isinstance(self.package, str):
            return metadata.version(self.package)
        return f"{self.package.name} {hashlib.sha256(self.package.read_bytes()).hexdigest()[:12]}"


@dataclass
class Options:
    """Options of every bench."""

    quick: bool = False  # fewer and smaller shapes, in at most 40 seconds and the last shape's time
    minutes: float = 10  # no shape is started later than this
    nanogpt: str = ""  # a checkout of github.com/karpathy/nanoGPT, a baseline of train and generate
    data_dir: str = ""  # the folder of gsm8k_train.jsonl for finetune, instead of the hub


class Bench:
    """One run of a bench: measures shapes, collects rows and missing entries, and writes the JSON."""

    def __init__(self, name: str, options: Options):
        self.name = name
        self.options = options
        self.rows: list[Row] = []
        self.missing: list[dict] = []
        self.failed: list[str] = []  # shapes that raised an error, with the reason
        self.stopped = ""  # why no further shape is measured
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.timer = wall_clock
        if self.device.type == "cuda":  # with a buffer larger than any L2 cache
            self.timer = partial(gpu_time, flush=torch.empty(256 << 20, dtype=torch.int8, device=self.device))
        self.versions = {OURS: kernels.choose(None, self.device)}
        self.header = {"bench": name, "quick": options.quick, "ours": self.versions[OURS]}
        self.header |= environment(self.device, self.dtype)
        self.seconds = 1 if options.quick else 2  # of each interleaved timing
        self.deadline = perf_counter() + (40 if options.quick else 60 * options.minutes)

    def run(self, module: ModuleType) -> None:
        """module.measure(bench, shape) for each of module.shapes(device_type, quick); then write and print the result.
        Raises UserError if a shape failed."""
        from bench import report  # here, because report imports this module

        for shape in module.shapes(self.device.type, self.options.quick):
            self.attempt(module.measure, shape)
        file = self.write()
        result = json.loads(file.read_text())
        print(f"{report.provenance(result)}\n\n{report.TABLES[self.name](result)}\n\nwritten: {file}")
        if self.failed:
            raise UserError(f"{len(self.failed)} shapes failed, and no earlier result is replaced: {self.failed[0]}")

    def attempt(self, measure: Callable, shape: Shape) -> None:
        """Call measure(bench, shape). A shape that fails, or has no time left, is listed as missing; rows are kept."""
        if perf_counter() > self.deadline:
            self.stopped = self.stopped or NO_TIME
        if self.stopped:
            self.add_missing(ALL, shape, self.stopped)
            return
        try:
            torch.compiler.reset()  # otherwise a function compiled for many shapes reaches the recompilation limit
            torch.cuda.empty_cache()
            measure(self, shape)
        except (Exception, KeyboardInterrupt) as error:
            why = reason(error)
            if isinstance(error, KeyboardInterrupt):
                self.stopped = why = "the bench was interrupted"
            elif not isinstance(error, UserError):
                traceback.print_exc()
            self.failed.append(f"{label(shape)}: {why}")
            self.add_missing(ALL, shape, why)

    def add_missing(self, name: str, shape: Shape, why: str, what: str | None = None) -> None:
        """List a candidate as missing for a shape; what: for one of the shape's measurements only."""
        self.missing.append({"name": name, "what": what, "shape": shape, "reason": why})

    def make_baselines(self, baselines: Iterable[Baseline], problem: object, shape: Shape) -> dict[str, Callable]:
        """make(problem) of each baseline, by name. Those that raise an error are listed as missing."""
        made = {}
        for baseline in baselines:
            try:
                function = baseline.make(problem)
                self.versions[baseline.name] = baseline.version
                made[baseline.name] = function
            except Exception as error:
                self.add_missing(baseline.name, shape, reason(error))
        return made

    def compare(
        self, what: str, shape: Shape, calls: dict[str, Candidate], truth: dict, flops: float, memory: bool = False
    ) -> list[Row]:
        """Check all candidates, then time the correct ones; add and return a row for each.

        truth: the expected outputs, in a wider dtype. flops: of one call. memory: whether to measure peak memory. A
        baseline with an error or a wrong output is listed as missing; for ours the exception is raised.
        """
        correct, facts = {}, {}
        for name, call in calls.items():
            tolerance = TOLERANCE[self.dtype] * (1 if name == OURS else 4)
            try:
                outputs = call()
                facts[name] = {"error": check(outputs, truth, tolerance)}
                facts[name]["result_bytes"] = sum(tensor.nbytes for tensor in outputs.values())
                del outputs  # frees memory before the peak is measured
                facts[name]["peak_extra_bytes"] = peak_extra_bytes(call, self.device) if memory else None
                correct[name] = call
            except Exception as error:
                if name == OURS:
                    raise
                self.add_missing(name, shape, reason(error), what)
        samples = time_interleaved(correct, self.timer, self.seconds)
        rows = [self.row(what, shape, name, samples[name], samples[OURS], **facts[name]) for name in samples]
        for row in rows:
            per_second = flops / row["p50_ms"] * 1e3
            row["tflops"] = per_second / 1e12
            row["percent_of_peak"] = 100 * per_second / self.header["peak_flops"]
        self.rows += rows
        times = ", ".join(f"{row['name']} {number(row['p50_ms'])}" for row in rows)
        print(f"{self.name}: {label(shape)} {what}, ms: {times}", file=sys.stderr)
        return rows

    def row(self, what: str, shape: Shape, name: str, seconds: list[float], base: list[float], **facts) -> Row:
        """A row of samples in seconds. ratio: the percentiles of seconds/base per round, so that a slow moment of the
        machine, which affects a whole round, cancels."""
        row = {"what": what, "shape": shape, "name": name, "version": self.versions[name], "samples": len(seconds)}
        for percent in (10, 50, 90):
            row[f"p{percent}_ms"] = 1e3 * float(np.percentile(seconds, percent))
        for key, percent in (("ratio_p10", 10), ("ratio", 50), ("ratio_p90", 90)):
            row[key] = float(np.percentile(np.divide(seconds, base), percent))
        return row | facts

    def write(self) -> Path:
        """Write the JSON and return its path. A quick or failed result has a name of its own and replaces no full one.
        Raises UserError if there are no rows."""
        if not self.rows:
            raise UserError(f"nothing was measured: {'; '.join(self.failed) or NO_TIME}")
        suffix = ".quick" * self.options.quick + ".failed" * bool(self.failed)
        file = RESULTS / device_folder(self.header) / f"{self.name}{suffix}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        result = self.header | {"rows": self.rows, "missing": self.missing}
        replace_file(file, json.dumps(result, indent=1) + "\n")
        return file


def environment(device: torch.device, dtype: torch.dtype) -> dict:
    """Device, versions, commit, date and command; None where there is no such thing."""
    status = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    peak, source = peak_flops(device, dtype)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m bench {shlex.join(sys.argv[1:])}",
        "peak_flops": peak,
        "peak_flops_source": source,
    }


def device_folder(header: dict) -> str:
    """The folder of a device's results: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3; a CPU has its threads too."""
    threads = f" {header['threads']} threads" if header["device"] == header["cpu"] else ""
    name = re.sub(r"\((r|tm)\)", "", (header["device"] + threads).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The output of a program; None if it does not exist or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def label(shape: Shape) -> str:
    return ", ".join(value if isinstance(value, str) else f"{key} {value:g}" for key, value in shape.items())


def number(x: float | None) -> str:
    """Three digits, without an exponent; a dash for None."""
    if x is None:
        return "–"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}"


def reason(error: BaseException) -> str:
    """The text of a UserError; the type and the first line of any other exception."""
    if isinstance(error, UserError):
        return str(error)
    line = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {shorten(line, 200, placeholder='…')}"
