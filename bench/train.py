"""Tokens per second and MFU of a step of train.py, beside transformers' GPT-2 and nanoGPT's, and how it grows.

    step      the next batch, forward, backward, clipping and the optimizer: what train.py calls, in its order
    growth    the same with longer sequences, with more of them, and of larger models

All begin with the same weights, read the same batches of the default corpus and step with the same AdamW; the default
model, which has Muon, has no rival. What is compared is of the first step: its loss, the norm of its gradient, and what
the optimizer remembers of two matrices' gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.harness import (
    DASH,
    OURS,
    ROOT,
    Bench,
    Candidate,
    Rival,
    Shape,
    label,
    nanogpt,
    number,
    race,
    transformers_model,
    wall_clock,
)
from data.pydocs import prepare_pydocs
from nanopause import flops
from nanopause.config import load_config
from nanopause.data import Batch, Corpus, TrainingBatches, prefetch
from nanopause.distributed import Processes
from nanopause.model import GPT
from nanopause.optimizer import make_optimizers, set_learning_rates
from nanopause.pauses import IGNORE
from nanopause.tokenizer import load_tokenizer
from train import DATA, train_step

GPT2 = [str(ROOT / "config" / "gpt2.py")]
MODELS = {
    "124M": [*GPT2, "--tokenizer=gpt2", "--n_layer=12", "--n_head=12", "--n_embd=768"],
    "small": [*GPT2, "--tokenizer=gpt2"],
    "default": ["--zero_init=False"],  # with zeros most of the first gradient would be nothing
}


def sized(n_layer: int, n_embd: int) -> str:
    """The name of a model of GPT-2's shape and bytes, with heads of 64."""
    name = f"{n_layer} × {n_embd}"
    MODELS[name] = [*GPT2, f"--n_layer={n_layer}", f"--n_embd={n_embd}", f"--n_head={n_embd // 64}"]
    return name


def shapes(device: str, quick: bool) -> list[tuple[str, Shape]]:
    """What is measured of which shape, the most telling first."""

    def step(model: str, batch: int, T: int, pause_rate: float = 0.0) -> Shape:
        return {"model": model, "batch": batch, "T": T, "pause_rate": pause_rate}

    if quick:
        steps = [step("small", 2, 64), step("default", 8, 64, 0.1)]
        return [*(("step", shape) for shape in steps), *(("growth with T", step("default", 2, T)) for T in (64, 128))]
    if device == "cuda":
        steps = [step(model, *size, rate) for rate in (0.0, 0.1)
                 for model, *size in (("124M", 32, 1024), ("small", 64, 256), ("default", 64, 256))]  # fmt: skip
        longer = [step("124M", 32768 // T, T) for T in (512, 1024, 2048, 4096, 8192)]
        more = [step("124M", batch, 1024) for batch in (1, 2, 4, 8, 16, 32, 64)]
        larger = [step(sized(*size), 16, 1024) for size in ((6, 384), (12, 768), (24, 1024), (36, 1280))]
    else:
        steps = [step("124M", 1, 512), step("small", 8, 256), step("default", 8, 256), step("default", 8, 256, 0.1),
                 step("124M", 1, 512, 0.1), step("small", 8, 256, 0.1)]  # fmt: skip
        longer = [step("default", 4096 // T, T) for T in (64, 128, 256, 512, 1024, 2048)]
        more = [step("default", batch, 256) for batch in (1, 2, 4, 8, 16, 32)]
        larger = [step(sized(*size), 4, 256) for size in ((2, 128), (4, 256), (6, 384), (12, 768))]
    growth = {"growth with T": longer, "growth with batch": more, "growth with parameters": larger}
    return [("step", shape) for shape in steps] + [(what, shape) for what, of in growth.items() for shape in of]


class Problem:
    """A run of train.py before its first step: its config, corpus and model of random weights."""

    def __init__(self, shape: Shape, device: torch.device):
        sizes = {"batch_size": shape["batch"], "block_size": shape["T"], "pause_rate": shape["pause_rate"]}
        settings = [f"--{key}={value}" for key, value in (sizes | {"device": device}).items()]
        self.config, self.device = load_config([*MODELS[shape["model"]], *settings]), device
        tokenizer = load_tokenizer(self.config.tokenizer)
        folder = DATA / "pydocs" / tokenizer.name
        if not folder.exists():
            prepare_pydocs(tokenizer.source)
        self.corpus = Corpus(folder, "train", tokenizer, shape["T"])
        torch.manual_seed(self.config.seed)
        self.model = GPT(self.config.gpt(tokenizer.vocab_size)).to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def batches(self) -> Iterator[Batch]:
        config = self.config
        batches = TrainingBatches(self.corpus, config.batch_size, config.insertion, config.seed, rank=0, n_ranks=1)
        return prefetch(batches, 0, config.max_steps, self.device)

    def compiled(self, model: nn.Module) -> nn.Module:
        """As train.py has it: compiled on a GPU."""
        return torch.compile(model) if self.device.type == "cuda" else model


def answer(loss: Tensor | float, norm: Tensor | float, optimizers: list[Optimizer], *weights: Tensor) -> dict:
    """What is compared. After its first step an optimizer remembers a share of the clipped gradient."""
    states = [next(optimizer.state[x] for optimizer in optimizers if x in optimizer.state) for x in weights]
    embedding, qkv = (state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"] for state in states)
    return {"loss": torch.as_tensor(loss), "norm": torch.as_tensor(norm), "embedding": embedding, "qkv": qkv}


def truth(problem: Problem) -> dict[str, Tensor]:
    """The answer of the first step by full logits and PyTorch's own loss, in float32."""
    model, config, batch = deepcopy(problem.model), problem.config, next(problem.batches())
    loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    share = 1 - (config.momentum if config.optimizer == "muon" else config.beta1)
    qkv = model.blocks[0].attention.qkv.weight.grad
    embedding = model.token_embedding.weight.grad
    return {"loss": loss.detach(), "norm": norm, "embedding": (1 - config.beta1) * embedding, "qkv": share * qkv}


def ours(problem: Problem) -> Candidate:
    config, processes, model = problem.config, Processes(problem.config.device), deepcopy(problem.model)
    optimizers, forward = make_optimizers(model, config), problem.compiled(model)
    batches, steps = problem.batches(), count()

    def call() -> dict[str, Tensor]:
        batch = next(batches)
        set_learning_rates(optimizers, next(steps), config)
        loss, norm, _ = train_step(forward, optimizers, list(batch.split(config.micro_batch_size)), batch.n_live,
                                   config.grad_clip, problem.autocast, processes)  # fmt: skip
        return answer(loss, norm, optimizers, model.token_embedding.weight, model.blocks[0].attention.qkv.weight)

    return call


def rival(
    problem: Problem, model: nn.Module, loss_of: Callable[[Batch], Tensor], optimizer: Optimizer, *weights: Tensor
) -> Candidate:
    """A training step as anybody writes it."""
    batches = problem.batches()

    def call() -> dict[str, Tensor]:
        batch = next(batches)
        with problem.autocast:
            loss = loss_of(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), problem.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return answer(loss.detach(), norm, [optimizer], *weights)

    return call


def transformers(problem: Problem, compiled: bool) -> Candidate:
    if compiled and problem.device.type == "cpu":
        raise NotImplementedError("on a CPU compiling takes longer than a minute: only on a GPU")
    model, config = transformers_model(problem.model).train(), problem.config
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)  # fmt: skip
    forward = torch.compile(model) if compiled else model

    def loss_of(batch: Batch) -> Tensor:
        targets = batch.targets.contiguous()
        return forward(batch.inputs, labels=targets, shift_labels=targets, num_items_in_batch=batch.n_live).loss

    weights = model.transformer.wte.weight, model.transformer.h[0].attn.c_attn.weight
    call = rival(problem, model, loss_of, optimizer, *weights)
    return lambda: (result := call()) | {"qkv": result["qkv"].T}


def nano(problem: Problem, path: str) -> Candidate:
    model, config = nanogpt(path, problem.model).train(), problem.config
    betas = config.beta1, config.beta2
    with redirect_stdout(None):  # it tells what decays
        optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, problem.device.type)
    forward = problem.compiled(model)

    def loss_of(batch: Batch) -> Tensor:
        return forward(batch.inputs, batch.targets.masked_fill(batch.targets == IGNORE, -1))[1]

    weights = model.transformer.wte.weight, model.transformer.h[0].attn.c_attn.weight
    return rival(problem, model, loss_of, optimizer, *weights)


def with_pauses(bench: Bench, shape: Shape, ratios: list[dict]) -> None:
    """Ours with and without pauses by turns."""
    calls = {rate: ours(Problem(shape | {"pause_rate": rate}, bench.device)) for rate in (0.0, shape["pause_rate"])}
    for call in calls.values():
        call()  # compiles
    samples = race(calls, bench.sample, bench.seconds)
    ratio = float(np.median(np.divide(samples[shape["pause_rate"]], samples[0.0])))
    ratios.append({"shape": shape, "ratio": ratio})


def measure(bench: Bench, shape: Shape, what: str, rivals: tuple[Rival, ...], ratios: list[dict]) -> None:
    problem, calls = Problem(shape, bench.device), {}
    if what == "step" and shape["model"] != "default":
        calls = bench.functions(rivals, problem, shape)
    n_live = next(problem.batches()).n_live
    work = flops.training_flops(problem.model.config, shape["T"], batch_size=shape["batch"], n_live=n_live)
    calls = {OURS: ours(problem)} | calls
    for row in bench.compete(what, shape, calls, truth(problem), flops=work, memory=True):
        row["tokens_per_second"] = 1e3 * shape["batch"] * shape["T"] / row["p50_ms"]
        row["parameters"] = sum(x.numel() for x in problem.model.parameters())
    if shape["pause_rate"]:
        with_pauses(bench, shape, ratios)


def main(quick: bool = False, nanogpt: str = "") -> None:
    """Tokens per second and MFU of training, beside rivals, and how it grows.

    Args:
        quick: Small models, few shapes.
        nanogpt: A checkout of github.com/karpathy/nanoGPT. Empty: it is missing.
    """
    bench, ratios = Bench("train", quick), []
    bench.sample = wall_clock
    rivals = (
        Rival("transformers", "transformers", partial(transformers, compiled=False)),
        Rival("transformers, compiled", "transformers", partial(transformers, compiled=True)),
        Rival("nanoGPT", Path(nanogpt, "model.py"), partial(nano, path=nanogpt)),
    )
    for what, shape in shapes(bench.device.type, quick):
        bench.attempt(measure, shape, what, rivals, ratios)
    bench.write(with_pauses=ratios)
    bench.show(
        lambda row: f"{row['what']}: tokens per second, and how many times faster ours is",
        lambda row: f"{number(row['tokens_per_second'])} {row['ratio']:5.2f}",
        first={"ours": lambda row: number(row["tokens_per_second"]),
               "MFU": lambda row: f"{p:.0f}%" if (p := row["percent_of_peak"]) else DASH,
               "MiB beyond what stays": lambda row: number(row["peak_extra_bytes"] / 2**20)},
    )  # fmt: skip
    for each in ratios:
        print(f"a step with pauses takes {each['ratio']:.2f} times as long as one without, by turns: "
              f"{label(each['shape'])}")  # fmt: skip
    bench.finish()
