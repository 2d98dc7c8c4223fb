"""Tokens per second of finetuning, packed beside padded: forward and backward over the same pairs of GSM8K.

Only tokens of pairs count, pauses included; padding does not. Every candidate computes the same losses and gradients:
ours in one row a pass, as `train.py` does; the others with a row for every pair, as long as the longest of its batch or
as block_size.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import DASH, GPT2, OURS, Bench, Candidate, Rival, Shape, number, transformers_model, wall_clock
from nanopause import flops
from nanopause.data import ROW_MULTIPLE, Batch
from nanopause.finetune import Pair, encode, pack
from nanopause.model import GPT, GPTConfig
from nanopause.pauses import IGNORE
from nanopause.tasks import get_task, load
from nanopause.tokenizer import load_tokenizer

BLOCK_SIZE, PAUSES = 512, 10
MODELS = {"124M": dict(n_layer=12, n_head=12, n_embd=768), "small": dict(n_layer=3, n_head=4, n_embd=128)}
CHECKED = ("token_embedding.weight", "blocks.0.attention.qkv.weight")  # whose gradients are compared


class Problem:
    """A model of GPT-2's shape with random weights, and the first pairs of GSM8K's training split."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, pairs: list[Pair], pause_id: int):
        torch.manual_seed(0)
        size, vocab_size = MODELS[shape["model"]], load_tokenizer("gpt2").vocab_size
        self.model = GPT(GPTConfig(vocab_size=vocab_size, block_size=BLOCK_SIZE, **size, **GPT2)).to(device, dtype)
        self.shape, self.pause_id, self.device = shape, pause_id, device
        self.batches = [pairs[i : i + shape["batch"]] for i in range(0, shape["pairs"], shape["batch"])]
        chosen = [pair for batch in self.batches for pair in batch]
        self.n_tokens = sum(len(pair.tokens) - 1 for pair in chosen)
        self.flops = sum(flops.training_flops(self.model.config, len(pair.tokens) - 1,
                                              n_live=len(pair.tokens) - pair.n_prefix) for pair in chosen)  # fmt: skip

    def packed(self, pairs: list[Pair]) -> Batch:
        batch = pack(pairs, self.pause_id, "causal").to(self.device)
        return batch.padded(ROW_MULTIPLE) if self.device.type == "cuda" else batch

    def padded(self, pairs: list[Pair], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [len(pairs), length]."""
        rows = []
        for pair in pairs:
            batch = pack([pair], self.pause_id, "causal")
            pad = (0, length - batch.inputs.shape[1])
            rows.append((F.pad(batch.inputs, pad), F.pad(batch.targets, pad, value=IGNORE)))
        inputs, targets = (torch.cat(x).to(self.device) for x in zip(*rows))
        return inputs, targets

    def forward(self) -> Callable:
        return torch.compile(self.model) if self.device.type == "cuda" else self.model

    def gradients(self, losses: Callable) -> Candidate:
        """What a candidate returns: the sum of the losses and the gradients that are compared. losses: of every batch,
        one after the other."""

        def call():
            self.model.zero_grad()
            total = 0.0
            for loss in losses():
                loss.backward()
                total = total + loss.detach()
            return {"loss": total, **{name: self.model.get_parameter(name).grad for name in CHECKED}}

        return call


def one_by_one(problem: Problem) -> Candidate:
    def losses():
        for pair in (pair for batch in problem.batches for pair in batch):
            inputs, targets = problem.padded([pair], len(pair.tokens) - 1)
            yield problem.model(inputs, targets, reduction="sum")

    return problem.gradients(losses)


def ours(problem: Problem) -> Candidate:
    forward, batches = problem.forward(), [problem.packed(batch) for batch in problem.batches]
    return problem.gradients(lambda: (forward(b.inputs, b.targets, reduction="sum", **b.layout) for b in batches))


def padded(problem: Problem, length: int | None = None) -> Candidate:
    """Rows of the same model; their last tokens, which are padding, nobody reads."""
    if length and problem.device.type == "cpu" and problem.shape["model"] != "small":
        raise NotImplementedError("on a CPU only with the small model, for want of time")
    forward = problem.forward()
    longest = [max(len(pair.tokens) for pair in batch) - 1 for batch in problem.batches]
    batches = [problem.padded(batch, length or n) for batch, n in zip(problem.batches, longest)]
    return problem.gradients(lambda: (forward(*batch, reduction="sum") for batch in batches))


def transformers(problem: Problem) -> Candidate:
    """Its own model and loss, on rows as long as the longest."""
    theirs = transformers_model(problem.model).train()
    forward = torch.compile(theirs) if problem.device.type == "cuda" else theirs
    batches = [problem.padded(batch, max(len(pair.tokens) for pair in batch) - 1) for batch in problem.batches]

    def call():
        theirs.zero_grad()
        total = 0.0
        for inputs, targets in batches:
            loss = forward(inputs, labels=inputs, shift_labels=targets, num_items_in_batch=1).loss
            loss.backward()
            total = total + loss.detach()
        embedding, qkv = theirs.transformer.wte.weight.grad, theirs.transformer.h[0].attn.c_attn.weight.grad
        return {"loss": total, CHECKED[0]: embedding, CHECKED[1]: qkv.T}

    return call


RIVALS = (
    Rival("padded to the longest", "torch", padded),
    Rival("padded to block_size", "torch", partial(padded, length=BLOCK_SIZE)),
    Rival("transformers, padded to the longest", "transformers", transformers),
)


def shapes(device: str, quick: bool) -> list[Shape]:
    if quick:
        return [{"model": "small", "batch": 4, "pairs": 8}]
    if device == "cuda":
        return [{"model": "124M", "batch": 16, "pairs": 256}, {"model": "124M", "batch": 64, "pairs": 256}]
    return [{"model": model, "batch": 16, "pairs": 16} for model in ("small", "124M")]  # the paper's 16


def measure(bench: Bench, shape: Shape, pairs: list[Pair], pause_id: int) -> None:
    problem = Problem(shape, bench.device, bench.dtype, pairs, pause_id)
    calls = {OURS: ours(problem)} | bench.functions(RIVALS, problem, shape)
    truth = {name: x.clone() for name, x in one_by_one(problem)().items()}
    for row in bench.compete("forward+backward", shape, calls, truth, flops=problem.flops):
        row["tokens_per_second"] = problem.n_tokens / row["p50_ms"] * 1e3


def main(quick: bool = False, data_dir: str = "") -> None:
    """Tokens per second of finetuning on GSM8K, packed beside padded.

    Args:
        quick: A small model, few pairs.
        data_dir: Folder with gsm8k_train.jsonl. Empty: the hub.
    """
    bench, tokenizer = Bench("finetune", quick), load_tokenizer("gpt2")
    bench.sample = wall_clock
    examples, said = load(get_task("gsm8k"), "train", data_dir or None, 256)
    pairs = [pair for e in examples if (pair := encode(e, tokenizer, BLOCK_SIZE, PAUSES)) and not pair.n_cut]
    for shape in shapes(bench.device.type, quick):
        bench.attempt(measure, shape, pairs, tokenizer.pause_id)
    bench.write(source=said, pauses=PAUSES, block_size=BLOCK_SIZE)
    bench.show(
        lambda row: f"{said.partition(' of ')[0]}; tokens per second, and how many times faster ours is",
        lambda row: f"{number(row['tokens_per_second'])} {row['ratio']:5.2f}",
        first={"ours": lambda row: number(row["tokens_per_second"])},
        last={"of peak": lambda rows: f"{p:.0f}%" if (p := rows[OURS]["percent_of_peak"]) else DASH},
    )
    bench.finish()
