"""Tokens per second of finetuning on GSM8K, packed beside padded: forward and backward over the same pairs.

Only tokens of pairs count, pauses included; padding does not. All candidates compute the same loss and gradients: ours
in one row per batch, as train.py does; the others in one row per pair, padded to the longest of the batch.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from bench.harness import OURS, Baseline, Bench, Candidate, Shape, wall_clock
from bench.models import GPT2, GPT2_124M, GPT2_SMALL, compiled, transformers_model
from nanopause.data import ROW_MULTIPLE
from nanopause.finetune import Pair, encode, pack
from nanopause.flops import training_flops
from nanopause.model import GPT, GPTConfig
from nanopause.pauses import IGNORE
from nanopause.tasks import get_task, load
from nanopause.tokenizer import load_tokenizer

BLOCK_SIZE, PAUSES = 512, 10
MODELS = {"124M": GPT2_124M, "small": GPT2_SMALL}


class Problem:
    """A GPT-2 model with random weights, and the first pairs of GSM8K's training split in batches."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, pairs: list[Pair]):
        torch.manual_seed(0)
        tokenizer = load_tokenizer("gpt2")
        config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=BLOCK_SIZE, **MODELS[shape["model"]], **GPT2)
        self.model = GPT(config).to(device, dtype)
        self.pause_id = tokenizer.pause_id
        self.device = device
        self.pairs = pairs[: shape["pairs"]]
        self.batches = [self.pairs[i : i + shape["batch"]] for i in range(0, len(self.pairs), shape["batch"])]

    def padded(self, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [len(pairs), tokens of the longest pair]."""
        length = max(len(pair.tokens) for pair in pairs) - 1
        rows = []
        for pair in pairs:
            batch = pack([pair], self.pause_id, "causal")
            padding = (0, length - batch.inputs.shape[1])
            rows.append((F.pad(batch.inputs, padding), F.pad(batch.targets, padding, value=IGNORE)))
        inputs, targets = (torch.cat(x).to(self.device) for x in zip(*rows))
        return inputs, targets


def gradients(model: torch.nn.Module, losses: Callable, embedding: torch.Tensor) -> Candidate:
    """A candidate that returns the summed loss and the gradient of the tied embedding, which depends on every layer.
    losses: a generator of the loss of each batch."""

    def call():
        model.zero_grad()
        total = 0.0
        for loss in losses():
            loss.backward()
            total = total + loss.detach()
        return {"loss": total, "embedding": embedding.grad}

    return call


def ours(problem: Problem) -> Candidate:
    forward = compiled(problem.model)
    batches = [pack(pairs, problem.pause_id, "causal").to(problem.device) for pairs in problem.batches]
    if problem.device.type == "cuda":
        batches = [batch.padded(ROW_MULTIPLE) for batch in batches]

    def losses():
        return (forward(batch.inputs, batch.targets, reduction="sum", **batch.layout) for batch in batches)

    return gradients(problem.model, losses, problem.model.token_embedding.weight)


def padded(problem: Problem, one_by_one: bool = False) -> Candidate:
    """Our model on rows padded to the longest of each batch; one_by_one: in batches of one pair, without padding.
    Padding follows the pair, so causal attention hides it."""
    groups = [[pair] for pair in problem.pairs] if one_by_one else problem.batches
    forward = problem.model if one_by_one else compiled(problem.model)  # every length would compile again
    batches = [problem.padded(pairs) for pairs in groups]

    def losses():
        return (forward(*batch, reduction="sum") for batch in batches)

    return gradients(problem.model, losses, problem.model.token_embedding.weight)


def transformers(problem: Problem) -> Candidate:
    """transformers' model and loss, on rows padded to the longest."""
    theirs = transformers_model(problem.model).train()
    forward = compiled(theirs)
    batches = [problem.padded(pairs) for pairs in problem.batches]

    def losses():
        for inputs, targets in batches:
            yield forward(inputs, labels=inputs, shift_labels=targets, num_items_in_batch=1).loss

    return gradients(theirs, losses, theirs.transformer.wte.weight)


BASELINES = (
    Baseline("padded to the longest", "torch", padded),
    Baseline("transformers, padded to the longest", "transformers", transformers),
)


def shapes(device: str, quick: bool) -> list[Shape]:
    if quick:
        return [{"model": "small", "batch": 4, "pairs": 8}]
    if device == "cuda":
        return [{"model": "124M", "batch": batch, "pairs": 256} for batch in (16, 64)]
    return [{"model": model, "batch": 16, "pairs": 16} for model in ("small", "124M")]


@cache
def load_pairs(data_dir: str) -> tuple[list[Pair], str]:
    """The pairs of the first 256 examples that fit BLOCK_SIZE, and the source of the data."""
    tokenizer = load_tokenizer("gpt2")
    examples, source = load(get_task("gsm8k"), "train", data_dir or None, 256)
    pairs = [encode(example, tokenizer, BLOCK_SIZE, PAUSES) for example in examples]
    return [pair for pair in pairs if pair and not pair.n_cut], source


def measure(bench: Bench, shape: Shape) -> None:
    pairs, source = load_pairs(bench.options.data_dir)
    bench.header |= {"source": source, "pauses": PAUSES, "block_size": BLOCK_SIZE}
    bench.timer = wall_clock
    problem = Problem(shape, bench.device, bench.dtype, pairs)
    calls = {OURS: ours(problem)} | bench.make_baselines(BASELINES, problem, shape)
    truth = {name: x.clone() for name, x in padded(problem, one_by_one=True)().items()}
    lengths = [(len(pair.tokens) - 1, len(pair.tokens) - pair.n_prefix) for pair in problem.pairs]
    flops = sum(training_flops(problem.model.config, n_tokens, n_live=n_live) for n_tokens, n_live in lengths)
    for row in bench.compare("forward+backward", shape, calls, truth, flops):
        row["tokens_per_second"] = 1e3 * sum(n_tokens for n_tokens, _ in lengths) / row["p50_ms"]
