"""3SUM and 2SUM with filler tokens [Pfau et al. 2024, section 3].

    match3_6          whether three of 6 numbers sum to 0 modulo 17
    match2_8          whether two of 8 numbers sum to 0 modulo 10, each number shifted first; the text's last character
                      selects the shifts (the paper's 2SUM-Transform)
    match3_12_d3      the same with vectors of 3 digits modulo 10, as in the paper; match2_10_d2, …
    match3_6_dots     one dot for each token of the chain of thought: ordinary tokens in place of pauses
    match3_6_mix      half of the training examples as in match3_6_dots, the other half with a parallel chain of thought
                      in the target; validation and test examples have dots only

A digit is a letter, `a` for 0, and the answer is T or F: `cfqmba` and ` T`. The chain of thought of 3SUM has, for each
pair i < j, the sum of the two, or `!` if a later number completes the triple; that of 2SUM has, for each number, its
value after the shift, or `!` if an earlier one completes the pair. All of it can be computed in parallel. Half of the
examples are true; a false example is a true one with one number changed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from nanopause.tasks.counting import split_of
from nanopause.tasks.metrics import choice
from nanopause.tasks.task import Example, Row, Task, chosen, text

N_SHIFTS = 4  # number of different shift vectors in 2SUM
N_ROWS = {"train": 50_000, "validation": 1_000, "test": 2_000}
BATCH = 1024  # examples generated at once


def letters(digits: np.ndarray) -> str:
    """Digits, integers of any shape, as letters; −1 as `!`."""
    return "".join("!" if digit < 0 else chr(ord("a") + digit) for digit in digits.flatten().tolist())


@dataclass(frozen=True)
class Match:
    """size: numbers in a sum, 2 or 3. n: numbers per example. d: digits per number."""

    size: int
    n: int
    d: int = 1

    @property
    def modulus(self) -> int:
        return 17 if self.size == 3 and self.d == 1 else 10

    @property
    def n_thoughts(self) -> int:
        """Number of tokens in the chain of thought."""
        return self.d * (self.n * (self.n - 1) // 2 if self.size == 3 else self.n)

    def shifts(self) -> np.ndarray:
        """The shifts that 2SUM adds to the numbers, integers [N_SHIFTS, n, d]; deterministic."""
        return np.random.default_rng(7).integers(0, self.modulus, (N_SHIFTS, self.n, self.d))

    def thought(self, x: np.ndarray) -> np.ndarray:
        """The chain of thought of shifted numbers [B, n, d]: integers [B, pairs or n, d], −1 where a number completes a
        sum of 0."""
        if self.size == 3:
            i, last = np.triu_indices(self.n, 1)
            values = (x[:, i] + x[:, last]) % self.modulus
            may_complete = np.arange(self.n) > last[:, None]
        else:
            values, may_complete = x, np.tri(self.n, k=-1, dtype=bool)
        completes = (x[:, None] == (-values % self.modulus)[:, :, None]).all(3) & may_complete
        return np.where(completes.any(2)[..., None], -1, values)

    def has_solution(self, x: np.ndarray) -> np.ndarray:
        return (self.thought(x) < 0).any((1, 2))

    def numbers(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Equal numbers of examples with a solution and with a corrupted one, in random order: integers [B, n, d], and
        whether they have a solution, bool [B]. B ≤ BATCH."""
        m = self.modulus
        rows = np.arange(BATCH)
        is_true = rows % 2 == 0
        x = rng.integers(0, m, (BATCH, self.n, self.d))
        x[:, self.size - 1] = -x[:, : self.size - 1].sum(1) % m
        number = rng.integers(0, self.size, BATCH)
        digit = rng.integers(0, self.d, BATCH)
        x[rows, number, digit] += np.where(is_true, 0, rng.integers(1, m, BATCH))
        x = np.take_along_axis(x % m, rng.random((BATCH, self.n, 1)).argsort(1), 1)
        (false,) = (~is_true & ~self.has_solution(x)).nonzero()  # a corrupted example can have another solution
        kept = rng.permutation(np.concatenate((false, is_true.nonzero()[0][: len(false)])))
        return x[kept], is_true[kept]

    def texts(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """Endless pairs of a prefix without dots and its answer, "T" or "F"."""
        while True:
            x, is_true = self.numbers(rng)
            which = rng.integers(0, N_SHIFTS, len(x))
            if self.size == 2:
                x = (x - self.shifts()[which]) % self.modulus
            for numbers, shift, answer in zip(x, which, is_true):
                yield letters(numbers) + str(shift) * (self.size == 2), "FT"[int(answer)]

    def spelled_thought(self, prefix: str) -> str:
        """The chain of thought of a prefix without dots, as text."""
        digits = np.frombuffer(prefix[: self.n * self.d].encode(), np.uint8).astype(np.int64) - ord("a")
        x = digits.reshape(1, self.n, self.d)
        if self.size == 2:
            x = (x + self.shifts()[int(prefix[-1])]) % self.modulus
        return letters(self.thought(x))


NAME = re.compile(r"match([23])_([3-9]|[1-9]\d)(?:_d([1-9]))?(?:_(dots|mix))?")


def problem_of(name: str) -> Match | None:
    """The problem of a task's name; None if the name does not match."""
    found = NAME.fullmatch(name)
    return Match(int(found[1]), int(found[2]), int(found[3] or 1)) if found else None


def match(name: str) -> Task:
    """The task of a name such as match3_6_mix."""
    problem, form = problem_of(name), NAME.fullmatch(name)[4] or ""

    def rows(split: str) -> Iterator[Row]:
        """The rows of a split; deterministic. A hash of the text decides its split."""
        texts = problem.texts(np.random.default_rng((problem.n, len(split))))
        in_split = (row for row in texts if split_of(row[0]) == split)
        for i, (prefix, answer) in enumerate(islice(in_split, N_ROWS[split])):
            yield {"question": prefix, "answer": answer, "thinks": form == "mix" and split == "train" and i % 2 == 0}

    def examples(row: Row) -> list[Example]:
        prefix, answer = text(row, "question"), text(row, "answer")
        if row["thinks"]:
            return [Example(prefix, f" {problem.spelled_thought(prefix)} {answer}", (answer,))]
        return chosen(prefix + (" " + "." * problem.n_thoughts) * bool(form), ["F", "T"], "FT".index(answer))

    def thought_at_pauses(prefix: str, n_pauses: int):
        """The chain of thought at the pauses; the last pause predicts the answer's space."""
        thought = problem.spelled_thought(prefix)[: max(0, n_pauses - 1)]
        return [None] * len(prefix), [*thought, *[None] * (n_pauses - len(thought))]

    return Task(
        name=name,
        hub="",
        splits=dict(zip(N_ROWS, N_ROWS)),
        generate=rows,
        examples=examples,
        hints={} if form else {"thought": thought_at_pauses},
        metrics={"accuracy": choice},
    )
