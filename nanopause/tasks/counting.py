"""Functions of the number of ones in a random bit string, for experiments that take minutes on a CPU.

    parity_16, parity_24, …    the count modulo 2 [London & Kanade 2025, section 5]
    mod3_16, mod3_24, …        the count modulo 3
    parity_16_dots, …          the n bits are followed by n dots: ordinary tokens in place of pauses

The text is `0110…`, a space and the answer, so with M pauses appended the tokens are x1 … xn, <pause> × M, space,
answer. The space is London & Kanade's END, at which the answer is predicted. The most likely of the possible answers is
scored. One character must be one token (--tokenizer=bytes). Each string is in one split only.
"""

import re
from collections.abc import Iterator
from itertools import accumulate, islice

import numpy as np

from nanopause.prepare import hash_of
from nanopause.tasks.metrics import choice
from nanopause.tasks.task import Example, Row, Task, chosen, index, text

MODULUS = {"parity": 2, "mod3": 3}
N_ROWS = {"train": 20_000, "validation": 1_000, "test": 2_000}


def answer(kind: str, bits: str) -> str:
    return str(bits.count("1") % MODULUS[kind])


def strings(n: int, rng: np.random.Generator) -> Iterator[str]:
    """Uniformly random strings of n bits; for n <= 20 each string once, otherwise with replacement, without end."""
    if n <= 20:
        yield from (f"{i:0{n}b}" for i in rng.permutation(2**n).tolist())
    else:
        while True:
            yield "".join(map(str, rng.integers(0, 2, n)))


def split_of(prefix: str) -> str:
    """The split of a text, by a hash: 10 % test, 5 % validation, the rest train."""
    return {0: "test", 1: "test", 2: "validation"}.get(hash_of("split " + prefix) % 20, "train")


def rows(kind: str, n: int, dots: bool, split: str) -> Iterator[Row]:
    """The rows of a split; deterministic."""
    rng = np.random.default_rng((n, len(split)))
    in_split = (bits for bits in strings(n, rng) if split_of(bits) == split)
    for bits in islice(in_split, N_ROWS[split]):
        yield {"question": bits + "." * (n * dots), "answer": answer(kind, bits)}


def examples(kind: str, row: Row) -> list[Example]:
    answers = [str(i) for i in range(MODULUS[kind])]
    return chosen(text(row, "question"), answers, index(row, "answer", MODULUS[kind]))


# Hints, see task.Hints. The position before the answer's space has none: it predicts the space.


def _unary_count(bits: str, n_positions: int) -> list[str | None]:
    """Position j of M: whether the count is at least ⌈j·n/M⌉; for M = n this is London & Kanade's t_j = [Σx ≥ j]."""
    count = bits.count("1")
    hints = [str(int(count >= -(-j * len(bits) // n_positions))) for j in range(1, n_positions)]
    return hints + [None] * (n_positions > 0)


def count_at_pauses(prefix: str, n_pauses: int):
    """The count in unary, at the pauses or at the dots that replace them."""
    bits = prefix.rstrip(".")
    return [None] * len(bits) + _unary_count(bits, len(prefix) - len(bits)), _unary_count(bits, n_pauses)


def parity_at_prefix(prefix: str, n_pauses: int):
    """At every bit, the parity up to it: London & Kanade's hints for the model without pauses."""
    return [str(count % 2) for count in accumulate(map(int, prefix[:-1]))] + [None], [None] * n_pauses


def count_at_prefix(prefix: str, n_pauses: int):
    """At every bit, whether at least half of the bits up to it are ones: hints about the count without pauses."""
    counts = accumulate(map(int, prefix[:-1]))
    return [str(int(2 * count >= i)) for i, count in enumerate(counts, 1)] + [None], [None] * n_pauses


NAME = re.compile(r"(parity|mod3)_([1-9]\d{0,3})(_dots)?")


def counting(name: str) -> Task:
    """The task of a name such as parity_16."""
    kind, digits, dots = NAME.fullmatch(name).groups()
    n = int(digits)
    dots = bool(dots)
    return Task(
        name=name,
        hub="",
        splits=dict(zip(N_ROWS, N_ROWS)),
        generate=lambda split: rows(kind, n, dots, split),
        examples=lambda row: examples(kind, row),
        hints={"count": count_at_pauses}
        | ({} if dots else {"prefix_parity": parity_at_prefix, "prefix_count": count_at_prefix}),
        metrics={"accuracy": choice},
    )
