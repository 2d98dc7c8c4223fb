"""Batches of a prepared corpus. A step's batch is a pure function of (seed, step, rank): no loader state to save."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopause.errors import UserError
from nanopause.pauses import IGNORE, next_tokens, targets_of
from nanopause.placement import CORPUS, Row
from nanopause.tokenizer import Tokenizer

ROW_MULTIPLE = 256  # tokens; on a GPU packed batches are padded to it, so that kernels compile for few lengths


class Corpus:
    """One split of a prepared corpus: memory-mapped shards, divided into blocks of `block_size` + 1 tokens.

    Consecutive blocks overlap by one token, so that every token is a target once. sha256: hash of both splits.
    Raises UserError if the folder is missing, damaged, of another tokenizer, or shorter than one block.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, block_size: int):
        self.folder, self.tokenizer, self.block_size = folder, tokenizer, block_size
        try:
            meta = json.loads((folder / "meta.json").read_text())
            name = meta["tokenizer"]
            dtype = np.dtype(meta["dtype"])
            tokenizer_sha256 = meta.get("tokenizer_sha256", tokenizer.sha256)  # earlier versions did not write it
            shards = {name: meta["splits"][name]["shards"] for name in ("train", "val")}
            files = [(folder / shard["file"], int(shard["tokens"])) for shard in shards[split]]
            hashes = [shard["sha256"] for of_split in shards.values() for shard in of_split]
            self.sha256 = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            others = sorted(file.parent.name for file in folder.parent.glob("*/meta.json"))
            fix = f"it is prepared for {' and '.join(others)}: add --tokenizer={others[0]}, or " if others else ""
            raise UserError(f"{folder} has no meta.json: {fix}prepare the corpus with its script in data/, "
                            f"--tokenizer={tokenizer.name}") from None  # fmt: skip
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder}/meta.json is damaged: delete {folder} and prepare it again") from None
        if name != tokenizer.name:
            raise UserError(f"{folder} was prepared with the tokenizer {name!r}, not {tokenizer.name!r}: "
                            f"set --tokenizer={name} or prepare it again")  # fmt: skip
        if tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{folder} was prepared with another tokenizer of the name {name!r}: delete it and prepare "
                            f"it again, or rename the tokenizer's folder")  # fmt: skip
        self.shards = []
        for file, n_tokens in files:
            size = file.stat().st_size if file.exists() else 0
            if size != n_tokens * dtype.itemsize:
                raise UserError(f"{file} is truncated or not the shard that meta.json describes ({size} bytes for "
                                f"{n_tokens} tokens): delete {folder} and prepare it again")  # fmt: skip
            self.shards.append(np.memmap(file, dtype=dtype, mode="r"))
        self._first = np.cumsum([0] + [(len(shard) - 1) // block_size for shard in self.shards])
        if len(self) == 0:
            raise UserError(f"the {split} split of {folder} is shorter than one block of {block_size} tokens: "
                            f"lower --block_size, or prepare it with more text or another --val_fraction")  # fmt: skip

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
                            f"{self.tokenizer.name!r} does not have: prepare it again")  # fmt: skip
        return block


@dataclass
class Batch:
    """inputs, targets: int64 [B, T]; a target is IGNORE at a masked position, which has no loss. n_live: number of
    unmasked positions; n_pauses: number of pauses among the inputs; both of the whole batch, counted on the CPU so that
    no GPU synchronisation is needed.

    A packed batch concatenates its documents to one sequence, [1, T]. ends: end position of each document; lives:
    number of unmasked positions of each. layout: positions, int64 [1, T], and lo and hi, int32 [1, T], for
    GPT.hidden."""

    inputs: Tensor
    targets: Tensor
    n_live: int
    n_pauses: int
    ends: tuple[int, ...] = ()
    lives: tuple[int, ...] = ()
    layout: dict[str, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence or packed document, int64 [n]."""
        return np.diff(self.ends, prepend=0) if self.ends else np.full(len(self.inputs), self.inputs.shape[1])

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        inputs, targets, *layout = (
            x.pin_memory().to(device, non_blocking=True) for x in (self.inputs, self.targets, *self.layout.values())
        )
        return replace(self, inputs=inputs, targets=targets, layout=dict(zip(self.layout, layout)))

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` sequences; on a GPU packed ones are padded to a multiple of ROW_MULTIPLE."""
        if not self.ends:
            for i in range(0, len(self.inputs), size):
                rows = slice(i, i + size)
                layout = {name: x[rows] for name, x in self.layout.items()}
                yield replace(self, inputs=self.inputs[rows], targets=self.targets[rows], layout=layout)
            return
        starts = (0, *self.ends)
        for i in range(0, len(self.ends), size):
            ends = self.ends[i : i + size]
            start, stop = starts[i], ends[-1]
            part = replace(
                self,
                inputs=self.inputs[:, start:stop],
                targets=self.targets[:, start:stop],
                ends=tuple(end - start for end in ends),
                lives=self.lives[i : i + size],
                layout={
                    name: x[:, start:stop] - (0 if name == "positions" else start) for name, x in self.layout.items()
                },
            )
            yield part.padded(ROW_MULTIPLE) if self.inputs.is_cuda else part

    def padded(self, multiple: int) -> "Batch":
        """A packed batch, padded to a multiple of tokens. Padding attends to no key, is attended to by no query, and
        has no loss."""
        n = self.inputs.shape[1]

        def pad(x: Tensor, value: int) -> Tensor:
            return F.pad(x, (0, -n % multiple), value=value)

        layout = {name: pad(x, 0 if name == "positions" else n) for name, x in self.layout.items()}
        return replace(self, inputs=pad(self.inputs, 0), targets=pad(self.targets, IGNORE), layout=layout)


@dataclass(frozen=True)
class Insertion:
    """How blocks of a corpus get their pauses. placement: one of placement.CORPUS, or "" for no pauses. n, rate: see
    placement.Row. length: the longer row is cut to it; None: the block's. all_slots: the target of a token before
    pauses, and of every pause, is the next text token; otherwise only the last of them has it."""

    placement: str = ""
    n: int = 0
    rate: float = 0.0
    length: int | None = None
    all_slots: bool = False

    def __call__(self, block: np.ndarray, tokenizer: Tokenizer, key: tuple) -> np.ndarray:
        if not self.placement:
            return block
        row = Row(block, tokenizer, np.random.default_rng(key), n=self.n, rate=self.rate)
        return CORPUS[self.placement](row)[: self.length or len(block)]

    def __str__(self) -> str:
        if not self.placement:
            return "no pauses"
        loss = f", loss at {'all slots' if self.all_slots else 'the last slot'}" * bool(self.n)
        return f"{CORPUS[self.placement].__doc__}, {f'{self.n} each' if self.n else f'pause_rate {self.rate}'}{loss}"


def make_batch(blocks: list[np.ndarray], insertion: Insertion, tokenizer: Tokenizer, keys: list[tuple]) -> Batch:
    """A batch of blocks with pauses inserted. keys: one seed per sequence, so that sequences are independent."""
    pause_id = tokenizer.pause_id
    tokens = np.stack([insertion(block, tokenizer, key) for block, key in zip(blocks, keys)]).astype(np.int64)
    hints = next_tokens(tokens, pause_id) if insertion.all_slots else None
    targets = targets_of(tokens, pause_id, hints=hints)[:, :-1]
    inputs = tokens[:, :-1]
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        n_live=int((targets != IGNORE).sum()),
        n_pauses=int((inputs == tokenizer.pause_id).sum()),
    )


class Shuffled:
    """Indices of the items, of n, that form this rank's share of a step's batch.

    Every epoch visits each item once, in a shuffled order of its own. Item j of a step's global batch depends on (seed,
    step, j) only, and rank r of R has the r-th of R equal contiguous shares: the global batch does not depend on the
    number of ranks.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int, n_ranks: int):
        self.n, self.batch_size = n, batch_size
        self.rows = range(rank * batch_size // n_ranks, (rank + 1) * batch_size // n_ranks)
        # A batch can extend into the next epoch; a large one spans several.
        self.order = lru_cache(4)(lambda epoch: np.random.default_rng((seed, 0, epoch)).permutation(n))

    def __getitem__(self, step: int) -> list[int]:
        places = [divmod(step * self.batch_size + row, self.n) for row in self.rows]
        return [int(self.order(epoch)[i]) for epoch, i in places]


class TrainingBatches:
    """`batches[step]` is this rank's share of a step's batch: the blocks that Shuffled selects, with pauses that depend
    on (seed, step, index in the batch) only."""

    def __init__(self, corpus: Corpus, batch_size: int, insertion: Insertion, seed: int, rank: int, n_ranks: int):
        self.corpus, self.insertion, self.seed = corpus, insertion, seed
        self.chosen = Shuffled(len(corpus), batch_size, seed, rank, n_ranks)

    def __getitem__(self, step: int) -> Batch:
        keys = [(self.seed, 1, step, row) for row in self.chosen.rows]
        blocks = [self.corpus[i] for i in self.chosen[step]]
        return make_batch(blocks, self.insertion, self.corpus.tokenizer, keys)


def evenly(n: int, total: int) -> list[int]:
    """Indices of min(n, total) of `total` items, evenly spaced."""
    n = min(n, total)
    return [i * total // n for i in range(n)]


def validation_batches(
    corpus: Corpus, n_blocks: int, batch_size: int, insertion: Insertion, seed: int, rank: int, n_ranks: int
) -> Iterator[Batch]:
    """This rank's share of `n_blocks` blocks, evenly spaced over a split; always the same blocks and pauses."""
    chosen = evenly(n_blocks, len(corpus))[rank::n_ranks]
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        keys = [(seed, 2, i) for i in indices]
        yield make_batch([corpus[i] for i in indices], insertion, corpus.tokenizer, keys)


def prefetch(batches: "TrainingBatches", start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    """Batches of steps start … stop − 1 on the device. A thread builds and copies each one step ahead."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lambda: batches[start].to(device))
        for step in range(start, stop):
            batch = following.result()
            if step + 1 < stop:
                following = pool.submit(lambda step=step + 1: batches[step].to(device))
            yield batch
