"""What each step of generation contains: decided on the host, without a model or a device.

It knows of pauses only what the host has received, which on a GPU is two steps old; the Runner checks budgets again."""

from collections import deque
from collections.abc import Iterable
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
    def ends_prompt(self) -> bool:
        return self.stop == len(self.sequence.prompt)


class Step(NamedTuple):
    """Prefill first, in order of slots, then decode in the first n_slots slots, with n_pauses pauses after each token.
    A sequence whose prompt ends in the prefill is decoded in the same step: its first two tokens come from one step."""

    prefill: list[Chunk]
    decode: list[Sequence]
    n_slots: int
    n_pauses: int


class Scheduler:
    """Sequences wait in order of arrival for one of max_batch slots. A step prefills about `chunk` tokens of prompts
    and their pauses, first come first served, and decodes one token for every sequence whose prompt is in the cache, so
    that a long prompt does not stop the others."""

    def __init__(
        self, sequences: Iterable[Sequence], policy: Policy, *, max_batch: int, max_length: int, chunk: int,
        max_new_tokens: int, is_prefix_lm: bool,
    ):  # fmt: skip
        self.waiting, self.running = deque(sequences), []
        self.policy, self.is_prefix_lm = policy, is_prefix_lm
        self.max_batch, self.max_length, self.chunk, self.max_new_tokens = max_batch, max_length, chunk, max_new_tokens
        self.is_pausing = not policy.is_off()
        # A prompt of a prefix-LM attends to its pauses, so they cannot be rolled back.
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
            if chunk.ends_prompt:
                chunk.sequence.state, chunk.sequence.n_scheduled = "decode", 1
        decode = [s for s in self.running if s.state == "decode" and s.n_scheduled < self.max_new_tokens]
        for sequence in decode:
            sequence.n_scheduled += 1
        n_slots = max((sequence.slot + 1 for sequence in decode), default=0)
        has_budget = any(self.policy.budget - sequence.n_pauses >= self.policy.per_token for sequence in decode)
        n_pauses = self.policy.per_token if self.is_pausing and has_budget else 0
        return Step(prefill, decode, n_slots, n_pauses)

    def finish(self, sequence: Sequence) -> None:
        sequence.state = "finished"
        self.running.remove(sequence)

    def _prefill(self) -> list[Chunk]:
        """Parts of prompts, up to `chunk` tokens and pauses in all. Two exceptions may be longer: the last token of a
        prompt stays with its pauses, as the policy compares the logits before and after them, and prompts of a
        prefix-LM are not cut."""
        room, chunks = self.chunk, []
        n_offered = self.policy.at_prompt if self.is_pausing and self.has_prompt_pauses else 0
        for sequence in self.running:
            if sequence.state != "prefill":
                continue
            length, start = len(sequence.prompt), sequence.n_prefilled
            fits = n_offered <= self.policy.budget and length + n_offered <= self.max_length
            n_pauses = n_offered if fits else 0
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
