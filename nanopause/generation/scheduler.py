"""What each step of generation contains: decided on the host, from lengths and slots alone."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nanopause.generation.sequence import Sequence
from nanopause.policy import Policy


class Chunk(NamedTuple):
    """Part of a prompt to prefill: prompt[start:stop] of the sequence, and n_pauses pauses after the last part."""

    sequence: Sequence
    start: int
    stop: int
    n_pauses: int

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.sequence.prompt)


class Step(NamedTuple):
    """Prefill first, in order of slots, then decode in the first n_slots slots, with n_pauses pauses after each token.
    n_prompt_pauses: the most that a chunk has."""

    prefill: list[Chunk]
    n_prompt_pauses: int
    decode: list[Sequence]
    n_slots: int
    n_pauses: int


class Scheduler:
    """Sequences wait in order of arrival for one of max_batch slots. A step prefills up to `chunk` prompt tokens, first
    come first served, and decodes one token for every sequence whose prompt is in the cache, so that a long prompt
    does not stop the others. rounded: the number of slots to decode for so many sequences."""

    def __init__(
        self, sequences: Iterable[Sequence], policy: Policy, *, max_batch: int, max_length: int, chunk: int,
        max_new_tokens: int, is_prefix_lm: bool, rounded: Callable[[int], int] = int,
    ):  # fmt: skip
        self.waiting, self.running = deque(sequences), []
        self.policy, self.is_prefix_lm, self.rounded = policy, is_prefix_lm, rounded
        self.max_batch, self.max_length, self.chunk, self.max_new_tokens = max_batch, max_length, chunk, max_new_tokens
        self.is_pausing = True  # False once the policy is off
        # A prompt of a prefix-LM attends to its pauses, so they cannot be rolled back after it.
        self.has_prompt_pauses = policy.certain or not is_prefix_lm

    def schedule(self) -> Step:
        """The next step; its sequences count as scheduled."""
        free = sorted(set(range(self.max_batch)) - {sequence.slot for sequence in self.running})
        for slot in free[: len(self.waiting)]:
            sequence = self.waiting.popleft()
            sequence.state, sequence.slot = "prefill", slot
            self.running.append(sequence)
        prefill = self._prefill()
        for chunk in prefill:
            chunk.sequence.n_prefilled = chunk.stop
            if chunk.is_last:
                chunk.sequence.state, chunk.sequence.n_scheduled = "decode", 1
        decode = [s for s in self.running if s.state == "decode" and s.n_scheduled < self.max_new_tokens]
        for sequence in decode:
            sequence.n_scheduled += 1
        n_slots = min(self.rounded(max((sequence.slot + 1 for sequence in decode), default=0)), self.max_batch)
        has_budget = any(self.policy.budget - sequence.n_pauses >= self.policy.per_token for sequence in decode)
        n_pauses = self.policy.per_token if self.is_pausing and has_budget else 0
        return Step(prefill, self._n_prompt_pauses(), decode, n_slots, n_pauses)

    def finish(self, sequence: Sequence) -> None:
        sequence.state = "finished"
        self.running.remove(sequence)

    def _n_prompt_pauses(self) -> int:
        return self.policy.at_prompt if self.is_pausing and self.has_prompt_pauses else 0

    def _prefill(self) -> list[Chunk]:
        """Parts of prompts, up to `chunk` tokens in all. The last token of a prompt stays with its pauses, as the
        policy compares the logits before and after them; prompts of a prefix-LM are not cut."""
        room, chunks = self.chunk, []
        for sequence in self.running:
            if sequence.state != "prefill":
                continue
            length, start = len(sequence.prompt), sequence.n_prefilled
            n_pauses = self._n_prompt_pauses()
            if n_pauses > self.policy.budget or length + n_pauses > self.max_length:
                n_pauses = 0
            n_left = length - start
            if chunks and (room <= 0 or (self.is_prefix_lm and n_left + n_pauses > room)):
                break
            if self.is_prefix_lm or n_left == 1 or n_left + n_pauses <= room:
                chunk = Chunk(sequence, start, length, n_pauses)
            else:
                chunk = Chunk(sequence, start, start + min(n_left - 1, room), 0)
            chunks.append(chunk)
            room -= chunk.stop - chunk.start + chunk.n_pauses
        return sorted(chunks, key=lambda chunk: chunk.sequence.slot)
