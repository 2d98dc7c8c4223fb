"""kernels.linear_cross_entropy beside full logits, torch's own in chunks, Liger and Cut Cross-Entropy.

FLOPs are those of the live rows' products: 2·C·V a row forward, three times that forward and backward; logits computed
twice are not counted. Memory is what a call allocates at its peak beyond the loss and the gradients that it returns,
beside the N·V logits in the dtype of the inputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.harness import OURS, Bench, Candidate, Rival, Row, Shape, number, passes, race


def shapes(device_type: str, quick: bool) -> Iterator[Shape]:
    """N rows of C channels, V classes, and the share of rows that are masked."""
    if quick and device_type == "cpu":
        sizes, model, N = (512,), {"C": 256, "V": 8192}, 512
    elif device_type == "cpu":
        sizes, model, N = (256, 512, 1024), {"C": 128, "V": 50304}, 512
    else:
        sizes, model, N = (16384,) if quick else (4096, 16384, 32768, 65536), {"C": 768, "V": 50304}, 16384
    for n in sizes:
        yield {"N": n} | model | {"masked": 0.0}
    for share in (0.5,) if quick else (0.1, 0.5, 0.9):
        yield {"N": N} | model | {"masked": share}
    if device_type == "cuda":
        yield {"N": N, "C": 768, "V": 128256, "masked": 0.0}
        for n in () if quick else sizes:
            yield {"N": n, "C": 2048, "V": 128256, "masked": 0.0}
    elif not quick:
        yield {"N": 256, "C": 128, "V": 128256, "masked": 0.0}


@dataclass
class Problem:
    """x [N, C], weight [V, C], targets int64 [N]."""

    x: Tensor
    weight: Tensor
    targets: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, "w": self.weight}


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    """A model that knows how frequent words are: logits around the logarithms of Zipf's frequencies, which the targets
    follow. Probabilities are as uneven as in a trained model, where Cut Cross-Entropy skips the smallest."""
    N, C, V = (shape[name] for name in "NCV")
    generator = torch.Generator(device).manual_seed(0)
    frequency = 1 / torch.arange(1, V + 1, device=device)
    x = torch.randn(N, C, generator=generator, device=device) + 1
    # x is 1 in the mean, so a mean of log(frequency)/C in a class's weights gives it that logit, give or take about 1.
    noise = torch.randn(V, C, generator=generator, device=device) * (0.5 / C) ** 0.5
    weight = noise + frequency.log()[:, None] / C
    targets = frequency.multinomial(N, replacement=True, generator=generator)
    targets[torch.randperm(N, generator=generator, device=device)[: round(shape["masked"] * N)]] = -100
    return Problem(x.to(dtype), weight.to(dtype), targets)


def truth(problem: Problem, rows: int = 2048) -> dict[str, Tensor]:
    """The mean loss, dx and dw by the reference, some rows after others, for its logits are all in memory."""
    wide = torch.float64 if problem.x.dtype == torch.float32 else torch.float32
    live = (problem.targets != -100).sum()
    weight = problem.weight.to(wide).requires_grad_()
    loss, dx, dw = torch.zeros((), dtype=wide, device=weight.device), [], torch.zeros_like(weight)
    for x, targets in zip(problem.x.split(rows), problem.targets.split(rows)):
        x = x.to(wide).requires_grad_()
        part = kernels.linear_cross_entropy(x, weight, targets, reduction="sum", impl="reference") / live
        dx_part, dw_part = torch.autograd.grad(part, (x, weight))
        loss += part.detach()
        dx.append(dx_part)
        dw += dw_part
    return {"out": loss, "dx": torch.cat(dx), "dw": dw}


# Rivals: problem → function of x and weight.


def full_logits(problem: Problem, compiled: bool) -> Callable:
    def function(x, weight):
        # In float32, as autocast has the loss: in bfloat16 the probabilities would keep two digits.
        return F.cross_entropy((x @ weight.T).float(), problem.targets)

    return torch.compile(function, dynamic=False) if compiled else function


def torch_chunks(problem: Problem) -> Callable:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()  # without, it computes full logits
    return lambda x, weight: F.linear_cross_entropy(x, weight, problem.targets, options=options)


def liger(problem: Problem, **options) -> Callable:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(**options)
    return lambda x, weight: loss(weight, x, problem.targets)


def cut(problem: Problem, **options) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight: linear_cross_entropy(x, weight, problem.targets, **options)


RIVALS = (
    Rival("full logits", "torch", partial(full_logits, compiled=False)),
    Rival("full compiled", "torch", partial(full_logits, compiled=True)),
    Rival("torch in chunks", "torch", torch_chunks),
    Rival("Liger", "liger-kernel", liger),
    Rival("Liger fp32", "liger-kernel", partial(liger, accum_dtype=torch.float32)),
    Rival("Cut CE", "cut-cross-entropy", cut),
    Rival("Cut CE exact", "cut-cross-entropy", partial(cut, filter_eps=None)),
)


def main(quick: bool = False) -> None:
    """Linear cross-entropy, forward and backward, beside its rivals: time and memory.

    Args:
        quick: Fewer shapes and samples, in less than two minutes.
    """
    bench, ratios = Bench("loss", quick), []
    for shape in shapes(bench.device.type, quick):
        bench.attempt(measure, shape, ratios)
    bench.write(half_masked=ratios)

    def title(row: Row) -> str:
        return f"{row['what']}, C={row['shape']['C']}, V={row['shape']['V']}"

    bench.show(
        lambda row: f"{title(row)}: ms, and how many times ours",
        lambda row: f"{number(row['p50_ms'])} {row['ratio']:5.2f}",
        first={
            "ours": lambda row: number(row["p50_ms"]),
            "TFLOP/s": lambda row: number(row["tflops"]),
            "% of peak": lambda row: number(row["percent_of_peak"]),
        },
        hidden=("C", "V"),
    )
    memory = lambda row: f"{number(row['extra_bytes'] / 2**20)} {number(row['percent_of_logits'])}%"  # noqa: E731
    bench.show(
        lambda row: f"{title(row)}: memory beyond the results, MiB, and beside the logits in {bench.dtype}",
        memory,
        first={"ours": memory},
        hidden=("C", "V"),
    )
    for ratio in ratios:
        line = ", ".join(f"{name} {value:.2f}" for name, value in ratio["ratios"].items())
        print(f"{ratio['what']} with half of the rows masked, over none: {line}")
    bench.finish()


def candidates(problem: Problem, functions: dict[str, Callable]) -> dict[str, dict[str, Candidate]]:
    """The passes of ours and of rivals, by name."""
    ours = {OURS: lambda x, weight: kernels.linear_cross_entropy(x, weight, problem.targets)}
    upstream = torch.ones((), device=problem.x.device)
    return {name: passes(function, problem.inputs, upstream) for name, function in (ours | functions).items()}


def measure(bench: Bench, shape: Shape, ratios: list[dict]) -> None:
    problem = make(shape, bench.device, bench.dtype)
    expected = truth(problem)
    racers = candidates(problem, bench.functions(RIVALS, problem, shape))
    flops = 2 * (problem.targets != -100).sum().item() * shape["C"] * shape["V"]
    logits = shape["N"] * shape["V"] * problem.x.itemsize
    for what, work in {"forward": flops, "forward+backward": 3 * flops}.items():
        calls = {name: racer[what] for name, racer in racers.items()}
        for row in bench.compete(what, shape, calls, expected, flops=work, memory=True):
            row["logits_bytes"] = logits
            row["extra_bytes"] = row["peak_extra_bytes"] - row["result_bytes"]
            row["percent_of_logits"] = 100 * row["extra_bytes"] / logits
    if shape["masked"] == 0.5:
        ratios += half_masked(bench, shape)


def half_masked(bench: Bench, shape: Shape) -> list[dict]:
    """For each pass, by name, the time that a shape takes with half of its rows masked, over that with none.

    Both take turns. Those race who were right about the shape.
    """
    racers = {}
    for share in (0.0, 0.5):
        problem = make(shape | {"masked": share}, bench.device, bench.dtype)
        right = {row["name"] for row in bench.rows if row["shape"] == shape}
        functions = {rival.name: rival.make(problem) for rival in RIVALS if rival.name in right}
        racers[share] = candidates(problem, functions)
    ratios = []
    for what in ("forward", "forward+backward"):
        names = [row["name"] for row in bench.rows if row["shape"] == shape and row["what"] == what]
        calls = {(name, share): racer[name][what] for name in names for share, racer in racers.items()}
        for call in calls.values():
            call()  # compiles
        samples = race(calls, bench.sample, bench.seconds)
        ratio = {name: float(np.median(np.divide(samples[name, 0.5], samples[name, 0.0]))) for name in names}
        ratios.append({"shape": shape, "what": what, "ratios": ratio})
    return ratios
