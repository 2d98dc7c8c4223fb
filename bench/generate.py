"""Tokens per second of generation, beside transformers' and nanoGPT's generate with the same weights.

A prompt has `context` random tokens and `pauses` pauses after them, and is continued by `new` tokens, greedily; the
time includes the prompt. All candidates must generate the same tokens. Baselines prefill the pauses as tokens of the
prompt. nanoGPT has no cache and recomputes the whole text for each token, so it generates one token.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Baseline, Bench, Shape, WrongOutput, reason, time_interleaved, wall_clock
from bench.models import GPT2, GPT2_124M, GPT2_SMALL, LLAMA, nanogpt_model, transformers_model
from nanopause.engine import Engine
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

# Tokenizer and model settings. Small models are measured first: memory freed by large ones stays with the process and
# speeds up later allocations, of which transformers has many.
MODELS = {
    "small": ("bytes", GPT2 | GPT2_SMALL),
    "small, GPT-2's vocabulary": ("gpt2", GPT2 | GPT2_SMALL),
    "124M": ("gpt2", GPT2 | GPT2_124M),
    "Llama 135M": ("gpt2", LLAMA | dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_mlp=1536)),  # as SmolLM2-135M
}
NANOGPT = "nanoGPT"
Generate = Callable[[int], Tensor]  # n → the next n tokens of every prompt, [batch, n]


class Problem:
    """A model with random weights; prompts [batch, context], and with their pauses [batch, context + pauses]."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.pauses = shape["pauses"]
        length = shape["context"] + shape["pauses"] + shape["new"]
        name, size = MODELS[shape["model"]]
        self.tokenizer = load_tokenizer(name)
        self.model = GPT(GPTConfig(vocab_size=self.tokenizer.vocab_size, block_size=length, **size)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.05)  # with the initial weights the model repeats one token
            self.model.head.weight[self.tokenizer.eot_id :] = 0  # never generates the end of text or a pause
        self.model.to(device, dtype)
        self.prompts = torch.randint(self.tokenizer.eot_id, (shape["batch"], shape["context"]), device=device)
        self.with_pauses = F.pad(self.prompts, (0, shape["pauses"]), value=self.tokenizer.pause_id)


def ours(problem: Problem) -> Generate:
    engine = Engine(problem.model, problem.tokenizer, max_batch=len(problem.prompts))
    prompts = problem.prompts.tolist()

    def generate(n: int) -> Tensor:
        ids = [[] for _ in prompts]
        for token in engine.stream(prompts, problem.pauses, max_new_tokens=n, temperature=0):
            ids[token.sequence].append(token.id)
        return torch.tensor(ids)

    return generate


def transformers(problem: Problem, **options) -> Generate:
    theirs = transformers_model(problem.model).eval()
    tokens = problem.with_pauses
    options |= {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}

    def generate(n: int) -> Tensor:
        return theirs.generate(tokens, max_new_tokens=n, min_new_tokens=n, **options)[:, tokens.shape[1] :].cpu()

    return generate


def nanogpt(problem: Problem, checkout: str) -> Generate:
    theirs = nanogpt_model(checkout, problem.model).eval()
    # With top_k=1 sampling is greedy.
    return lambda n: theirs.generate(problem.with_pauses, n, top_k=1)[:, -n:].cpu()


def shapes(device: str, quick: bool) -> list[Shape]:
    """Batch, context and pauses are varied one at a time from 8 prompts of 512 tokens without pauses."""
    if quick:
        return [{"model": "small", "batch": 2, "context": 32, "pauses": pauses, "new": 16} for pauses in (0, 10)]
    varied, new, contexts = ("124M", 128, (4096, 16384)) if device == "cuda" else ("small", 64, (128, 2048))
    cases = [(model, batch, 512, 0, new) for batch in (8, 1) for model in MODELS]
    cases += [(varied, 8, 512, 10, new), (varied, 8, 512, 50, new), (varied, 32, 512, 0, new)]
    cases += [(varied, 8, context, 0, new) for context in contexts]
    cases.sort(key=lambda case: list(MODELS).index(case[0]))
    return [dict(zip(("model", "batch", "context", "pauses", "new"), case)) for case in cases]


def different_tokens(bench: Bench, tokens: Tensor, expected: Tensor) -> float:
    """The fraction of tokens that differ. Raises WrongOutput if any do; in bfloat16, where two likely tokens can be
    swapped by rounding, if more than a quarter of the first tokens do."""
    different = tokens != expected[:, : tokens.shape[1]]
    fraction = different.float().mean().item()
    if different.any() if bench.dtype == torch.float32 else different[:, 0].float().mean() > 0.25:
        raise WrongOutput(f"{fraction:.1%} of the tokens differ")
    return fraction


def measure(bench: Bench, shape: Shape) -> None:
    problem = Problem(shape, bench.device, bench.dtype)
    checkout = bench.options.nanogpt
    baselines = (
        Baseline("transformers", "transformers", transformers),
        Baseline("transformers, static cache", "transformers", partial(transformers, cache_implementation="static")),
        Baseline(NANOGPT, Path(checkout, "model.py"), partial(nanogpt, checkout=checkout)),
    )
    generators = {OURS: ours(problem)} | bench.make_baselines(baselines, problem, shape)
    n_tokens = {name: 1 if name == NANOGPT else shape["new"] for name in generators}
    expected = generators[OURS](shape["new"])
    calls, errors = {}, {}
    for name, generate in generators.items():
        try:
            errors[name] = different_tokens(bench, generate(n_tokens[name]), expected)
            calls[name] = partial(generate, n_tokens[name])
        except Exception as error:
            bench.add_missing(name, shape, reason(error))
    samples = time_interleaved(calls, wall_clock, 10 * bench.seconds)
    per_token = {name: [x / n_tokens[name] for x in samples[name]] for name in samples}
    for name, seconds in per_token.items():
        facts = {"error": errors[name], "tokens_per_second": shape["batch"] / median(seconds)}
        bench.rows.append(bench.row("prompts included", shape, name, seconds, per_token[OURS], **facts))
