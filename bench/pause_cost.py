"""What a pause costs: FLOPs and time of M pauses in one pass, beside other ways to spend as much.

    step      a token in the middle of generation and M pauses behind it, beside the pauses fed one by one, and beside M
              more tokens of a chain of thought, which have to be said one by one
    prefix    a prompt and M pauses behind it, beside the pauses one by one, and beside the prompt alone in models whose
              layers or heads are as many more as take the FLOPs of the pauses [Goyal et al. 2023, appendix I]
    decode    a later token, behind the pauses or of those models: pauses are paid once, layers and heads for ever

All are passes of the engine (nanopause.engine.Engine.append) over `batch` sequences, and the likeliest next token at
the end of the last, in GPT-2 124M with random weights. The cache holds random keys and values of `context` tokens
before a step; the prompt is `context` tokens, and the cache empty before it.
"""

import sys
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import GPT2, OURS, TOLERANCE, Bench, Candidate, Shape, check, label, number, race
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


def one_by_one_of(device: str, shape: Shape) -> tuple[int, ...]:
    """How many pauses are fed one by one: on a CPU not of all numbers, so that all shapes can be measured."""
    if device == "cuda":
        return PAUSES
    if shape["what"] == "prefix":
        return (8,)
    return (1, 8, 50) if shape["batch"] == 1 and shape["context"] == 1024 else (1, 8)


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


class Run:
    """An engine of `batch` sequences whose cache is full of random numbers, and what may follow them."""

    def __init__(self, bench: Bench, config: GPTConfig, batch: int):
        self.config, self.n, self.device, tokenizer = config, batch, bench.device, load_tokenizer("gpt2")
        torch.manual_seed(0)
        self.engine = Engine(GPT(config).eval().to(bench.device, bench.dtype), tokenizer, max_batch=batch)
        self.text = torch.randint(tokenizer.eot_id, (batch, config.block_size), device=bench.device)
        self.pauses = torch.full((batch, max(PAUSES)), tokenizer.pause_id, device=bench.device)
        self.engine.cache.normal_()

    def _append(self, tokens: Tensor) -> Tensor:
        return self.engine.append(tokens, torch.full((self.n,), tokens.shape[1], device=self.device))

    def call(self, held: int, *parts: Tensor, thoughts: int = 0) -> Candidate:
        """After `held` tokens append parts one after the other, and then the likeliest token again and again; returns
        the last hidden state and the tokens that were said but for the last."""
        head = self.engine.model.head

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            self.engine.length[: self.n] = held
            said = self.text[:, :0]
            for part in parts:
                x = self._append(part)
            token = head(x[:, -1]).argmax(-1, keepdim=True)
            for _ in range(thoughts):
                said = torch.cat((said, token), 1)
                x = self._append(token)
                token = head(x[:, -1]).argmax(-1, keepdim=True)
            return {"hidden": x[:, -1].clone(), "said": said}

        return run

    @torch.no_grad()
    def after(self, held: int, last: Tensor) -> dict[int, Tensor]:
        """After `held` tokens and `last` the hidden state at each number of pauses, which are fed from one to the
        next."""
        self.engine.length[: self.n] = held
        self._append(last)
        pieces = pairwise((0, *PAUSES))
        return {m: self._append(self.pauses[:, before:m])[:, -1].clone() for before, m in pieces}


class Case(NamedTuple):
    """flops: by formula, and counted. truth: the last hidden state, found in another way."""

    call: Candidate
    flops: np.ndarray
    config: GPTConfig
    truth: Tensor | None = None


def compete(bench: Bench, what: str, shape: Shape, cases: dict[tuple[int, str], Case]) -> None:
    """Rows of cases by pauses and name; (0, WITHOUT) is what all are compared with. Raises Wrong where a timed call
    returned something else than its truth."""
    returned, errors = {}, {}

    def keeps(key: tuple[int, str], call: Candidate) -> Candidate:
        return lambda: returned.update({key: call()["hidden"]})

    samples = race({key: keeps(key, case.call) for key, case in cases.items()}, bench.sample, bench.seconds)
    for key, case in cases.items():
        if case.truth is not None:
            errors[key] = check({"hidden": returned[key]}, {"hidden": case.truth}, TOLERANCE[bench.dtype])
    base, without = samples[0, WITHOUT], cases[0, WITHOUT].flops
    for (m, name), seconds in samples.items():
        case, its = cases[m, name], {key: shape[key] for key in ("batch", "context")} | {"pauses": m}
        added = (case.flops - without) / m if m else (None, None)
        bench.rows.append(bench.row(
            what, its, name, seconds, base,
            added_ms_per_pause=1e3 * float(np.median(np.subtract(seconds, base))) / m if m else None,
            flops=int(case.flops[0]), flops_counted=int(case.flops[1]),
            flops_ratio=float(case.flops[0] / without[0]),
            flops_per_pause=added[0], flops_per_pause_counted=added[1],
            n_layer=case.config.n_layer, n_head=case.config.n_head, error=errors.get((m, name)),
        ))  # fmt: skip
    print(
        f"pause_cost: {label(shape | {'what': what})}: {1e3 * np.median(base):.1f} ms without pauses", file=sys.stderr
    )


def measure(bench: Bench, shape: Shape) -> None:
    """Rows for every number of pauses, of ours and of the other ways."""
    n, context, what = shape["batch"], shape["context"], shape["what"]
    held, new = (context, 1) if what == "step" else (0, context)
    config = config_of(bench.quick, context + max(PAUSES) + 1)
    run = Run(bench, config, n)
    last, pauses = run.text[:, held : held + new], run.pauses
    cases = {(0, WITHOUT): Case(run.call(held, last), flops(config, n, held, new), config)}
    truths = run.after(held, last)
    for m, truth in truths.items():
        call = run.call(held, torch.cat((last, pauses[:, :m]), 1))
        cases[m, OURS] = Case(call, flops(config, n, held, new + m), config, truth)
    for m in one_by_one_of(bench.device.type, shape):
        call = run.call(held, last, *[pauses[:, :1]] * m)
        cost = cases[0, WITHOUT].flops + flops_one_by_one(config, n, held + new, m, logits=False)
        cases[m, SEQUENTIAL] = Case(call, cost, config, truths[m])
        if what == "step":
            cost = cases[0, WITHOUT].flops + flops_one_by_one(config, n, held + new, m, logits=True)
            call = run.call(held, last, thoughts=m)
            # What was said must end in the same state when it is read in one pass.
            again = run.call(held, torch.cat((last, call()["said"]), 1))
            cases[m, THOUGHT] = Case(call, cost, config, again()["hidden"])
    if what == "step":
        return compete(bench, what, shape, cases)
    m = max(PAUSES)
    token = last[:, -1:]
    later = {(0, WITHOUT): Case(run.call(context, token), flops(config, n, context, 1), config),
             (m, OURS): Case(run.call(context + m, token), flops(config, n, context + m, 1), config)}  # fmt: skip
    for name in larger_of(bench.device.type, shape):
        larger = of_equal_flops(config, name, context, m)
        other = Run(bench, larger, n)
        cases[m, name] = Case(other.call(0, last), flops(larger, n, 0, context), larger)
        later[m, name] = Case(other.call(context, token), flops(larger, n, context, 1), larger)
    compete(bench, "decode", shape, later)
    compete(bench, what, shape, cases)


def main(quick: bool = False, minutes: float = 7) -> None:
    """FLOPs and latency per added pause.

    Args:
        quick: A small model and two shapes, and 40 seconds.
        minutes: No shape is begun after them. With 100 two cores measure all, in 130.
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
