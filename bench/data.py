"""Tokens per second of the loader and of preparing a corpus, against what a step of train.py takes.

    load       batches of the default corpus, as train.py reads them, with 0 and 10 % pauses; beside nanoGPT's way,
               crops of a memory map, here at the places that ours reads
    prepare    documents to shards, with a process a core; beside tiktoken with a thread a core, which neither holds
               documents out nor writes

All of it is a CPU's work, also where the steps are a GPU's, which the result is named by. What a step takes is measured
in the same run, with the batches that it would have to get.
"""

import os
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import train
from bench.harness import OURS, Bench, Candidate, Rival, Shape, number, race, wall_clock
from data.pydocs import documents
from nanopause.data import Insertion, TrainingBatches
from nanopause.pauses import insert_random, targets_of
from nanopause.prepare import prepare
from nanopause.tokenizer import Tokenizer, load_tokenizer

MODEL_OF = {"gpt2": "124M", "bytes": "default"}  # whose steps take what a tokenizer makes


class Reading:
    """The batches of a run, and the corpus that they are of, which is one shard."""

    def __init__(self, problem: train.Problem):
        config, self.corpus = problem.config, problem.corpus
        self.seed, self.pause_rate, self.T = config.seed, config.pause_rate, config.block_size
        insertion = Insertion(self.pause_rate)
        self.batches = TrainingBatches(self.corpus, config.batch_size, insertion, self.seed, rank=0, n_ranks=1)
        (self.shard,) = self.corpus.shards

    def places(self, step: int) -> list[int]:
        """Where the blocks of a step begin."""
        return [i * self.T for i in self.batches.chosen[step]]

    def truth(self) -> dict[str, Tensor]:
        """The first batch, row by row."""
        pause_id, rows = self.corpus.tokenizer.pause_id, []
        for row, place in enumerate(self.places(0)):
            chance = np.random.default_rng((self.seed, 1, 0, row))
            block = np.array(self.shard[place : place + self.T + 1], dtype=np.int64)
            rows.append(insert_random(block, self.pause_rate, pause_id, chance) if self.pause_rate else block)
        tokens = np.stack(rows)
        targets = targets_of(tokens, pause_id)[:, :-1]
        return {"inputs": torch.from_numpy(tokens[:, :-1]), "targets": torch.from_numpy(targets)}


def ours(reading: Reading) -> Candidate:
    steps = count()

    def call() -> dict[str, Tensor]:
        batch = reading.batches[next(steps)]
        return {"inputs": batch.inputs, "targets": batch.targets}

    return call


def crops(reading: Reading) -> Candidate:
    if reading.pause_rate:
        raise NotImplementedError("it has no pauses")
    file, dtype, T = reading.shard.filename, reading.shard.dtype, reading.T
    places, steps = [reading.places(step) for step in range(1000)], count()

    def call() -> dict[str, Tensor]:
        data = np.memmap(file, dtype=dtype, mode="r")  # anew for every batch, or memory grows with what was read
        chosen = places[next(steps) % len(places)]
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in chosen])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in chosen])
        return {"inputs": x, "targets": y}

    return call


def how_often(tokens: np.ndarray, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """How often each id is there: the order of documents is not compared."""
    return {"counts": torch.from_numpy(np.bincount(tokens, minlength=tokenizer.vocab_size))}


def shards(texts: list[str], tokenizer: Tokenizer, workers: int | None) -> Candidate:
    options = {"val_fraction": 0.05, "workers": workers}

    def call() -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            made = prepare("texts", ["all"], lambda _: texts, folder, tokenizer.source, **options)
            tokens = np.concatenate([np.fromfile(file, np.uint16) for file in Path(made).glob("*.bin")])
        return how_often(tokens, tokenizer)

    return call


def tiktoken(problem: tuple[list[str], Tokenizer, int | None]) -> Candidate:
    texts, tokenizer, workers = problem
    encode, threads = tokenizer._encoding.encode_ordinary_batch, workers or len(os.sched_getaffinity(0))

    def call() -> dict[str, Tensor]:
        ids = []
        for its in encode(texts, num_threads=threads):
            ids += its
            ids.append(tokenizer.eot_id)
        return how_often(np.array(ids, np.uint16), tokenizer)

    return call


LOADERS = (Rival("crops of a memory map", "numpy", crops),)
TOKENIZERS = (Rival("tiktoken alone", "tiktoken", tiktoken),)
Needed = dict[str, float]  # tokens a second that a model's step takes


def load(bench: Bench, shape: Shape, device: torch.device, needed: Needed) -> None:
    problem, n_tokens, model = train.Problem(shape, device), shape["batch"] * shape["T"], shape["model"]
    if model not in needed:
        step = train.ours(problem)
        step()  # compiles
        (seconds,) = race({OURS: step}, wall_clock, bench.seconds).values()
        needed[model] = n_tokens / float(np.median(seconds))
    reading = Reading(problem)
    calls = {OURS: ours(reading)} | bench.functions(LOADERS, reading, shape)
    compete(bench, "load", shape, n_tokens, calls, reading.truth(), needed[model])


def tokenize(bench: Bench, shape: Shape, texts: list[str], workers: int | None, needed: Needed) -> None:
    tokenizer = load_tokenizer(shape["tokenizer"])
    problem = texts, tokenizer, workers
    truth = tiktoken(problem)()
    calls = {OURS: shards(*problem)} | bench.functions(TOKENIZERS, problem, shape)
    n_tokens, model = int(truth["counts"].sum()), MODEL_OF[shape["tokenizer"]]
    compete(bench, "prepare", shape, n_tokens, calls, truth, needed.get(model))


def compete(
    bench: Bench, what: str, shape: Shape, n_tokens: int, calls: dict, truth: dict, needed: float | None
) -> None:
    for row in bench.compete(what, shape, calls, truth):
        row["tokens_per_second"] = 1e3 * n_tokens / row["p50_ms"]
        row["needed"] = needed


def main(quick: bool = False) -> None:
    """Tokens per second of the loader and of preparing a corpus, against what a training step takes.

    Args:
        quick: Small models and little text.
    """
    bench = Bench("data", quick)
    device, needed = bench.device, {}
    bench.device, bench.dtype, bench.sample = torch.device("cpu"), torch.float32, wall_clock
    bench.header |= {"dtype": "float32", "ours": "numpy"}
    steps = {shape["model"]: shape for what, shape in train.shapes(device.type, quick) if what == "step"}
    for model in MODEL_OF.values():
        for rate in (0.0, 0.1) if model in steps else ():
            bench.attempt(load, steps[model] | {"pause_rate": rate}, device, needed)
    texts, workers = list(islice(documents(), 50 if quick else None)), 1
    if not quick:
        texts, workers = 8 * texts, None  # 20 MB, as processes take a second to begin
    megabytes = round(sum(len(text.encode()) for text in texts) / 1e6, 1)
    for name in MODEL_OF:
        bench.attempt(tokenize, {"tokenizer": name, "MB": megabytes}, texts, workers, needed)
    bench.write()
    bench.show(
        lambda row: f"{row['what']}: thousand tokens per second, and how many times faster ours is",
        lambda row: f"{number(row['tokens_per_second'] / 1e3)} {row['ratio']:5.2f}",
        first={"ours": lambda row: number(row["tokens_per_second"] / 1e3),
               "times a step's": lambda row: number(row["needed"] and row["tokens_per_second"] / row["needed"])},
    )  # fmt: skip
    bench.finish()
