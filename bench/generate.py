"""Tokens per second of generation, beside transformers, nanoGPT and a loop without a cache, with the same weights.

Every prompt is `context` random tokens and `pauses` behind them, and gets `new` more, the likeliest; all must say the
same. Rivals read the pauses as tokens of the prompt. nanoGPT's generate and our loop, which is written as it is, read
the whole text anew for every token: they make one, and their seconds are of that. What comes after the prompts is timed
from the first token on; then a step reads all weights, and what is in the cache, and the bytes of both over its time
are a speed to hold against the memory's own.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import (
    DASH,
    GPT2,
    LLAMA,
    OURS,
    Bench,
    Rival,
    Shape,
    Wrong,
    first_line,
    label,
    nanogpt,
    number,
    race,
    transformers_model,
    wall_clock,
)
from nanopause.engine import Engine
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

SMALL = GPT2 | dict(n_layer=3, n_head=4, n_embd=128)  # that of `train.py config/gpt2.py`
SMOLLM2 = LLAMA | dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_mlp=1536)  # SmolLM2-135M's shape
# Small ones first: memory that large ones free stays with the process, and who allocates much anew, as transformers
# does for prompts and its growing cache, is spared the page faults that it has in a process of its own.
MODELS = {
    "small": ("bytes", SMALL),
    "small, GPT-2's vocabulary": ("gpt2", SMALL),
    "124M": ("gpt2", GPT2 | dict(n_layer=12, n_head=12, n_embd=768)),
    "Llama 135M": ("gpt2", SMOLLM2),
}


class Problem:
    """A model with random weights, and prompts [batch, context], or with their pauses behind them,
    [batch, context + pauses]."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.shape, self.n_new = shape, shape["new"]
        length = shape["context"] + shape["pauses"] + shape["new"]
        name, size = MODELS[shape["model"]]
        self.tokenizer = load_tokenizer(name)
        self.model = GPT(GPTConfig(vocab_size=self.tokenizer.vocab_size, block_size=length, **size)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():  # initial weights repeat one token
                if parameter.ndim == 2:
                    parameter.normal_(std=0.05)
            self.model.head.weight[self.tokenizer.eot_id :] = 0  # nobody ends, nobody pauses
        self.model.to(device, dtype)
        self.prompts = torch.randint(self.tokenizer.eot_id, (shape["batch"], shape["context"]), device=device)
        self.with_pauses = F.pad(self.prompts, (0, shape["pauses"]), value=self.tokenizer.pause_id)


# n → the next n tokens of every prompt, [batch, n], and when all had their first, by perf_counter.
Generate = Callable[[int], tuple[Tensor, float]]


def ours(problem: Problem) -> Generate:
    engine = Engine(problem.model, problem.tokenizer, max_batch=len(problem.prompts))
    prompts = problem.prompts.tolist()

    def generate(n: int) -> tuple[Tensor, float]:
        ids, first = [[] for _ in prompts], 0.0
        for token in engine.stream(prompts, problem.shape["pauses"], max_new_tokens=n, temperature=0):
            ids[token.sequence].append(token.id)
            first = first or (perf_counter() if all(ids) else 0.0)
        return torch.tensor(ids), first

    return generate


def transformers(problem: Problem, **options) -> Generate:
    from transformers import StoppingCriteriaList

    theirs = transformers_model(problem.model).eval()

    def generate(n: int) -> tuple[Tensor, float]:
        times = []

        def look(ids, scores, **_):
            if not times:
                ids[0, -1].item()  # waits
                times.append(perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        tokens = problem.with_pauses
        made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, min_new_tokens=n,
                               do_sample=False, pad_token_id=0, stopping_criteria=StoppingCriteriaList([look]),
                               **options)  # fmt: skip
        return made[:, tokens.shape[1] :].cpu(), times[0]

    return generate


def loop(problem: Problem) -> Generate:
    @torch.inference_mode()
    def generate(n: int) -> tuple[Tensor, float]:
        tokens = problem.with_pauses
        for _ in range(n):
            last = problem.model.hidden(tokens)[:, -1:]
            tokens = torch.cat((tokens, problem.model.head(last).argmax(-1)), 1)
        return tokens[:, -n:].cpu(), 0.0

    return generate


def nanogpt_generate(problem: Problem, path: str) -> Generate:
    theirs = nanogpt(path, problem.model).eval()

    def generate(n: int) -> tuple[Tensor, float]:
        made = theirs.generate(problem.with_pauses, n, top_k=1)  # which is greedy
        return made[:, -n:].cpu(), 0.0

    return generate


def rivals(path: str) -> tuple[Rival, ...]:
    return (
        Rival("transformers", "transformers", transformers),
        Rival("transformers, static cache", "transformers", partial(transformers, cache_implementation="static")),
        Rival("nanoGPT", Path(path, "model.py"), partial(nanogpt_generate, path=path)),
        Rival("no cache", "torch", loop),
    )


WITHOUT_CACHE = ("nanoGPT", "no cache")


def shapes(device: str, quick: bool) -> list[Shape]:
    """Against batch, context and pauses, one at a time from 8 prompts of 512 tokens without pauses."""
    if quick:
        return [{"model": "small", "batch": 2, "context": 32, "pauses": pauses, "new": 16} for pauses in (0, 10)]
    large = device == "cuda"
    cases, new = [(model, batch, 512, 0) for batch in (8, 1) for model in MODELS], 128 if large else 64
    swept = "124M" if large else "small"
    cases += [(swept, 8, 512, pauses) for pauses in (10, 50)]
    cases += [(swept, batch, 512, 0) for batch in ((32, 128) if large else (32,))]
    cases += [(swept, 8, context, 0) for context in ((4096, 16384) if large else (128, 2048))]
    cases.sort(key=lambda case: list(MODELS).index(case[0]))
    return [dict(zip(("model", "batch", "context", "pauses", "new"), (*case, new))) for case in cases]


def bytes_of_a_step(problem: Problem) -> int:
    """What a step after the prompts reads, at the mean of their lengths: every matrix once, and keys and values."""
    config, shape = problem.model.config, problem.shape
    weights = sum(x.numel() for x in problem.model.parameters() if x.ndim == 2)
    if config.position == "learned":
        weights -= config.block_size * config.n_embd  # a row of it is read
    keys = 2 * config.n_layer * config.n_kv_head * config.head_width
    length = shape["context"] + shape["pauses"] + shape["new"] // 2
    return problem.model.head.weight.itemsize * (weights + shape["batch"] * length * keys)


def measure(bench: Bench, shape: Shape, nanogpt: str) -> None:
    problem = Problem(shape, bench.device, bench.dtype)
    calls = {OURS: ours(problem)} | bench.functions(rivals(nanogpt), problem, shape)
    n_of = {name: 1 if name in WITHOUT_CACHE else shape["new"] for name in calls}
    expected, differ = None, {}
    for name, generate in list(calls.items()):
        try:
            said, _ = generate(n_of[name])
            expected = said if expected is None else expected
            others = said != expected[:, : said.shape[1]]
            differ[name] = others.float().mean().item()
            # In bfloat16 two close tokens may change places, and the texts part there: few do at their first token.
            part = others if bench.dtype == torch.float32 else others[:, 0].float().mean() > 0.25
            if part.any():
                raise Wrong(f"{differ[name]:.1%} of the tokens are others")
        except Exception as error:
            if name == OURS:
                raise
            bench.lack(name, shape, first_line(error))
            del calls[name]
    late = {name: [] for name in calls}  # seconds a token from the first on

    def whole(name: str) -> None:
        _, first = calls[name](n_of[name])  # its tokens come to the host: nothing is left to wait for
        late[name].append((perf_counter() - first) / max(n_of[name] - 1, 1))

    samples = race({name: partial(whole, name) for name in calls}, wall_clock, 10 * bench.seconds)
    seconds = {name: [x / n_of[name] for x in samples[name]] for name in calls}
    # Without a cache there is no other pass than that over everything.
    after = {name: (seconds if name in WITHOUT_CACHE else late)[name][-len(samples[name]) :] for name in calls}
    peak, read = bench.header["peak_bytes_per_second"], bytes_of_a_step(problem)
    for name in calls:
        speed = None if name in WITHOUT_CACHE else read / median(after[name])
        facts = {"error": differ[name], "gbps": speed and speed / 1e9,
                 "percent_of_peak": peak and speed and 100 * speed / peak}  # fmt: skip
        for what, samples in (("prompts included", seconds), ("after the prompts", after)):
            row = bench.row(what, shape, name, samples[name], samples[OURS], **facts)
            bench.rows.append(row | {"tokens_per_second": shape["batch"] / median(samples[name])})
    line = ", ".join(f"{name} {number(shape['batch'] / median(samples))}" for name, samples in seconds.items())
    print(f"generate: {label(shape)}, tokens/s: {line}", file=sys.stderr, flush=True)


def main(quick: bool = False, nanogpt: str = "") -> None:
    """Tokens per second of generation, beside rivals.

    Args:
        quick: A small model, two shapes.
        nanogpt: A checkout of github.com/karpathy/nanoGPT. Empty: it is missing.
    """
    bench = Bench("generate", quick, minutes=15)
    for shape in shapes(bench.device.type, quick):
        bench.attempt(measure, shape, nanogpt)
    bench.write()
    bench.show(
        lambda row: f"{row['what']}: tokens per second, and how many times faster ours is",
        lambda row: f"{number(row['tokens_per_second'])} {row['ratio']:5.2f}",
        first={"ours": lambda row: number(row["tokens_per_second"])},
        last={"GB/s of a step": lambda rows: number(rows[OURS]["gbps"]),
              "of the memory's": lambda rows: f"{p:.0f}%" if (p := rows[OURS]["percent_of_peak"]) else DASH},
    )  # fmt: skip
    bench.finish()
