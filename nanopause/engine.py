"""Generation with pauses, in a continuous batch.

Life of a request:
    waiting    a prompt in the Scheduler's queue, until one of max_batch slots of the cache is free
    prefill    its tokens enter the cache, up to `chunk` per step; the last part together with the pauses after the
               prompt, in one forward pass [Goyal et al. 2023, Algorithm 3], which gives the first token
    decode     each step appends the last token, fused with the pauses that the policy may want after it. The policy
               decides from the logits before the pauses. Committed pauses add to the sequence's length, and the next
               token is sampled after them. Otherwise they are rolled back: the length does not include them, so no
               query attends to them, and later tokens overwrite them
    finished   by an end of text, a text of `until`, max_new_tokens or max_length; its slot is free

So M pauses are never M steps: a step appends any number of tokens to every sequence, at the price of about one as long
as reading the weights dominates. The Scheduler decides on the host what a step contains (generation/scheduler.py), the
Runner computes it (generation/runner.py). On a GPU the host schedules steps while at most two outputs are on their way
to it: lengths, last tokens and pauses that a step depends on stay on the device.
"""

import math
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from operator import index
from reprlib import repr as short
from typing import Literal

import torch

from nanopause.errors import UserError, check, check_whole
from nanopause.generation.runner import Output, Runner
from nanopause.generation.sampling import Sampling
from nanopause.generation.scheduler import Scheduler
from nanopause.generation.sequence import Generation, Sequence, Token
from nanopause.model import GPT
from nanopause.policy import AfterPrompt, Policy
from nanopause.tokenizer import Tokenizer

__all__ = ["Engine", "Generation", "Token"]


class Engine:
    """Generates from one model for up to max_batch sequences at a time, of up to max_length tokens each, pauses
    included. chunk: prompt tokens per step.

    An engine has one cache, so it serves one list of prompts at a time. `submit`, `stream` and `generate` replace a
    list that is not finished: its stream raises UserError at its next token, and the new one is not affected. A call
    that is refused replaces nothing. For two streams at once use two engines."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_batch: int = 8, max_length: int | None = None, chunk: int = 2048
    ):
        max_length = model.config.block_size if max_length is None else max_length
        check_whole("max_batch", max_batch, 1, 2**20)
        check_whole("chunk", chunk, 1, 2**31)
        check_whole("max_length", max_length, 1, model.config.block_size)
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_length, self.chunk = max_batch, max_length, chunk
        self.runner = Runner(model, tokenizer, max_batch, max_length)
        self.scheduler = None
        self.in_flight = deque()  # outputs that the host has not received; arguments of _receive
        self.n_ahead = 2 if self.runner.device.type == "cuda" else 0  # most outputs in flight
        self.n_paused_prompts = self.n_paused_decodes = 0  # prompts and steps so far for which pauses were computed

    def submit(
        self,
        prompts: SequenceOf[str | list[int]],
        pauses: int | Policy = 0,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | SequenceOf[int] = 1337,
        attention: Literal["causal", "prefix"] = "causal",
        until: SequenceOf[str] = (),
        trace: bool = False,
    ) -> None:
        """Queue prompts for `step`, in place of those that are not finished.

        prompts: texts, or token ids; an empty one starts after an end of text. pauses: that many after every prompt, or
        a policy. seed: prompt i is sampled with seed + i, or with seed[i]. A sequence's output does not depend on the
        rest of its batch, up to floating-point rounding, except under StopWhenUseless, which measures all of them.
        attention: "prefix" lets a prompt and its pauses attend to each other in both directions; pauses that may be
        rolled back are then not placed after the prompt. until: generation ends with the first of these texts, which is
        included. trace: keep the likeliest tokens.

        Raises UserError if an option is of the wrong kind or out of its range, or if a prompt and its pauses exceed
        max_length. Nothing has changed then."""
        policy = pauses if isinstance(pauses, Policy) else AfterPrompt(pauses)
        check_whole("max_new_tokens", max_new_tokens, 0, 2**31)
        check("temperature", temperature, 0, 1e6)
        check_whole("top_k", top_k, 0, 2**31)
        check("top_p", top_p, 0, 1)
        if attention not in ("causal", "prefix"):
            raise UserError(f"attention={attention!r} is neither 'causal' nor 'prefix'")
        policy.check_attention(attention)
        if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
            raise UserError(f"generation takes a list of prompts, and it is {short(prompts)}")
        if isinstance(until, str) or not isinstance(until, SequenceOf):
            raise UserError(f"until takes a list of texts, and it is {short(until)}")
        if not all(isinstance(text, str) and text for text in until):
            raise UserError(f"until={short(until)} must be texts of at least one character: leave the others out")
        if not isinstance(trace, bool):
            raise UserError(f"trace={short(trace)} must be True or False")
        for each in seed if isinstance(seed, SequenceOf) else [seed]:
            check_whole("seed", each, 0, 2**62)
        seeds = seed if isinstance(seed, SequenceOf) else [seed + i for i in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one, or one per prompt")
        n_certain = policy.at_prompt if policy.certain else 0
        sequences = [
            Sequence(i, self._ids(i, prompt, n_certain), seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds))
        ]
        self.in_flight.clear()
        self.runner.configure(policy, Sampling(temperature, top_k, top_p), trace)
        self.scheduler = Scheduler(
            sequences if max_new_tokens else [], policy, max_batch=self.max_batch, max_length=self.max_length,
            chunk=self.chunk, max_new_tokens=max_new_tokens, is_prefix_lm=attention == "prefix",
        )  # fmt: skip
        self.until = [text.encode() for text in until]

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Run the next step, and return the tokens that have arrived; none when all sequences are finished."""
        step = self.scheduler.schedule()
        if step.prefill:
            output = self.runner.prefill(step.prefill, self.scheduler.max_new_tokens, self.scheduler.is_prefix_lm)
            self._send(output, list(enumerate(chunk.sequence for chunk in step.prefill if chunk.ends_prompt)))
            self.n_paused_prompts += sum(chunk.n_pauses > 0 for chunk in step.prefill)
        if step.decode:
            output = self.runner.decode(step.n_slots, step.n_pauses)
            self._send(output, [(sequence.slot, sequence) for sequence in step.decode])
            self.n_paused_decodes += step.n_pauses > 0
        tokens = []
        while len(self.in_flight) > (self.n_ahead if step.prefill or step.decode else 0):
            tokens += self._receive(*self.in_flight.popleft())
        return tokens

    def stream(self, prompts: SequenceOf[str | list[int]], pauses: int | Policy = 0, **options) -> Iterator[Token]:
        """The tokens of all prompts as they are generated. Arguments and errors as in `submit`."""
        self.submit(prompts, pauses, **options)
        return self._tokens(self.scheduler)

    def generate(self, prompts: SequenceOf[str | list[int]], pauses: int | Policy = 0, **options) -> list[Generation]:
        """The Generation of each prompt, in their order. Arguments and errors as in `submit`."""
        stream = self.stream(prompts, pauses, **options)
        generations = [Generation() for _ in prompts]
        for token in stream:
            generations[token.sequence].tokens.append(token)
        for generation in generations:
            generation.text = self.tokenizer.decode(generation.ids)
        return generations

    @property
    def is_finished(self) -> bool:
        return not (self.scheduler.waiting or self.scheduler.running or self.in_flight)

    def _tokens(self, scheduler: Scheduler) -> Iterator[Token]:
        while True:
            if self.scheduler is not scheduler:
                raise UserError("the engine has begun another stream since: it serves one at a time")
            if self.is_finished:
                return
            yield from self.step()

    def _ids(self, i: int, prompt: str | list[int], n_certain: int) -> list[int]:
        """The token ids of prompt i, checked."""
        if isinstance(prompt, str):
            bos_id = self.tokenizer.bos_id
            ids = [bos_id] * (bos_id is not None) + self.tokenizer.encode(prompt)
        else:
            try:
                ids = [index(id) for id in prompt]
            except TypeError:
                raise UserError(f"prompt {i} is neither a text nor a list of token ids: {short(prompt)}") from None
        ids = ids or [self.tokenizer.begin_id]
        if len(ids) + n_certain > self.max_length:
            raise UserError(f"prompt {i} and its pauses are {len(ids)} + {n_certain} tokens, and max_length is "
                            f"{self.max_length}: shorten the prompt or lower the number of pauses")  # fmt: skip
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise UserError(f"prompt {i} has a token id that is not 0 to {self.model.config.vocab_size - 1}")
        return ids

    def _send(self, output: Output | None, sequences: list[tuple[int, Sequence]]) -> None:
        """Start the copy of an output to the host. sequences: (row of the output, its sequence)."""
        if not sequences:
            return
        event = None
        if self.runner.device.type == "cuda":
            output = Output(*(x if x is None else x.to("cpu", non_blocking=True) for x in output))  # to pinned memory
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.runner.device))
        self.in_flight.append((output, event, sequences))

    def _receive(
        self, output: Output, event: torch.cuda.Event | None, sequences: list[tuple[int, Sequence]]
    ) -> list[Token]:
        """The tokens of a step, once the device has computed it."""
        if event is not None:
            event.synchronize()
        columns = Output(*(None if x is None else x.tolist() for x in output))
        scheduler, tokens = self.scheduler, []
        scheduler.is_pausing = not columns.is_off
        for row, sequence in sequences:
            if sequence.state == "finished":  # by an earlier output, when this one was already scheduled
                continue
            id, n_pauses, logprob_without = columns.token[row], columns.n_pauses[row], columns.logprob_without[row]
            sequence.n_received += 1
            sequence.n_pauses += n_pauses
            top, top_without = (
                [] if ids is None else list(zip(ids[row], logprobs[row]))
                for ids, logprobs in ((columns.top, columns.top_logprob),
                                      (columns.top_without, columns.top_logprob_without))
            )  # fmt: skip
            if scheduler.is_prefix_lm and n_pauses and sequence.n_received == 1:  # the prompt has attended to them
                logprob_without, top_without = math.nan, []
            end = self._end(sequence, id, columns.is_last[row])
            if end:
                scheduler.finish(sequence)
            tokens.append(
                Token(sequence.index, id, n_pauses, columns.logprob[row], logprob_without, end, top, top_without)
            )
        return tokens

    def _end(self, sequence: Sequence, id: int, is_last: bool) -> str | None:
        """Why the sequence ends with this token, or None."""
        if is_last and id in self.tokenizer.end_ids:
            return "eot"
        if self.until:
            text = sequence.tail + self.tokenizer.decode_bytes([id])
            sequence.tail = text[-max(map(len, self.until)) :]
            if any(stop in text for stop in self.until):
                self.runner.end(sequence.slot)  # the device does not know texts
                return "until"
        if is_last:
            return "length" if sequence.n_received == self.scheduler.max_new_tokens else "context"
        return None
