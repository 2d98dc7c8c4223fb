"""kernels.linear_cross_entropy beside full logits, torch's chunked loss, Liger and Cut Cross-Entropy.

FLOPs are those of the unmasked rows: 2·C·V per row forward, three times as many forward and backward; recomputed logits
are not counted. Memory is the peak of a call beyond the loss and the gradients that it returns, also as a percentage of
the N·V logits in the dtype of the inputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Baseline, Bench, Shape, forward_and_backward
from nanopause import kernels


def shapes(device_type: str, quick: bool) -> Iterator[Shape]:
    """N rows of C channels, V classes, and the fraction of masked rows."""
    cpu = device_type == "cpu"
    sizes = (256, 512, 1024) if cpu else (16384, 32768, 65536)
    model = {"C": 128 if cpu else 768, "V": 8192 if cpu and quick else 50304}
    for N in sizes[:1] if quick else sizes:
        yield {"N": N} | model | {"masked": 0.0}
    for masked in (0.5,) if quick else (0.1, 0.5, 0.9):
        yield {"N": sizes[0]} | model | {"masked": masked}
    if not cpu and not quick:
        yield {"N": 16384, "C": 2048, "V": 128256, "masked": 0.0}


@dataclass
class Problem:
    """x [N, C], weight [V, C], targets int64 [N]."""

    x: Tensor
    weight: Tensor
    targets: Tensor


def make_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    """Targets follow Zipf's law, and the logits are near its logarithms. So the probabilities are as uneven as those of
    a trained model, of which Cut Cross-Entropy skips the smallest."""
    N, C, V = (shape[name] for name in "NCV")
    generator = torch.Generator(device).manual_seed(0)
    frequency = 1 / torch.arange(1, V + 1, device=device)
    x = torch.randn(N, C, generator=generator, device=device) + 1
    # The mean of x is 1, so weights with the mean log(frequency)/C give the class that logit, with noise of about 1.
    noise = torch.randn(V, C, generator=generator, device=device) * (0.5 / C) ** 0.5
    weight = noise + frequency.log()[:, None] / C
    targets = frequency.multinomial(N, replacement=True, generator=generator)
    targets[torch.randperm(N, generator=generator, device=device)[: round(shape["masked"] * N)]] = -100
    return Problem(x.to(dtype), weight.to(dtype), targets)


def compute_truth(problem: Problem, rows: int = 2048) -> dict[str, Tensor]:
    """The mean loss, dx and dw by the reference, some rows at a time, because the reference stores all logits."""
    wide = torch.float64 if problem.x.dtype == torch.float32 else torch.float32
    n_live = (problem.targets != -100).sum()
    weight = problem.weight.to(wide).requires_grad_()
    loss, dx, dw = torch.zeros((), dtype=wide, device=weight.device), [], torch.zeros_like(weight)
    for x, targets in zip(problem.x.split(rows), problem.targets.split(rows)):
        x = x.to(wide).requires_grad_()
        part = kernels.linear_cross_entropy(x, weight, targets, reduction="sum", impl="reference") / n_live
        dx_part, dw_part = torch.autograd.grad(part, (x, weight))
        loss += part.detach()
        dx.append(dx_part)
        dw += dw_part
    return {"out": loss, "dx": torch.cat(dx), "dw": dw}


# Baselines: problem → function of x and weight.


def full_logits(problem: Problem, compiled: bool) -> Callable:
    def function(x, weight):
        # In float32, as under autocast: bfloat16 probabilities have two digits.
        return F.cross_entropy((x @ weight.T).float(), problem.targets)

    return torch.compile(function, dynamic=False) if compiled else function


def torch_chunks(problem: Problem) -> Callable:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()  # without options torch computes full logits
    return lambda x, weight: F.linear_cross_entropy(x, weight, problem.targets, options=options)


def liger(problem: Problem, **options) -> Callable:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(**options)
    return lambda x, weight: loss(weight, x, problem.targets)


def cut_cross_entropy(problem: Problem, **options) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight: linear_cross_entropy(x, weight, problem.targets, **options)


BASELINES = (
    Baseline("full logits", "torch", partial(full_logits, compiled=False)),
    Baseline("full compiled", "torch", partial(full_logits, compiled=True)),
    Baseline("torch in chunks", "torch", torch_chunks),
    Baseline("Liger", "liger-kernel", liger),
    Baseline("Liger fp32", "liger-kernel", partial(liger, accum_dtype=torch.float32)),
    Baseline("Cut CE", "cut-cross-entropy", cut_cross_entropy),
    Baseline("Cut CE exact", "cut-cross-entropy", partial(cut_cross_entropy, filter_eps=None)),
)


def measure(bench: Bench, shape: Shape) -> None:
    problem = make_problem(shape, bench.device, bench.dtype)
    truth = compute_truth(problem)
    functions = {OURS: lambda x, weight: kernels.linear_cross_entropy(x, weight, problem.targets)}
    functions |= bench.make_baselines(BASELINES, problem, shape)
    inputs = {"x": problem.x, "w": problem.weight}
    upstream = torch.ones((), device=bench.device)
    calls = {name: forward_and_backward(f, inputs, upstream) for name, f in functions.items()}
    flops = 2 * (problem.targets != -100).sum().item() * shape["C"] * shape["V"]
    logits_bytes = shape["N"] * shape["V"] * problem.x.itemsize
    for what, factor in {"forward": 1, "forward+backward": 3}.items():
        chosen = {name: call[what] for name, call in calls.items()}
        for row in bench.compare(what, shape, chosen, truth, factor * flops, memory=True):
            row["logits_bytes"] = logits_bytes
            row["extra_bytes"] = row["peak_extra_bytes"] - row["result_bytes"]
            row["percent_of_logits"] = 100 * row["extra_bytes"] / logits_bytes
