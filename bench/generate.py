"""Tokens per second of generation, beside transformers, nanoGPT and a loop without a cache, with the same weights.

Every prompt is `context` random tokens, and gets `new` more, the likeliest; all must say the same. nanoGPT's generate
and our loop, which is written as it is, read the whole text anew for every token: they make one, and their seconds are
of that. What comes after the prompts is timed from the first token on; then a step reads all weights, and what is in
the cache, and the bytes of both over its time are a speed to hold against the memory's own.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from bench.harness import GPT2, OURS, Bench, Rival, Shape, Wrong, first_line, label, nanogpt, number, transformers_gpt2
from nanopause.engine import Engine
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

SMALL = dict(n_layer=3, n_head=4, n_embd=128)  # that of `train.py config/gpt2.py`
MODELS = {
    "124M": ("gpt2", dict(n_layer=12, n_head=12, n_embd=768)),
    "small": ("bytes", SMALL),
    "small, GPT-2's vocabulary": ("gpt2", SMALL),
}


class Problem:
    """A model of GPT-2's shape with random weights, and prompts."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.shape, self.n_new = shape, shape["new"]
        length = shape["context"] + shape["new"]
        name, size = MODELS[shape["model"]]
        self.tokenizer = load_tokenizer(name)
        self.model = GPT(GPTConfig(vocab_size=self.tokenizer.vocab_size, block_size=length, **size, **GPT2)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():  # initial weights repeat one token
                if parameter.ndim == 2:
                    parameter.normal_(std=0.05)
            self.model.head.weight[self.tokenizer.eot_id :] = 0  # nobody ends, nobody pauses
        self.model.to(device, dtype)
        self.prompts = torch.randint(self.tokenizer.eot_id, (shape["batch"], shape["context"]), device=device)


# n → the next n tokens of every prompt, [batch, n], and when all had their first, by perf_counter.
Generate = Callable[[int], tuple[Tensor, float]]


def ours(problem: Problem) -> Generate:
    engine = Engine(problem.model, problem.tokenizer, max_batch=len(problem.prompts))
    prompts = problem.prompts.tolist()

    def generate(n: int) -> tuple[Tensor, float]:
        ids, first = [[] for _ in prompts], 0.0
        for token in engine.stream(prompts, max_new_tokens=n, temperature=0):
            ids[token.sequence].append(token.id)
            first = first or (perf_counter() if all(ids) else 0.0)
        return torch.tensor(ids), first

    return generate


def transformers(problem: Problem, **options) -> Generate:
    from transformers import StoppingCriteriaList

    theirs = transformers_gpt2(problem.model).eval()

    def generate(n: int) -> tuple[Tensor, float]:
        times = []

        def look(ids, scores, **_):
            if not times:
                ids[0, -1].item()  # waits
                times.append(perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        made = theirs.generate(problem.prompts, attention_mask=torch.ones_like(problem.prompts), max_new_tokens=n,
                               min_new_tokens=n, do_sample=False, pad_token_id=0,
                               stopping_criteria=StoppingCriteriaList([look]), **options)  # fmt: skip
        return made[:, problem.prompts.shape[1] :].cpu(), times[0]

    return generate


def loop(problem: Problem) -> Generate:
    @torch.inference_mode()
    def generate(n: int) -> tuple[Tensor, float]:
        tokens = problem.prompts
        for _ in range(n):
            last = problem.model.hidden(tokens)[:, -1:]
            tokens = torch.cat((tokens, problem.model.head(last).argmax(-1)), 1)
        return tokens[:, problem.prompts.shape[1] :].cpu(), 0.0

    return generate


def nanogpt_generate(problem: Problem, path: str) -> Generate:
    theirs = nanogpt(path, problem.model).eval()

    def generate(n: int) -> tuple[Tensor, float]:
        made = theirs.generate(problem.prompts, n, top_k=1)  # which is greedy
        return made[:, problem.prompts.shape[1] :].cpu(), 0.0

    return generate


def rivals(path: str) -> tuple[Rival, ...]:
    return (
        Rival("transformers", "transformers", transformers),
        Rival("transformers, static cache", "transformers", partial(transformers, cache_implementation="static")),
        Rival("nanoGPT", "torch", partial(nanogpt_generate, path=path)),
        Rival("no cache", "torch", loop),
    )


WITHOUT_CACHE = ("nanoGPT", "no cache")


def shapes(device: str, quick: bool) -> list[Shape]:
    if quick:
        return [{"model": "small", "batch": 2, "context": 32, "new": 16}]
    pairs, new = [(model, batch, 512) for batch in (8, 1) for model in MODELS], 64
    if device == "cuda":
        pairs, new = [*pairs, ("124M", 32, 512), ("124M", 1, 4096), ("124M", 8, 4096)], 256
    return [{"model": model, "batch": batch, "context": context, "new": new} for model, batch, context in pairs]


def bytes_of_a_step(problem: Problem) -> int:
    """What a step after the prompts reads, at the mean of their lengths: every matrix once, and keys and values."""
    config, shape = problem.model.config, problem.shape
    weights = sum(x.numel() for x in problem.model.parameters() if x.ndim == 2)
    if config.position == "learned":
        weights -= config.block_size * config.n_embd  # a row of it is read
    keys = 2 * config.n_layer * config.n_kv_head * config.head_width
    return problem.model.head.weight.itemsize * (
        weights + shape["batch"] * (shape["context"] + shape["new"] // 2) * keys
    )


def measure(bench: Bench, shape: Shape, nanogpt: str) -> None:
    problem = Problem(shape, bench.device, bench.dtype)
    calls = {OURS: ours(problem)} | bench.functions(rivals(nanogpt), problem, shape)
    n_of = {name: 1 if name in WITHOUT_CACHE else shape["new"] for name in calls}
    expected, differ = None, {}
    for name, generate in list(calls.items()):
        try:
            said, _ = generate(n_of[name])
            expected = said if expected is None else expected
            # In bfloat16 two close tokens may change places, and the texts part there.
            differ[name] = (said != expected[:, : said.shape[1]]).float().mean().item()
            if differ[name] and bench.dtype == torch.float32:
                raise Wrong(f"{differ[name]:.1%} of the tokens are others")
        except Exception as error:
            if name == OURS:
                raise
            bench.lack(name, shape, first_line(error))
            del calls[name]
    seconds, after = ({name: [] for name in calls} for _ in "ab")
    for _ in range(3):
        for name, generate in calls.items():
            start = perf_counter()
            _, first = generate(n_of[name])  # its tokens come to the host: nothing is left to wait for
            end = perf_counter()
            seconds[name].append((end - start) / n_of[name])
            # Without a cache there is no other pass than that over everything.
            after[name].append(seconds[name][-1] if name in WITHOUT_CACHE else (end - first) / (n_of[name] - 1))

    def ratio(samples: dict[str, list[float]], name: str) -> float:
        return float(np.median(np.divide(samples[name], samples[OURS])))

    peak, read = bench.header["peak_bytes_per_second"], bytes_of_a_step(problem)
    for name in calls:
        speed = None if name in WITHOUT_CACHE else read / median(after[name])
        p10, p50, p90 = np.percentile(np.multiply(seconds[name], 1e3), (10, 50, 90)).tolist()
        bench.rows.append({
            "what": "generate", "shape": shape, "name": name, "version": bench.versions[name],
            "samples": len(seconds[name]), "p10_ms": p10, "p50_ms": p50, "p90_ms": p90,
            "tokens_per_second": shape["batch"] / median(seconds[name]), "ratio": ratio(seconds, name),
            "tokens_per_second_after_prompt": shape["batch"] / median(after[name]),
            "ratio_after_prompt": ratio(after, name), "gbps": speed and speed / 1e9,
            "percent_of_peak": peak and speed and 100 * speed / peak, "error": differ[name],
        })  # fmt: skip
    line = ", ".join(f"{row['name']} {number(row['tokens_per_second'])}" for row in bench.rows if row["shape"] is shape)
    print(f"generate: {label(shape)}, tokens/s: {line}", flush=True)


def main(quick: bool = False, nanogpt: str = "") -> None:
    """Tokens per second of generation, beside rivals.

    Args:
        quick: A small model, one shape.
        nanogpt: A checkout of github.com/karpathy/nanoGPT. Empty: it is missing.
    """
    bench = Bench("generate", quick)
    for shape in shapes(bench.device.type, quick):
        if bench.begin(shape):
            measure(bench, shape, nanogpt)
    for what, suffix in (("prompts included", ""), ("after the prompts", "_after_prompt")):
        bench.show(
            lambda row, what=what: f"{what}: tokens per second, and how many times faster ours is",
            lambda row, of=suffix: f"{number(row['tokens_per_second' + of])} {row['ratio' + of]:5.2f}",
            first={"ours": lambda row, of=suffix: number(row["tokens_per_second" + of])},
            last={"GB/s": lambda rows: number(rows[OURS]["gbps"])} if suffix else None,
        )
    bench.finish()
