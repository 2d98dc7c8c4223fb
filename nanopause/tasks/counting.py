"""Functions of the number of ones in a random bit string, for experiments that take minutes on a CPU.

    parity_16, parity_24, …    the count modulo 2 [London & Kanade 2025, section 5]
    mod3_16, mod3_24, …        the count modulo 3
    parity_16_dots, …          n dots follow the bits, as many as there are bits: ordinary tokens in place of pauses

The text is `0110…` and the answer after a space, so with M pauses appended the tokens are x1 … xn, <pause> × M, space,
answer: the space is London & Kanade's END, where the answer is predicted. The most likely of the possible answers
counts. One character must be one token (--tokenizer=bytes). A string is in one split.
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
    """Uniform random strings of n bits; where n <= 20 each of them once."""
    if n <= 20:
        yield from (f"{i:0{n}b}" for i in rng.permutation(2**n).tolist())
    else:
        while True:
            yield "".join(map(str, rng.integers(0, 2, n)))


def split_of(prefix: str) -> str:
    """The split of a text, by a hash: 1 in 10 is for the test, 1 in 20 for validation."""
    return {0: "test", 1: "test", 2: "validation"}.get(hash_of("split " + prefix) % 20, "train")


def rows(kind: str, n: int, dots: bool, split: str) -> Iterator[Row]:
    """The rows of a split, always the same ones."""
    rng = np.random.default_rng((n, len(split)))
    in_split = (bits for bits in strings(n, rng) if split_of(bits) == split)
    for bits in islice(in_split, N_ROWS[split]):
        yield {"question": bits + "." * (n * dots), "answer": answer(kind, bits)}


def examples(kind: str, row: Row) -> list[Example]:
    answers = [str(i) for i in range(MODULUS[kind])]
    return chosen(text(row, "question"), answers, index(row, "answer", MODULUS[kind]))


# Hints: the last position before the answer's space has none, as it predicts the space.


def _reached(bits: str, n_slots: int) -> list[str | None]:
    """Slot j of M: whether the count is at least ⌈j·n/M⌉; for M = n that is London & Kanade's t_j = [Σx ≥ j]."""
    count = bits.count("1")
    return [str(int(count >= -(-j * len(bits) // n_slots))) for j in range(1, n_slots)] + [None] * (n_slots > 0)


def count_at_pauses(prefix: str, n_pauses: int):
    """The count in unary, at the pauses, or at the dots in their place."""
    bits = prefix.rstrip(".")
    return [None] * len(bits) + _reached(bits, len(prefix) - len(bits)), _reached(bits, n_pauses)


def parity_at_prefix(prefix: str, n_pauses: int):
    """At every bit the parity so far: the hints that London & Kanade give the model without pauses."""
    return [str(count % 2) for count in accumulate(map(int, prefix[:-1]))] + [None], [None] * n_pauses


def count_at_prefix(prefix: str, n_pauses: int):
    """At every bit whether at least half of the bits so far are ones: a hint about the count without pauses."""
    counts = accumulate(map(int, prefix[:-1]))
    return [str(int(2 * count >= i)) for i, count in enumerate(counts, 1)] + [None], [None] * n_pauses


NAME = re.compile(r"(parity|mod3)_([1-9]\d{0,3})(_dots)?")


def counting(name: str) -> Task:
    """The task of a name such as parity_16."""
    kind, digits, dots = NAME.fullmatch(name).groups()
    n, dots = int(digits), bool(dots)
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
