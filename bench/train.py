"""Tokens per second and MFU of a training step of train.py, beside transformers' GPT-2 and nanoGPT.

A step is the next batch, forward, backward, gradient clipping and the optimizer. All candidates have the same initial
weights, the same batches of the default corpus and the same AdamW. The first step's loss and gradient norm are checked.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import OURS, ROOT, Baseline, Bench, Candidate, Shape, wall_clock
from bench.models import compiled, nanogpt_model, transformers_model
from nanopause.config import load_config
from nanopause.data import Batch, Corpus, TrainingBatches, prefetch
from nanopause.distributed import Processes
from nanopause.flops import training_flops
from nanopause.model import GPT
from nanopause.optimizer import make_optimizers, set_learning_rates
from nanopause.pauses import IGNORE
from nanopause.scripts.data import DATA
from nanopause.scripts.data.pydocs import prepare_pydocs
from nanopause.scripts.train import train_step
from nanopause.tokenizer import load_tokenizer

GPT2 = [str(ROOT / "config" / "gpt2.py")]
MODELS = {
    "124M": [*GPT2, "--tokenizer=gpt2", "--n_layer=12", "--n_head=12", "--n_embd=768"],
    "small": [*GPT2, "--tokenizer=gpt2"],
}


def shapes(device: str, quick: bool) -> list[Shape]:
    """model, sequences per batch, T tokens per sequence, and the fraction of inserted pauses."""
    if quick:
        cases = [("small", 2, 64, 0.1)]
    else:
        sizes = [("124M", 1, 512), ("small", 8, 256)] if device == "cpu" else [("124M", 32, 1024), ("small", 64, 256)]
        cases = [(*size, rate) for rate in (0.0, 0.1) for size in sizes]
    return [dict(zip(("model", "batch", "T", "pause_rate"), case)) for case in cases]


class Problem:
    """A run of train.py before its first step: config, corpus and a model with random weights."""

    def __init__(self, shape: Shape, device: torch.device):
        sizes = {"batch_size": shape["batch"], "block_size": shape["T"], "pause_rate": shape["pause_rate"]}
        settings = [f"--{key}={value}" for key, value in (sizes | {"device": device}).items()]
        self.device = device
        self.config = load_config([*MODELS[shape["model"]], *settings])
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


def compute_truth(problem: Problem) -> dict[str, Tensor]:
    """Loss and gradient norm of the first step, by full logits and PyTorch's cross-entropy in float32."""
    model = deepcopy(problem.model)
    batch = next(problem.batches())
    loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), problem.config.grad_clip)
    return {"loss": loss.detach(), "norm": norm}


def ours(problem: Problem) -> Candidate:
    config, processes = problem.config, Processes(problem.config.device)
    model = deepcopy(problem.model)
    optimizers = make_optimizers(model, config)
    forward = compiled(model)
    batches, steps = problem.batches(), count()

    def call() -> dict[str, Tensor]:
        batch = next(batches)
        set_learning_rates(optimizers, next(steps), config)
        micro_batches = list(batch.split(config.micro_batch_size))
        loss, norm, _ = train_step(
            forward, optimizers, micro_batches, batch.n_live, config.grad_clip, problem.autocast, processes
        )
        return {"loss": torch.tensor(loss), "norm": torch.tensor(norm)}

    return call


def plain_step(problem: Problem, model: nn.Module, loss_of: Callable) -> Candidate:
    """A training step in plain PyTorch. loss_of: compiled model, Batch → mean loss."""
    batches, config = problem.batches(), problem.config
    forward = compiled(model.train())
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=True)

    def call() -> dict[str, Tensor]:
        batch = next(batches)
        with problem.autocast:
            loss = loss_of(forward, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "norm": norm}

    return call


def transformers(problem: Problem) -> Candidate:
    def loss_of(forward: nn.Module, batch: Batch) -> Tensor:
        targets = batch.targets.contiguous()
        return forward(batch.inputs, labels=targets, shift_labels=targets, num_items_in_batch=batch.n_live).loss

    return plain_step(problem, transformers_model(problem.model), loss_of)


def nanogpt(problem: Problem, checkout: str) -> Candidate:
    def loss_of(forward: nn.Module, batch: Batch) -> Tensor:
        return forward(batch.inputs, batch.targets.masked_fill(batch.targets == IGNORE, -1))[1]

    return plain_step(problem, nanogpt_model(checkout, problem.model), loss_of)


def measure(bench: Bench, shape: Shape) -> None:
    problem = Problem(shape, bench.device)
    checkout = bench.options.nanogpt
    bench.timer = wall_clock
    baselines = (
        Baseline("transformers", "transformers", transformers),
        Baseline("nanoGPT", Path(checkout, "model.py"), partial(nanogpt, checkout=checkout)),
    )
    n_live = next(problem.batches()).n_live
    flops = training_flops(problem.model.config, shape["T"], batch_size=shape["batch"], n_live=n_live)
    calls = {OURS: ours(problem)} | bench.make_baselines(baselines, problem, shape)
    for row in bench.compare("step", shape, calls, compute_truth(problem), flops, memory=True):
        row["tokens_per_second"] = 1e3 * shape["batch"] * shape["T"] / row["p50_ms"]
        row["parameters"] = sum(x.numel() for x in problem.model.parameters())
