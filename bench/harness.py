"""Timing side by side, and the results: what the benches share.

A *candidate* is a call without arguments that returns its tensors by name. All candidates do the same work; ours is
named "ours", and is measured like the others. A *shape* is a dictionary of names to numbers or words.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kernels
from nanopause.errors import UserError
from nanopause.files import replace_file
from nanopause.flops import peak_flops
from nanopause.hub import their_tensors, transformers_config
from nanopause.model import GPT

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OURS = "ours"
DASH = "–"

Shape = dict[str, int | float | str]
Candidate = Callable[[], dict[str, Tensor]]
Sample = Callable[[Candidate, int], float]
Row = dict

# Bytes per second between a GPU and its memory, by NVIDIA's data sheets. The whole name must match, as in
# nanopause.flops: a slice or another form of a GPU has another memory.
MEMORY_DATA_SHEETS = (
    (r"NVIDIA H200", 4.8e12),  # "NVIDIA H200 Tensor Core GPU", SXM: 4.8 TB/s
    (r"NVIDIA H100 80GB HBM3", 3.35e12),  # "NVIDIA H100 Tensor Core GPU", SXM: 3.35 TB/s
    (r"(NVIDIA )?A100-SXM4-80GB", 2.039e12),  # "NVIDIA A100 Tensor Core GPU", 80GB SXM: 2,039 GB/s
)

# The largest error that ours may have in any entry, over the largest entry. A handful of bfloat16's roundings of 2⁻⁹
# add up to about 0.01; a mask that is off by one key errs by 0.15 or more. Rivals may err more, as some sum in bfloat16
# or skip small terms by design: how much they do is in their rows.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
RIVALS_TOLERANCE = {dtype: 4 * tolerance for dtype, tolerance in TOLERANCE.items()}


# Blocks, for models with random weights.
GPT2 = dict(position="learned", norm="layer", qk_norm=False, mlp="gelu", tied=True, bias=True, zero_init=False)
LLAMA = dict(position="rope", norm="rms", qk_norm=False, mlp="swiglu", tied=True, bias=False, zero_init=False)

# Rivals that several benches have


def transformers_model(model: GPT) -> nn.Module:
    """transformers' model with the weights of ours, in their dtype and on their device. Raises UserError where it has
    none of this kind."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**transformers_config(model.config), bos_token_id=None, eos_token_id=None)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    theirs.loss_type = "ForCausalLM"  # which it takes anyway, with a warning
    theirs.load_state_dict(their_tensors(model), strict=False)  # the head is the embedding
    return theirs.to(model.head.weight)


def nanogpt(path: str, model: GPT) -> nn.Module:
    """The GPT of model.py in a checkout of nanoGPT, with the weights of ours, in their dtype and on their device.

    Raises UserError where there is no such file, and for another model than GPT-2's."""
    file = Path(path, "model.py")
    if not path or not file.exists():
        raise UserError(f"{file if path else 'no checkout'}: give --nanogpt=PATH to one of karpathy/nanoGPT")
    if model.config.norm != "layer":
        raise UserError("nanoGPT has GPT-2's model alone")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")
    with redirect_stdout(None):  # it tells how many parameters it has
        theirs = module.GPT(module.GPTConfig(**{name: getattr(model.config, name) for name in names}, dropout=0.0))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers has these the other way round
    tensors = {name: x.T if name.endswith(turned) else x for name, x in their_tensors(model).items()}
    theirs.load_state_dict(tensors, strict=False)  # the head is the embedding
    for module in theirs.modules():
        if isinstance(module, nn.GELU):  # it has the exact one, which is 4e-4 off GPT-2's in a gradient
            module.approximate = "tanh"
    return theirs.to(model.head.weight)


# Comparing


class Wrong(Exception):
    """A candidate that computes something else."""


def check(got: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> float:
    """The largest error of `got`, over the largest entry of its tensor; above the tolerance it is Wrong."""
    worst = 0.0
    for name, result in got.items():
        expected = truth[name]
        if result.shape != expected.shape:
            raise Wrong(f"{name} has shape {list(result.shape)} instead of {list(expected.shape)}")
        error = ((result.to(expected.dtype) - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:  # so that NaN is wrong
            raise Wrong(f"{name} is off by {error:.2g} of its largest entry, more than {tolerance:.2g}")
        worst = max(worst, error)
    return worst


def passes(function: Callable, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Candidate]:
    """The two passes of function(*inputs) → out: "forward", without autograd, and "forward+backward".

    The second returns d<name> of each input too, for the gradient `upstream` of the output.
    """
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


# Timing


def sampler(device: torch.device) -> Sample:
    """sample(call, n): the seconds of one call, the mean of n; on a GPU those of the device alone."""
    if device.type != "cuda":
        return wall_clock
    # Several times the L2 cache of any GPU: writing it evicts the inputs.
    return partial(_sample_cuda, flush=torch.empty(256 << 20, dtype=torch.int8, device=device))


def wall_clock(call: Candidate, n: int) -> float:
    """The same with the host's work in it, as a step of training has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(n):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (perf_counter() - start) / n


def _sample_cuda(call: Candidate, n: int, flush: Tensor) -> float:
    """Time on the device, every call with a cold cache; the mean evens out that events resolve only 0.5 μs."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    # Some 3 ms in which the host runs ahead: how fast Python launches is no property of a kernel. A call that waits
    # for the device waits before its start is recorded too, and then pays for its own launches as it does in use.
    torch.cuda._sleep(6_000_000)
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / n / 1000


def race(calls: dict[str, Candidate], sample: Sample, seconds: float) -> dict[str, list[float]]:
    """Seconds of a call, one sample a round and candidate. In a round each has its turn: A B C, A B C, …

    A sample is as many calls as fill a millisecond, 10 at most; there are 5 to 25 rounds, about `seconds` in all, but
    three of more than 20 seconds each, and two of more than five minutes; their first is what warms others up.
    """
    repeats, samples, round_seconds = {}, {}, 0.0
    for name, call in calls.items():
        estimate = sample(call, 1)  # warms up
        if estimate < 5:
            estimate = sample(call, 1)
        repeats[name], samples[name] = min(max(round(1e-3 / max(estimate, 1e-6)), 1), 10), [estimate]
        round_seconds += repeats[name] * estimate
    rounds = 2 if round_seconds <= 300 else 1
    if round_seconds <= 20:
        rounds = min(max(int(seconds / max(round_seconds, 1e-6)), 5), 25)
        samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(sample(call, repeats[name]))
    return samples


def peak_extra_bytes(call: Candidate, device: torch.device) -> int:
    """The most memory that was allocated during a call above what was before it, its results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # On a CPU the profiler hears of all that PyTorch's allocator gives this thread and takes back.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells when it starts and stops
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


# Results

NO_TIME, INTERRUPTED = "no time was left", "it was interrupted"


class Rival(NamedTuple):
    """make(problem) → what a bench's `passes` takes. It may raise, as may what it returns: then the rival is missing
    for this problem. package: whose version is recorded; of a file, which has none, the beginning of its SHA-256."""

    name: str
    package: str | Path
    make: Callable

    @property
    def version(self) -> str:
        if isinstance(self.package, str):
            return metadata.version(self.package)
        return f"{self.package.name} {hashlib.sha256(self.package.read_bytes()).hexdigest()[:12]}"


class Bench:
    """One run of a bench: attempts shapes, keeps rows and what is missing, writes the JSON, prints tables. minutes: no
    shape is begun after them; with 7 a bench ends well inside ten, and a quick one, which has 40 seconds, inside two.
    """

    def __init__(self, name: str, quick: bool, minutes: float = 7):
        self.name, self.quick, self.rows, self.missing, self.versions = name, quick, [], [], {}
        self.failed: list[str] = []  # shapes that could not be measured, and why
        self.gone: list[str] = []  # what the result that is replaced had more
        self.interrupted = False
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.sample = sampler(self.device)
        self.versions[OURS] = kernels.choose(None, self.device)
        self.header = {"bench": name, "quick": quick, "ours": self.versions[OURS]}
        self.header |= environment(self.device, self.dtype)
        self.seconds = 1 if quick else 2  # of a race
        self.begun = perf_counter()
        self.end = self.begun + (40 if quick else 60 * minutes)

    def attempt(self, measure: Callable, shape: Shape, *more) -> None:
        """measure(bench, shape, *more), if there is time; if not, or if it fails, the shape is listed as missing, and
        what was measured before is kept."""
        if self.interrupted or perf_counter() > self.end:
            return self.lack("all", shape, INTERRUPTED if self.interrupted else NO_TIME)
        try:
            torch.compiler.reset()  # a function that was compiled for too many shapes would not be compiled any more
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            measure(self, shape, *more)
        except UserError as error:
            self.fail(shape, str(error))
        except Exception as error:
            traceback.print_exc()
            self.fail(shape, first_line(error))
        except KeyboardInterrupt:
            self.interrupted = True
            self.fail(shape, INTERRUPTED)

    def fail(self, shape: Shape, reason: str) -> None:
        self.failed.append(f"{label(shape)}: {reason}")
        self.lack("all", shape, reason)

    def lack(self, name: str, shape: Shape, reason: str, what: str | None = None) -> None:
        """A rival is missing: for all passes over a shape or for one of them."""
        self.missing.append({"name": name, "what": what, "shape": shape, "reason": reason})

    def functions(self, rivals: Iterable[Rival], problem: object, shape: Shape) -> dict[str, Callable]:
        """What the rivals made for a problem, by name. Who cannot is missing, for whatever reason it gives."""
        made = {}
        for rival in rivals:
            try:
                function = rival.make(problem)
                self.versions[rival.name] = rival.version
                made[rival.name] = function
            except Exception as error:
                self.lack(rival.name, shape, str(error) if isinstance(error, UserError) else first_line(error))
        return made

    def compete(
        self,
        what: str,
        shape: Shape,
        calls: dict[str, Candidate],
        truth: dict[str, Tensor],
        *,
        flops: float | None = None,
        read_bytes: float | None = None,
        memory: bool = False,
    ) -> list[Row]:
        """Check and time candidates, ours among them; keep and return a row of each that is right.

        truth: what the calls return, in a wider dtype. flops, read_bytes: of one call, useful ones only; the percentage
        of the peak is that of FLOPs, or without them of the memory's speed. memory: whether its peak is measured, by a
        call more. A rival that fails or is wrong is missing; ours raises.
        """
        right, facts = {}, {}
        for name, call in calls.items():
            tolerance = (TOLERANCE if name == OURS else RIVALS_TOLERANCE)[self.dtype]
            try:
                got = call()
                facts[name] = {
                    "error": check(got, truth, tolerance),
                    "result_bytes": sum(tensor.nbytes for tensor in got.values()),
                }
                del got
                facts[name]["peak_extra_bytes"] = peak_extra_bytes(call, self.device) if memory else None
                right[name] = call
            except Exception as error:
                if name == OURS:
                    raise
                self.lack(name, shape, first_line(error), what)
        samples = race(right, self.sample, self.seconds)
        rows = []
        for name, seconds in samples.items():
            row = self.row(what, shape, name, seconds, samples[OURS], **facts[name])
            peak, p50 = self.header["peak_flops" if flops else "peak_bytes_per_second"], row["p50_ms"] / 1e3
            work = flops or read_bytes
            rows.append(row | {
                "tflops": flops and flops / p50 / 1e12, "gbps": read_bytes and read_bytes / p50 / 1e9,
                "percent_of_peak": peak and work and 100 * work / p50 / peak,
            })  # fmt: skip
        self.rows += rows
        line = ", ".join(f"{row['name']} {number(row['p50_ms'])}" for row in rows)
        print(f"{self.name}: {label(shape)} {what}, ms: {line}", file=sys.stderr)
        return rows

    def row(self, what: str, shape: Shape, name: str, seconds: list[float], base: list[float], **more) -> Row:
        """Of samples, in seconds, beside those that somebody else had in the same rounds: what slows a whole round down
        cancels out of its ratio. error, in `more`, is None where there was nothing to compare."""
        p10, p50, p90 = (1e3 * np.percentile(seconds, (10, 50, 90))).tolist()
        low, ratio, high = np.percentile(np.divide(seconds, base), (10, 50, 90)).tolist()
        return {"what": what, "shape": shape, "name": name, "version": self.versions[name], "samples": len(seconds),
                "p10_ms": p10, "p50_ms": p50, "p90_ms": p90, "ratio_p10": low, "ratio": ratio, "ratio_p90": high,
                **more}  # fmt: skip

    def write(self, **extra) -> None:
        """Write the JSON, with `extra` at its top level. One in which a shape failed lies beside an earlier result, as
        <name>.failed.json, and replaces none. Raises UserError, and writes nothing, if nothing was measured."""
        if not self.rows:
            raise UserError(f"nothing was measured: {'; '.join(self.failed) or 'there was no time'}")
        device, threads = self.header["device"], f" {self.header['threads']} threads"
        folder = RESULTS / slug(device + threads * (device == self.header["cpu"]))
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{self.name}{'.quick' * self.quick}{'.failed' * bool(self.failed)}.json"
        before = self.file.read_text() if self.file.exists() else ""
        seconds = round(perf_counter() - self.begun)
        result = self.header | {"seconds": seconds} | extra | {"rows": self.rows, "missing": self.missing}
        replace_file(self.file, json.dumps(result, indent=1) + "\n")
        try:
            here, there = ([f"{label(row['shape'])} {row['what']}, {row['name']}" for row in rows]
                           for rows in (self.rows, json.loads(before)["rows"]))  # fmt: skip
            self.gone = [line for line in there if line not in here]
        except (ValueError, KeyError, TypeError):
            pass  # there was none that can be read

    def finish(self) -> None:
        """Say what is missing and where the result lies. Raises UserError if a shape failed."""
        screen = console()
        errors: dict[str, float] = {}
        for row in self.rows:
            if row["error"] is not None:
                errors[row["name"]] = max(errors.get(row["name"], 0.0), row["error"])
        if errors:
            screen.print("largest errors: " + ", ".join(f"{name} {error:.1g}" for name, error in errors.items()))
        reasons: dict[str, list[str]] = {}
        for lack in self.missing:
            case = f"{label(lack['shape'])} {lack['what'] or ''}".strip()
            reasons.setdefault(f"{lack['name']}: {lack['reason']}", []).append(case)
        for reason, (case, *more) in reasons.items():
            rest = f" and {len(more)} more" if more else ""
            screen.print(f"missing: {reason} ({case}{rest})", style="dim", markup=False)
        if self.gone:
            screen.print(f"{len(self.gone)} rows of the last result are not in this one: {self.gone[0]}", markup=False)
        if self.header["dirty"]:
            screen.print("the code has changes that no commit has: nobody can measure this again", markup=False)
        screen.print(f"written in {perf_counter() - self.begun:.0f} s: {self.file}", markup=False, soft_wrap=True)
        if self.failed:
            raise UserError(f"{len(self.failed)} shapes failed, and no earlier result is replaced: {self.failed[0]}")

    def show(
        self,
        title: Callable[[Row], str],
        cell: Callable[[Row], str],
        *,
        first: dict[str, Callable[[Row], str]],
        last: dict[str, Callable[[dict[str, Row]], str]] | None = None,
        hidden: Iterable[str] = (),
        rows: list[Row] | None = None,
    ) -> None:
        """Print rows (None: all), a table for each title and a line for each shape.

        Columns: `first` of our row, then `cell` of each rival's, then `last` of the rows by name; one of dashes is
        left out. hidden: what the titles say of the shapes already.
        """
        screen = console()
        screen.print(f"\n{self.name} on {self.header['device']}, ours by {self.header['ours']}", markup=False)
        tables: dict[str, dict[str, dict[str, Row]]] = {}
        for row in self.rows if rows is None else rows:
            rest = {key: value for key, value in row["shape"].items() if key not in hidden}
            tables.setdefault(title(row), {}).setdefault(label(rest), {})[row["name"]] = row
        for text, shapes in tables.items():
            columns = {header: [of(rows[OURS]) for rows in shapes.values()] for header, of in first.items()}
            for name in [name for name in self.versions if name != OURS]:
                columns[name] = [cell(rows[name]) if name in rows else DASH for rows in shapes.values()]
            columns |= {header: [of(rows) for rows in shapes.values()] for header, of in (last or {}).items()}
            columns = {header: cells for header, cells in columns.items() if set(cells) != {DASH}}
            table = Table(title=text, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            table.add_column()
            for header in columns:
                table.add_column(header, justify="right")
            for line in zip(shapes, *columns.values()):
                table.add_row(*line)
            screen.print(table)


def console() -> Console:
    """As wide as the terminal; 120 columns in a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def environment(device: torch.device, dtype: torch.dtype) -> dict:
    """Where and with what a result was measured; null where there is no such thing."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else _cpu_name()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    status = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    # The best of three: a busy moment would make everything after it look fast.
    (peak, source), speeds = max(peak_flops(device, dtype) for _ in range(3)), peak_bytes_per_second(device)
    speed, source_of_speed = speeds
    return {
        "device": name,
        "driver": driver and driver.splitlines()[0],
        "cpu": _cpu_name(),
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
        "peak_bytes_per_second": speed,
        "peak_bytes_per_second_source": source_of_speed,
    }


def peak_bytes_per_second(device: torch.device) -> tuple[float, str]:
    """How fast a device reads its memory, and where the figure comes from: the data sheet of a GPU we know, otherwise
    the best of ten sums."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for name, speed in MEMORY_DATA_SHEETS:
        if re.fullmatch(name, gpu):
            return speed, f"data sheet of {gpu}"
    size = (4 << 30) if gpu else (256 << 20)  # bytes: so many that a launch is nothing beside them
    data = torch.ones(size // 4, device=device)
    seconds = []
    for _ in range(10):
        start = perf_counter()
        data.sum().item()  # waits
        seconds.append(perf_counter() - start)
    return size / min(seconds), f"measured by a sum of {size >> 20} MiB"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a program says; None if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """A device's name as that of a folder: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def label(shape: Shape) -> str:
    return " ".join(str(value) if isinstance(value, str) else f"{key}={value}" for key, value in shape.items())


def number(x: float | None) -> str:
    """Three digits, without an exponent; a dash for None."""
    return DASH if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}"


def first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {shorten(line, 200, placeholder='…')}"
