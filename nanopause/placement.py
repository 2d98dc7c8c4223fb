"""Placements: where pauses go in training, chosen by name with --placement.

A placement maps a row of token ids to a longer row with pauses, and may use what is in Row. It adds no other token than
the pause and keeps the order of the others: which positions have a loss then follows (pauses.targets_of). To add one,
write it here and register it; its docstring is its description in logs and model cards.
"""

from difflib import get_close_matches
from typing import NamedTuple

import numpy as np

from nanopause.errors import UserError
from nanopause.pauses import after_words, insert_at, insert_between, insert_random
from nanopause.tokenizer import Tokenizer


class Row(NamedTuple):
    """What a placement may use. tokens: int64 [N], a block of a corpus, or an example: prefix, target, end of text.
    n_prefix: tokens of the prefix, 0 for a block. n, rate, consecutive: --pauses, --pause_rate, --consecutive."""

    tokens: np.ndarray
    tokenizer: Tokenizer
    rng: np.random.Generator
    n_prefix: int = 0
    n: int = 0
    rate: float = 0.0
    consecutive: int = 1

    @property
    def target(self) -> np.ndarray:
        return self.tokens[self.n_prefix :]

    def pause_before(self, places: np.ndarray, n: int) -> np.ndarray:
        """The row with n pauses before each of these places of the target, int64."""
        return insert_at(self.tokens, self.n_prefix + places, n, self.tokenizer.pause_id)


# Of a corpus. The longer row is cut to block_size.


def random(row: Row) -> np.ndarray:
    """pauses at random places [Goyal et al. 2023, Algorithm 1]"""
    return insert_random(row.tokens, row.rate, row.tokenizer.pause_id, row.rng)


def between(row: Row) -> np.ndarray:
    """pauses between neighbouring tokens; block_size counts them"""
    return insert_between(row.tokens, row.n, row.tokenizer.pause_id)


# Of a task's examples


def appd(row: Row) -> np.ndarray:
    """pauses appended to the prefix [Goyal et al. 2023, Algorithm 2]"""
    return row.tokens  # they are part of the prompt: finetune.encode puts them there, as inference does


def sft(row: Row) -> np.ndarray:
    """no pauses"""
    return row.tokens


def ran(row: Row) -> np.ndarray:
    """pauses before random tokens of the target [Kim et al. 2025]"""
    return row.pause_before(np.sort(row.rng.permutation(len(row.target))[: row.n]), row.consecutive)


def aaw(row: Row) -> np.ndarray:
    """pauses after every word of the target [Kim et al. 2025]"""
    pieces = [row.tokenizer.decode_bytes([i]) for i in row.target[:-1].tolist()]
    return row.pause_before(np.array(after_words(pieces), dtype=np.int64), row.consecutive)


def dit(row: Row) -> np.ndarray:
    """pauses before the least likely tokens of the target, found again every step [Kim et al. 2025]"""
    return row.tokens  # the likelihoods are on the device: finetune.TargetPauses inserts them there


CORPUS = {function.__name__: function for function in (random, between)}
TASK = {function.__name__: function for function in (appd, sft, ran, aaw, dit)}


def check_placement(name: str, of_task: bool) -> None:
    """Raises UserError, with the known names, for another one."""
    placements = TASK if of_task else CORPUS
    if name not in placements:
        near = "".join(f" (near: {other})" for other in get_close_matches(name, placements, 1))
        raise UserError(f"placement={name}{near} is not a placement of {'a task' if of_task else 'a corpus'}: choose "
                        f"{', '.join(placements)}")  # fmt: skip
