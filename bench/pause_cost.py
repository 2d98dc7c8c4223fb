"""FLOPs and time of M pauses in GPT-2 124M, in one forward pass and one by one.

    step      a token during generation, and M pauses after it
    prefix    a prompt, and M pauses after it

All are steps of the engine (generation.runner.Runner.append) over `batch` sequences with the most likely next token at
the end. A step follows `context` cached tokens with random keys and values; a prompt has `context` tokens. Weights are
random. The hidden states of pauses in one pass are checked against those of pauses one by one.
"""

import sys

import numpy as np
import torch
from torch import Tensor

from bench.harness import OURS, TOLERANCE, Bench, Candidate, Shape, check, label, number, time_interleaved
from bench.models import GPT2, GPT2_124M
from nanopause.engine import Engine
from nanopause.flops import forward_flops
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

WITHOUT, SEQUENTIAL = "without", "sequential"
PAUSES = (1, 2, 4, 8, 15, 50)


def shapes(device: str, quick: bool) -> list[Shape]:
    """Contexts 256, 1024 and 4096, the small ones first. On a CPU, prompts of at most 8192 tokens in all: longer ones
    take minutes. A GPU's forward passes have 2ⁿ tokens: there prompts leave room for the pauses."""
    if quick:
        return [{"what": what, "batch": 2, "context": 64} for what in ("step", "prefix")]
    sizes = [(batch, context) for context in (256, 1024, 4096) for batch in (1, 8, 32)]
    steps = [{"what": "step", "batch": batch, "context": context} for batch, context in sizes]
    room = 64 if device == "cuda" else 0
    prompts = [{"what": "prefix", "batch": batch, "context": context - room} for batch, context in sizes
               if device == "cuda" or batch * context <= 8192]  # fmt: skip
    return steps + prompts


class Run:
    """An engine of `batch` sequences whose cache has random keys and values."""

    def __init__(self, bench: Bench, config: GPTConfig, batch: int):
        torch.manual_seed(0)
        self.batch = batch
        tokenizer = load_tokenizer("gpt2")
        self.engine = Engine(GPT(config).eval().to(bench.device, bench.dtype), tokenizer, max_batch=batch)
        self.text = torch.randint(tokenizer.eot_id, (batch, config.block_size), device=bench.device)
        self.pauses = torch.full((batch, max(PAUSES)), tokenizer.pause_id, device=bench.device)
        self.engine.runner.cache.normal_()

    def append(self, tokens: Tensor) -> Tensor:
        """The hidden states [batch, n, C] of new tokens [batch, n]."""
        return self.engine.runner.append(tokens, torch.full((self.batch,), tokens.shape[1], device=tokens.device))

    def case(self, context: int, parts: list[Tensor]) -> tuple[Candidate, int]:
        """A candidate that appends the parts, one forward pass each, to `context` cached tokens and computes the most
        likely next token; and its FLOPs by formula. It returns the last hidden state [batch, C]."""

        @torch.no_grad()
        def call() -> dict[str, Tensor]:
            self.engine.runner.slots.length[: self.batch] = context
            for part in parts:
                hidden = self.append(part)[:, -1]
            self.engine.model.head(hidden).argmax(-1)
            return {"hidden": hidden.clone()}  # a CUDA graph overwrites its outputs

        config = self.engine.model.config
        flops, cached = 0, context
        for i, part in enumerate(parts, 1):
            n_live = self.batch * (i == len(parts))
            flops += forward_flops(config, part.shape[1], batch_size=self.batch, context=cached, n_live=n_live)
            cached += part.shape[1]
        return call, flops


def measure(bench: Bench, shape: Shape) -> None:
    batch, context = shape["batch"], shape["context"]
    cached, n_new = (context, 1) if shape["what"] == "step" else (0, context)
    bench.versions |= {WITHOUT: torch.__version__, SEQUENTIAL: torch.__version__}
    bench.header["model"] = "a small model" if bench.options.quick else "GPT-2 124M"
    size = dict(n_layer=2, n_head=4, n_embd=64) if bench.options.quick else GPT2_124M
    run = Run(bench, GPTConfig(vocab_size=50304, block_size=context + max(PAUSES) + 1, **size, **GPT2), batch)
    tokens = run.text[:, cached : cached + n_new]
    cases = {(0, WITHOUT): run.case(cached, [tokens])}  # by pauses and name: the call and its FLOPs
    errors = {}
    for m in PAUSES:
        cases[m, OURS] = run.case(cached, [torch.cat((tokens, run.pauses[:, :m]), 1)])
        cases[m, SEQUENTIAL] = run.case(cached, [tokens, *[run.pauses[:, :1]] * m])
        errors[m, OURS] = check(cases[m, OURS][0](), cases[m, SEQUENTIAL][0](), TOLERANCE[bench.dtype])
    samples = time_interleaved({key: call for key, (call, _) in cases.items()}, bench.timer, bench.seconds)
    base, base_flops = samples[0, WITHOUT], cases[0, WITHOUT][1]
    for (m, name), (_, flops) in cases.items():
        facts = {"flops": flops, "flops_ratio": flops / base_flops, "error": errors.get((m, name))}
        if m:
            added_seconds = float(np.median(np.subtract(samples[m, name], base)))
            facts |= {"added_ms_per_pause": 1e3 * added_seconds / m, "flops_per_pause": (flops - base_flops) / m}
        about = {"batch": batch, "context": context, "pauses": m}
        bench.rows.append(bench.row(shape["what"], about, name, samples[m, name], base, **facts))
    print(f"pause_cost: {label(shape)}: {number(1e3 * np.median(base))} ms without pauses", file=sys.stderr)
