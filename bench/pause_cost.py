"""What a pause costs: FLOPs and time of M pauses in one pass, beside other ways to spend as much.

    step      a token in the middle of generation and M pauses behind it, beside the pauses fed one by one, and beside M
              more tokens of a chain of thought, which have to be said one by one
    prefix    a prompt and M pauses behind it, beside the pauses one by one, and beside the prompt alone in models whose
              layers or heads are as many more as take the FLOPs of the pauses [Goyal et al. 2023, appendix I]
    decode    a later token, behind the pauses or of those models: pauses are paid once, layers and heads for ever

All are forward passes of the engine (generation.runner.Runner.append) over `batch` sequences, and the likeliest next
token at the end of the last, in GPT-2 124M with random weights; what is fed or said one by one is one chain.
The cache holds random keys and values of `context` tokens before a step; the prompt is `context` tokens, and the cache
empty before it. (Where it generates, the engine's last block leaves out the rows that nobody reads; here it has all.)
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import GPT2, OURS, TOLERANCE, Bench, Shape, check, label, number, race
from nanopause.engine import Engine
from nanopause.flops import forward_flops
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

WITHOUT, SEQUENTIAL, THOUGHT, LAYERS, HEADS = "without", "sequential", "chain of thought", "more layers", "more heads"
PAUSES = (1, 2, 4, 8, 16, 32, 50)


def config_of(quick: bool, length: int) -> GPTConfig:
    shape = dict(n_layer=2, n_head=4, n_embd=64) if quick else dict(n_layer=12, n_head=12, n_embd=768)
    return GPTConfig(vocab_size=50304, block_size=length, **shape, **GPT2)


def shapes(device: str, quick: bool) -> list[Shape]:
    """The most telling first: what there is no time for is listed as missing. A GPU's passes have 2ⁿ tokens: there a
    prompt leaves room for its pauses, or they would cost another prompt's time."""
    if quick:
        return [{"what": what, "batch": 2, "context": 64} for what in ("step", "prefix")]
    first = [("step", 1, 1024), ("prefix", 1, 1024), ("step", 8, 1024), ("step", 1, 4096), ("step", 1, 256),
             ("prefix", 1, 256), ("step", 8, 256), ("step", 32, 256), ("prefix", 8, 256)]  # fmt: skip
    rest = [("step", 8, 4096), ("step", 32, 1024), ("step", 32, 4096), ("prefix", 1, 4096), ("prefix", 8, 1024),
            ("prefix", 32, 256), ("prefix", 32, 1024), ("prefix", 8, 4096), ("prefix", 32, 4096)]  # fmt: skip
    room = 64 if device == "cuda" else 0
    return [{"what": what, "batch": batch, "context": context - room * (what == "prefix")}
            for what, batch, context in first + rest]  # fmt: skip


def larger_of(device: str, shape: Shape) -> tuple[str, ...]:
    """Which larger models a prompt has beside it: on a CPU none where their passes would take many minutes."""
    return () if device != "cuda" and shape["batch"] * shape["context"] > 8192 else (LAYERS, HEADS)


def flops(config: GPTConfig, batch: int, context: int, n: int, logits: bool = True) -> np.ndarray:
    """Of a pass over n tokens a sequence, with a row of logits each or none: by formula, and counted by PyTorch."""
    with torch.device("meta"):
        model, tokens = GPT(config), torch.zeros(batch, n, dtype=torch.int64)
        positions = torch.arange(context, context + n).expand(batch, n)
        cache = model.new_cache(batch, context + n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = model.hidden(tokens, positions=positions, cache=cache)
        if logits:
            model.head(x[:, -1])
    formula = forward_flops(config, n, batch_size=batch, context=context, n_live=batch * logits)
    return np.array([formula, counter.get_total_flops()])


def flops_one_by_one(config: GPTConfig, batch: int, context: int, n: int, logits: bool) -> np.ndarray:
    """The same of n passes of one token; each takes as many more than the one before."""
    ends = (flops(config, batch, place, 1, logits) for place in (context, context + n - 1))
    return n * sum(ends) // 2


def of_equal_flops(config: GPTConfig, name: str, n: int, m: int) -> GPTConfig:
    """With more layers, or more heads of the same width: so many that a prompt of n tokens comes nearest to the FLOPs
    that `config` needs for n tokens and m pauses."""
    if name == LAYERS:
        larger = [replace(config, n_layer=i) for i in range(config.n_layer, 4 * config.n_layer)]
    else:
        more = range(config.n_head, 4 * config.n_head)
        larger = [replace(config, n_head=i, n_kv_head=i, head_dim=config.head_width) for i in more]
    goal = forward_flops(config, n + m, n_live=1)
    return min(larger, key=lambda each: abs(forward_flops(each, n, n_live=1) - goal))


Moment = float | torch.cuda.Event


class Run:
    """An engine of `batch` sequences whose cache is full of random numbers, and what may follow them."""

    def __init__(self, bench: Bench, config: GPTConfig, batch: int):
        self.config, self.n, self.device, tokenizer = config, batch, bench.device, load_tokenizer("gpt2")
        torch.manual_seed(0)
        self.engine = Engine(GPT(config).eval().to(bench.device, bench.dtype), tokenizer, max_batch=batch)
        self.text = torch.randint(tokenizer.eot_id, (batch, config.block_size), device=bench.device)
        self.pauses = torch.full((batch, max(PAUSES)), tokenizer.pause_id, device=bench.device)
        self.engine.runner.cache.normal_()

    def append(self, tokens: Tensor) -> Tensor:
        return self.engine.runner.append(tokens, torch.full((self.n,), tokens.shape[1], device=self.device))

    def now(self) -> Moment:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def between(begin: Moment, end: Moment) -> float:
    """Seconds."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3


class Chain:
    """A candidate: passes one behind the other, after `held` tokens. parts: the tokens of each, or None for those that
    the pass before it said.

    It is timed on its way, behind the passes that `looks` numbers: what so many passes take and the likeliest token
    behind them. That of an earlier look is taken out, unless it was read: so one chain has the times of all lengths."""

    def __init__(self, run: Run, held: int, parts: list[Tensor | None], looks: Sequence[int] = (0,)):
        self.run, self.held, self.parts, self.looks = run, held, parts, looks
        self.said: list[Tensor] = []  # tokens that were read
        self.hidden: dict[int, Tensor] = {}  # by look: the last hidden state, [batch, C]
        self.calls: list[tuple[Moment, list[tuple[int, bool, Moment, Moment]]]] = []

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        run, spoken, self.said = self.run, [], []
        run.engine.runner.slots.length[: run.n] = self.held
        start = run.now()
        for i, part in enumerate(self.parts):
            x = run.append(self.said[-1] if part is None else part)[:, -1]
            is_read = i + 1 < len(self.parts) and self.parts[i + 1] is None
            if i in self.looks or is_read:
                begin = run.now()
                self.hidden[i] = x.clone()
                token = run.engine.model.head(x).argmax(-1, keepdim=True)
                spoken.append((i, is_read, begin, run.now()))
                self.said += [token] * is_read
        self.calls.append((start, spoken))
        return self.hidden

    def seconds(self, look: int) -> list[float]:
        """Of every call so far."""
        samples = []
        for start, spoken in self.calls:
            unread = 0.0
            for i, is_read, begin, end in spoken:
                if i == look:
                    samples.append(between(start, end) - unread)
                unread += 0 if is_read else between(begin, end)
        return samples


class Case(NamedTuple):
    """What a row is of: a chain up to a look. flops: by formula, and counted. truth: the last hidden state in another
    way, by chain and look."""

    chain: Chain
    look: int
    flops: np.ndarray
    truth: tuple[Chain, int] | None = None


def compete(bench: Bench, what: str, shape: Shape, cases: dict[tuple[int, str], Case]) -> None:
    """Rows of cases by pauses and name; (0, WITHOUT) is what all are compared with. Raises Wrong where a timed call
    came to another state than its truth."""
    # A chain keeps the times of every call: one is a sample.
    samples = race({case.chain: case.chain for case in cases.values()}, lambda call, _: bench.sample(call, 1),
                   bench.seconds)  # fmt: skip
    errors = {}
    for key, case in cases.items():
        if case.truth is not None:
            expected, got = {"hidden": case.truth[0].hidden[case.truth[1]]}, {"hidden": case.chain.hidden[case.look]}
            errors[key] = check(got, expected, TOLERANCE[bench.dtype])
    times = {key: case.chain.seconds(case.look)[-len(samples[case.chain]) :] for key, case in cases.items()}
    base, without = times[0, WITHOUT], cases[0, WITHOUT].flops
    for (m, name), (chain, _, flops, _) in cases.items():
        its, seconds = {key: shape[key] for key in ("batch", "context")} | {"pauses": m}, times[m, name]
        added = (flops - without) / m if m else (None, None)
        bench.rows.append(bench.row(
            what, its, name, seconds, base,
            added_ms_per_pause=1e3 * float(np.median(np.subtract(seconds, base))) / m if m else None,
            flops=int(flops[0]), flops_counted=int(flops[1]), flops_ratio=float(flops[0] / without[0]),
            flops_per_pause=added[0], flops_per_pause_counted=added[1],
            n_layer=chain.run.config.n_layer, n_head=chain.run.config.n_head, error=errors.get((m, name)),
        ))  # fmt: skip
    print(
        f"pause_cost: {label(shape | {'what': what})}: {1e3 * np.median(base):.1f} ms without pauses", file=sys.stderr
    )


def measure(bench: Bench, shape: Shape) -> None:
    """Rows for every number of pauses, of ours and of the other ways."""
    n, context, what = shape["batch"], shape["context"], shape["what"]
    held, new = (context, 1) if what == "step" else (0, context)
    m = max(PAUSES)
    config = config_of(bench.quick, context + m + 1)
    run = Run(bench, config, n)
    last, pauses = run.text[:, held : held + new], run.pauses
    Chain(run, held, [last])()  # its first pass takes a sixth longer, and long races have no round to spare
    alone = flops(config, n, held, new)
    one_by_one = Chain(run, held, [last, *[pauses[:, :1]] * m], (0, *PAUSES))
    cases = {(0, WITHOUT): Case(one_by_one, 0, alone)}
    for i in PAUSES:
        one_pass = Chain(run, held, [torch.cat((last, pauses[:, :i]), 1)])
        cases[i, OURS] = Case(one_pass, 0, flops(config, n, held, new + i), (one_by_one, i))
        more = flops_one_by_one(config, n, held + new, i, logits=False)
        cases[i, SEQUENTIAL] = Case(one_by_one, i, alone + more, (one_pass, 0))
    if what == "step":
        thought = Chain(run, held, [last, *[None] * m], PAUSES)
        thought()
        # What was said must come to the same states where it is read in a few passes.
        said, pieces = torch.cat(thought.said, 1), list(pairwise((0, *PAUSES)))
        again = Chain(run, held, [last, *(said[:, i:j] for i, j in pieces)], range(1, 1 + len(PAUSES)))
        again()
        for look, i in enumerate(PAUSES, 1):
            more = flops_one_by_one(config, n, held + new, i, logits=True)
            cases[i, THOUGHT] = Case(thought, i, alone + more, (again, look))
        return compete(bench, what, shape, cases)
    token = last[:, -1:]
    later = {(0, WITHOUT): Case(Chain(run, context, [token]), 0, flops(config, n, context, 1)),
             (m, OURS): Case(Chain(run, context + m, [token]), 0, flops(config, n, context + m, 1))}  # fmt: skip
    for name in larger_of(bench.device.type, shape):
        larger = of_equal_flops(config, name, context, m)
        other = Run(bench, larger, n)
        cases[m, name] = Case(Chain(other, 0, [last]), 0, flops(larger, n, 0, context))
        later[m, name] = Case(Chain(other, context, [token]), 0, flops(larger, n, context, 1))
    compete(bench, "decode", shape, later)
    compete(bench, what, shape, cases)


def main(quick: bool = False, minutes: float = 7) -> None:
    """FLOPs and latency per added pause.

    Args:
        quick: A small model and two shapes, and 40 seconds.
        minutes: No shape is begun after them. With 100 two cores measure all, in about two hours.
    """
    bench = Bench("pause_cost", quick, minutes)
    bench.versions |= dict.fromkeys((WITHOUT, SEQUENTIAL, THOUGHT, LAYERS, HEADS), torch.__version__)
    for shape in shapes(bench.device.type, quick):
        bench.attempt(measure, shape)
    bench.write(model="a small model" if quick else "GPT-2 124M")
    without = {(row["what"], *list(row["shape"].values())[:2]): row["p50_ms"]
               for row in bench.rows if row["name"] == WITHOUT}  # fmt: skip

    def title(row: dict) -> str:
        batch, context = row["shape"]["batch"], row["shape"]["context"]
        alone = number(without[row["what"], batch, context])
        return f"{row['what']}, batch {batch}, context {context}, {alone} ms without pauses: p50, p90 in ms, times that"

    def times(row: dict) -> str:
        return f"{number(row['p50_ms'])} {number(row['p90_ms'])} {row['ratio']:5.2f}"

    bench.show(
        title, times,
        first={"one pass": times, "ms a pause": lambda row: number(row["added_ms_per_pause"]),
               "FLOPs": lambda row: f"{row['flops_ratio']:.2f}",
               "MFLOPs a pause": lambda row: number(row["flops_per_pause"] / 1e6 / row["shape"]["batch"]),
               "counted": lambda row: number(row["flops_per_pause_counted"] / 1e6 / row["shape"]["batch"])},
        hidden=("batch", "context"), rows=[row for row in bench.rows if row["name"] != WITHOUT],
    )  # fmt: skip
    bench.finish()
