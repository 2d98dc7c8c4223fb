"""Batches of a prepared corpus. The batch of a step is a pure function of (seed, step, rank): nothing to save."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanopause.errors import UserError
from nanopause.pauses import IGNORE, insert_random, targets_of
from nanopause.tokenizer import Tokenizer


class Corpus:
    """One split of a prepared corpus: its shards, memory-mapped and cut into blocks of `block_size` + 1 tokens.

    Neighbouring blocks share one token, so that every token is a target once.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, block_size: int):
        self.folder, self.tokenizer, self.block_size = folder, tokenizer, block_size
        try:
            meta = json.loads((folder / "meta.json").read_text())
            name, dtype = meta["tokenizer"], np.dtype(meta["dtype"])
            its_sha256 = meta.get("tokenizer_sha256", tokenizer.sha256)  # older ones have none
            files = [(folder / shard["file"], int(shard["tokens"])) for shard in meta["splits"][split]["shards"]]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} has no meta.json: prepare the corpus with its script in data/, "
                            f"--tokenizer={tokenizer.name}") from None  # fmt: skip
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder}/meta.json is damaged: delete {folder} and prepare it anew") from None
        if name != tokenizer.name:
            raise UserError(f"{folder} was prepared with the tokenizer {name!r}, not {tokenizer.name!r}: "
                            f"set --tokenizer={name} or prepare it anew")  # fmt: skip
        if its_sha256 != tokenizer.sha256:
            raise UserError(f"{folder} was prepared with another tokenizer of the name {name!r}: delete it and prepare "
                            f"it anew, or rename the tokenizer's folder")  # fmt: skip
        self.shards = []
        for file, n_tokens in files:
            size = file.stat().st_size if file.exists() else 0
            if size != n_tokens * dtype.itemsize:
                raise UserError(f"{file} is truncated or not the shard that meta.json describes ({size} bytes for "
                                f"{n_tokens} tokens): delete {folder} and prepare it anew")  # fmt: skip
            self.shards.append(np.memmap(file, dtype=dtype, mode="r"))
        self._first = np.cumsum([0] + [(len(shard) - 1) // block_size for shard in self.shards])
        if len(self) == 0:
            raise UserError(f"the {split} split of {folder} is shorter than one block of {block_size} tokens: "
                            f"lower --block_size")  # fmt: skip

    def __len__(self) -> int:
        """Number of blocks."""
        return int(self._first[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Block i, integers [block_size + 1]."""
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        start = int(i - self._first[shard]) * self.block_size
        block = np.asarray(self.shards[shard][start : start + self.block_size + 1])
        if block.max() >= self.tokenizer.pause_id:
            raise UserError(f"a shard of {self.folder} holds the id {block.max()}, which the tokenizer "
                            f"{self.tokenizer.name!r} does not have: prepare it anew")  # fmt: skip
        return block


@dataclass
class Batch:
    """inputs, targets: int64 [B, T]; targets are IGNORE where there is no loss. n_live: how many are not; n_pauses: how
    many inputs are pauses; both of the whole batch, known here so that nobody asks a GPU."""

    inputs: Tensor
    targets: Tensor
    n_live: int
    n_pauses: int

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        inputs, targets = (x.pin_memory().to(device, non_blocking=True) for x in (self.inputs, self.targets))
        return replace(self, inputs=inputs, targets=targets)

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` sequences."""
        for inputs, targets in zip(self.inputs.split(size), self.targets.split(size)):
            yield replace(self, inputs=inputs, targets=targets)


def make_batch(blocks: list[np.ndarray], pause_rate: float, tokenizer: Tokenizer, keys: list[tuple]) -> Batch:
    """A batch of blocks with pauses inserted; keys: a row's own seed each, so that no row depends on another."""
    if pause_rate:
        blocks = [
            insert_random(block, pause_rate, tokenizer.pause_id, np.random.default_rng(key))
            for block, key in zip(blocks, keys)
        ]
    tokens = np.stack(blocks).astype(np.int64)
    targets = targets_of(tokens, tokenizer.pause_id)[:, :-1]
    inputs = tokens[:, :-1]
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        n_live=int((targets != IGNORE).sum()),
        n_pauses=int((inputs == tokenizer.pause_id).sum()),
    )


class TrainingBatches:
    """`batches[step]` is this rank's share of a step's batch.

    The steps walk through the corpus in one shuffled order an epoch, every block once. Row j of a step's global batch
    and its pauses depend on (seed, step, j) alone, and rank r of R has the r-th of R equal runs of rows: the global
    batch is the same whatever the number of ranks.
    """

    def __init__(self, corpus: Corpus, batch_size: int, pause_rate: float, seed: int, rank: int, n_ranks: int):
        self.corpus, self.batch_size, self.pause_rate, self.seed = corpus, batch_size, pause_rate, seed
        self.rows = range(rank * batch_size // n_ranks, (rank + 1) * batch_size // n_ranks)
        # A batch can reach into the next epoch, and a large one over several.
        self._order = lru_cache(4)(lambda epoch: np.random.default_rng((seed, 0, epoch)).permutation(len(corpus)))

    def __getitem__(self, step: int) -> Batch:
        indices = [divmod(step * self.batch_size + row, len(self.corpus)) for row in self.rows]
        blocks = [self.corpus[self._order(epoch)[i]] for epoch, i in indices]
        keys = [(self.seed, 1, step, row) for row in self.rows]
        return make_batch(blocks, self.pause_rate, self.corpus.tokenizer, keys)


def validation_batches(
    corpus: Corpus, n_blocks: int, batch_size: int, pause_rate: float, seed: int, rank: int, n_ranks: int
) -> Iterator[Batch]:
    """This rank's share of `n_blocks` blocks spread evenly over a split; always the same blocks and pauses."""
    n_blocks = min(n_blocks, len(corpus))
    chosen = [i * len(corpus) // n_blocks for i in range(n_blocks)][rank::n_ranks]
    for start in range(0, len(chosen), batch_size):
        rows = chosen[start : start + batch_size]
        keys = [(seed, 2, i) for i in rows]
        yield make_batch([corpus[i] for i in rows], pause_rate, corpus.tokenizer, keys)


def prefetch(batches: TrainingBatches, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    """The batches of steps start to stop on the device, made and copied by a thread one step ahead."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lambda: batches[start].to(device))
        for step in range(start, stop):
            batch = following.result()
            if step + 1 < stop:
                following = pool.submit(lambda step=step + 1: batches[step].to(device))
            yield batch
