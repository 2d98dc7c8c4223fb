"""What a pause costs: FLOPs and time of M pauses in one pass, beside M passes of one pause each.

    step      a token in the middle of generation, and M pauses behind it
    prefix    a prompt, and M pauses behind it

Each is the engine's one operation (nanopause.engine.Engine.append) on a cache that holds `context` tokens of `batch`
sequences, of GPT-2 124M with random weights; for a prefix the prompt is `context` tokens, and the cache is empty.
"""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import GPT2, OURS, RIVALS_TOLERANCE, Bench, Shape, check, number, race
from nanopause.engine import Engine
from nanopause.flops import forward_flops
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

SEQUENTIAL, WITHOUT = "sequential", "without"
PAUSES = (1, 2, 4, 8, 16, 32, 50)


def config_of(quick: bool, length: int) -> GPTConfig:
    shape = dict(n_layer=2, n_head=4, n_embd=64) if quick else dict(n_layer=12, n_head=12, n_embd=768)
    return GPTConfig(vocab_size=50304, block_size=length, **shape, **GPT2)


def shapes(quick: bool) -> list[Shape]:
    """The most telling first: what there is no time for is listed as missing."""
    if quick:
        return [{"what": what, "batch": 2, "context": 64} for what in ("step", "prefix")]
    steps = [(1, 256), (8, 256), (1, 1024), (8, 1024), (32, 256), (1, 4096), (32, 1024), (8, 4096), (32, 4096)]
    prefixes = [(1, 256), (1, 1024), (8, 256), (8, 1024), (1, 4096), (32, 256), (32, 1024), (8, 4096), (32, 4096)]
    pairs = [("step", *step) for step in steps[:4]] + [("prefix", *prefix) for prefix in prefixes[:3]]
    pairs += [("step", *step) for step in steps[4:]] + [("prefix", *prefix) for prefix in prefixes[3:]]
    return [{"what": what, "batch": batch, "context": context} for what, batch, context in pairs]


def pauses_of(device: str, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many pauses go into one pass, and how many are fed one by one: on a CPU not so many that little else could be
    measured."""
    if device == "cuda":
        return PAUSES, PAUSES
    if shape["what"] == "prefix":
        return PAUSES[::3], PAUSES[:4:3]
    return PAUSES, PAUSES if shape["batch"] == 1 else PAUSES[:4]


def flops(config: GPTConfig, batch: int, context: int, n: int) -> tuple[int, int]:
    """Of a pass over n tokens a sequence, with one row of logits a sequence: by formula, and counted by PyTorch."""
    with torch.device("meta"):
        model, tokens = GPT(config), torch.zeros(batch, n, dtype=torch.int64)
        positions = torch.arange(context, context + n).expand(batch, n)
        cache = model.new_cache(batch, context + n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.hidden(tokens, positions=positions, cache=cache)[:, -1])
    formula = forward_flops(config, n, batch_size=batch, context=context, n_live=batch)
    return formula, counter.get_total_flops()


def measure(bench: Bench, shape: Shape) -> None:
    """Rows of ours and of sequential for every number of pauses, and one of the pass without."""
    n, context, device = shape["batch"], shape["context"], bench.device
    held, new = (context, 1) if shape["what"] == "step" else (0, context)
    config, tokenizer = config_of(bench.quick, context + max(PAUSES) + 1), load_tokenizer("gpt2")
    torch.manual_seed(0)
    model = GPT(config).eval().to(device, bench.dtype)
    engine = Engine(model, tokenizer, max_batch=n)
    text = torch.randint(tokenizer.eot_id, (n, context + 1), device=device)
    pause = torch.full((n, max(PAUSES)), tokenizer.pause_id, device=device)
    count = lambda q: torch.full((n,), q, device=device)  # noqa: E731

    def call(*parts: torch.Tensor):
        """Append parts one after the other, and return the last hidden state."""
        counts = [count(part.shape[1]) for part in parts]

        def run():
            engine.length[:n] = held
            for part, q in zip(parts, counts):
                x = engine.append(part, q)
            return {"hidden": x[:, -1].clone()}

        return run

    engine.length[:n] = 0
    for i in range(0, held, 512):
        engine.append(text[:, i : min(i + 512, held)], count(min(512, held - i)))
    last = text[:, held : held + new]
    at_once, one_by_one = pauses_of(device.type, shape)
    calls = {(0, WITHOUT): call(last)}
    calls |= {(m, OURS): call(torch.cat((last, pause[:, :m]), 1)) for m in at_once}
    calls |= {(m, SEQUENTIAL): call(last, *[pause[:, :1]] * m) for m in one_by_one}
    errors = {}
    for (m, name), run in calls.items():
        if name == SEQUENTIAL:
            errors[m] = check(calls[m, OURS](), run(), RIVALS_TOLERANCE[bench.dtype])
    samples = race(calls, bench.sample, bench.seconds)
    base = samples[0, WITHOUT]
    formula_without, counted_without = flops(config, n, held, new)
    for (m, name), seconds in samples.items():
        p10, p50, p90 = (1e3 * np.percentile(seconds, (10, 50, 90))).tolist()
        formula, counted = flops(config, n, held, new + m)
        bench.rows.append({
            "what": shape["what"], "shape": {key: shape[key] for key in ("batch", "context")} | {"pauses": m},
            "name": name, "samples": len(seconds), "p10_ms": p10, "p50_ms": p50, "p90_ms": p90,
            # The median of the rounds' ratios and differences: what slows a whole round down cancels out.
            "ratio": float(np.median(np.divide(seconds, base))),
            "added_ms_per_pause": 1e3 * float(np.median(np.subtract(seconds, base))) / m if m else None,
            "flops": formula, "flops_counted": counted, "flops_ratio": formula / formula_without,
            "flops_per_pause": (formula - formula_without) / m if m else None,
            "flops_per_pause_counted": (counted - counted_without) / m if m else None,
            "error": errors.get(m, 0.0),
        })  # fmt: skip
    print(
        f"pause_cost: {' '.join(map(str, shape.values()))}: {1e3 * np.median(base):.1f} ms without pauses", flush=True
    )


def main(quick: bool = False) -> None:
    """FLOPs and latency per added pause.

    Args:
        quick: A small model and two shapes, in less than two minutes.
    """
    bench = Bench("pause_cost", quick)
    bench.versions[SEQUENTIAL] = torch.__version__
    for shape in shapes(quick):
        if bench.begin(shape):
            measure(bench, shape)
    without = {(row["what"], *list(row["shape"].values())[:2]): row["p50_ms"]
               for row in bench.rows if row["name"] == WITHOUT}  # fmt: skip
    rows, bench.rows = bench.rows, [row for row in bench.rows if row["name"] != WITHOUT]

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
        hidden=("batch", "context"),
    )  # fmt: skip
    bench.rows = rows
    bench.finish(model="a small model" if quick else "GPT-2 124M")
