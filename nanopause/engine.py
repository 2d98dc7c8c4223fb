"""Generation in a continuous batch, whose one operation is to append q_b tokens to sequence b.

A step reads any number of new tokens of every sequence, 0 included, at the price of about one, as long as reading the
weights takes the time. So pauses never are steps of their own:

    a prompt and its pauses     are one pass [Goyal et al. 2023, Algorithm 3];
    a token and M pauses        are one step. The model speaks at the token and at the last pause, the policy decides
                                whose word counts, and pauses that do not are taken back: the next token takes their
                                place in the cache. On a CPU, where every row costs time, they ride along where the last
                                step paused; where it did not, and this one does, they are read in a pass of their own.

What a step needs to know is on the device. On a GPU the host launches steps before it reads what the last ones said,
and the device never waits for it. Sequences have a row each of a static cache, [n_layer, 2, max_batch, max_length + 1,
G, D], whose last slot takes what padded queries write. Both layouts of a step are intervals of it (kernels.attention):

    decode     queries [n, 1 + M], a row a sequence: keys [0, length + j + 1) of the row
    prefill    queries [1, N], prompts one behind the other: the cache is one long row, and the prompt of sequence b
               reads [b·S, b·S + position + 1), or to the end of its prefix in a prefix-LM
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import index
from reprlib import repr as short
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopause.errors import UserError, check, check_whole
from nanopause.model import GPT
from nanopause.packed import packed
from nanopause.policy import AfterPrompt, Policy
from nanopause.tokenizer import Tokenizer

N_TOP = 5  # likeliest tokens that a trace keeps


def gumbel(seed: Tensor, place: Tensor, n: int) -> Tensor:
    """Gumbel noise, float32 [B, n], that depends on seed, place, int64 [B], and its column alone: a sequence's does not
    on who is in its batch. The bits are mixed as SplitMix64 does [Steele et al. 2014]."""

    def mix(x: Tensor) -> Tensor:
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # int64: >> copies the sign, which & drops
        return x

    golden = -7046029254386353131
    row = mix(mix(seed * golden) + place * golden)
    column = torch.arange(1, n + 1, device=seed.device)
    # 23 bits and a half are exact in float32: neither 0 nor 1, whose noise would be infinite.
    bits = mix(row[:, None] + column * golden) & (1 << 23) - 1
    return -(-((bits.float() + 0.5) * 2**-23).log()).log()


def likeliest(scores: Tensor) -> Tensor:
    """argmax of float32 [B, V] over V, int64 [B]; on a CPU NumPy's, as torch's takes longer than a log_softmax."""
    return torch.from_numpy(scores.numpy().argmax(-1)) if scores.device.type == "cpu" else scores.argmax(-1)


class Sampling(NamedTuple):
    """temperature 0: the likeliest. top_k 0 and top_p 1 do not restrict; else the k likeliest tokens, and the fewest
    whose probabilities reach top_p, stay; a token as likely as the last of them does too."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logprobs: Tensor, noise: Tensor | None) -> Tensor:
        """A token id a row, int64 [B], of logprobs [B, V]. noise: gumbel's, of the same shape; unused if greedy."""
        if self.temperature == 0:
            return likeliest(logprobs)
        x = (logprobs - logprobs.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < x.shape[-1]:
            x = x.masked_fill(x < x.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            ordered = x.sort(descending=True).values
            probability = ordered.softmax(-1)
            kept = probability.cumsum(-1) - probability < self.top_p
            kept[:, 0] = True
            x = x.masked_fill(x < torch.where(kept, ordered, torch.inf).amin(-1, keepdim=True), -torch.inf)
        return likeliest(x + noise)  # a draw from softmax(x)


class Token(NamedTuple):
    """A token that a sequence got. end is None, or why it is the last: "eot" (then this is the end of text itself),
    "until" (it completes one of those texts), "length" (max_new_tokens) or "context" (the engine's max_length).
    Log-probabilities are in nats, of the model at temperature 1, among text. What was likely before the pauses is not
    known where the prompt of a prefix-LM has read them: logprob_without is then NaN, and top_without empty."""

    sequence: int
    id: int
    pauses: int  # before it
    logprob: float
    logprob_without: float  # before the pauses
    end: str | None
    top: list[tuple[int, float]]  # with trace: the likeliest ids and their log-probabilities
    top_without: list[tuple[int, float]]


@dataclass
class Generation:
    """What a prompt got. text: of the tokens up to an end of text."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""

    @property
    def ids(self) -> list[int]:
        """The tokens of the text."""
        return [token.id for token in self.tokens if token.end != "eot"]

    @property
    def pauses(self) -> int:
        return sum(token.pauses for token in self.tokens)

    @property
    def end(self) -> str:
        """Why it ended, see Token."""
        return self.tokens[-1].end if self.tokens else "length"


@dataclass(eq=False)
class _Sequence:
    """A prompt on its way. read: how many of its tokens are in the cache; asked: tokens that passes have begun to make;
    made: those that the host has seen; paused: pauses that it had; tail: the last bytes of its text, where a text of
    `until` may have begun."""

    index: int
    prompt: list[int]
    seed: int
    slot: int = -1
    read: int = 0
    asked: int = 0
    made: int = 0
    paused: int = 0
    tail: bytes = b""
    done: bool = False


class _Pass(NamedTuple):
    """What a pass says, which the device may not have finished: a row a sequence. paused: with columns of pauses."""

    rows: Tensor
    paused: bool
    event: torch.cuda.Event | None
    sequences: dict[int, _Sequence]


class Engine:
    """Generates from one model for up to max_batch sequences at a time, of up to max_length tokens each, pauses
    included. chunk: tokens of prompts that a pass reads (on a CPU passes are even, and up to half as long again), after
    which all others get a token more; who has just begun waits for up to two passes more. The prefix of a prefix-LM is
    not cut, nor are pauses from the token before them. It serves one stream at a time, and on a GPU captures its graphs
    anew for another policy or sampling."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_batch: int = 8, max_length: int | None = None, chunk: int = 2048
    ):
        self.model, self.tokenizer, self.max_batch, self.chunk = packed(model), tokenizer, max_batch, chunk
        self.max_length = model.config.block_size if max_length is None else max_length
        check_whole("max_batch", max_batch, 1, 2**20)
        check_whole("chunk", chunk, 1, 2**31)
        check_whole("max_length", self.max_length, 1, model.config.block_size)
        self.device = model.head.weight.device
        with torch.inference_mode(False):  # they are written to in and outside of it
            self.cache = model.new_cache(max_batch, self.max_length + 1)
            # Of every sequence; the last column is that of no one.
            self.state = torch.zeros(6, max_batch + 1, dtype=torch.int64, device=self.device)
            self.ends = torch.tensor(tokenizer.end_ids, device=self.device)
        # length: tokens in the cache. token: the next to append. place: tokens made; left: still to make, not above 0
        # where the sequence has ended. budget: pauses left.
        self.length, self.token, self.place, self.left, self.budget, self.seed = self.state
        self.policy, self.sampling, self.trace = Policy(), Sampling(), False
        # The host sees every pass before it starts the next, and pads nothing. On a GPU it runs ahead, with graphs of
        # a few sizes.
        self.lockstep = self.device.type != "cuda"
        self.graphs = {}
        self.settings = self.current = None  # of the graphs; the stream that runs
        # Prompts and steps that were read with pauses, and passes of pauses alone.
        self.paused_prompts = self.paused_steps = self.pause_passes = 0

    # The operation

    @torch.no_grad()
    def append(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Append the first counts[b] of tokens[b] to sequence b < n; they read all tokens before them.

        tokens: int64 [n, Q]; counts: int64 [n], 0 to Q, for which there must be room: self.length is what they hold.
        Returns the residual stream after the last norm, [n, Q, C], up to the next call on a GPU; rows from counts[b]
        on say nothing. Raises UserError where there are not so many sequences."""
        n, Q = tokens.shape
        check_whole("sequences", n, 1, self.max_batch)
        rows, width = min(self._bucket(n), self.max_batch), self._bucket(Q)
        tokens, counts = F.pad(tokens, (0, width - Q, 0, rows - n)), F.pad(counts, (0, rows - n))
        return self._run(("append", rows, width), self._append, tokens, counts)[:n, :Q]

    def _append(self, tokens: Tensor, counts: Tensor | None, rows: slice | None = None) -> Tensor:
        """See append. counts None: all of the tokens. rows: which of their states are returned."""
        n, Q = tokens.shape
        length, cache = self.length[:n, None], self.cache[:, :, :n]
        places = length + torch.arange(Q, device=self.device)
        if counts is None:
            length += Q
            return self.model.hidden(tokens, positions=places, cache=cache, rows=rows)
        end = length + counts[:, None]
        new, hi = places < end, torch.minimum(places + 1, end).int()
        x = self.model.hidden(
            tokens, positions=torch.where(new, places, 0), slots=torch.where(new, places, self.max_length),
            lo=torch.where(new, 0, hi), hi=hi, cache=cache, rows=rows,
        )  # fmt: skip
        self.length[:n] = end[:, 0]
        return x

    def _decode(self, n: int, ride: int, together: bool, all_alive: bool) -> Tensor:
        """A token more for the first n sequences, with `ride` pauses behind the one before it where there is room.
        together: in the same pass; else they are read afterwards, if any are wanted, which the host looks at."""
        who, head, pause_id = slice(0, n), self.model.head, self.tokenizer.pause_id
        token = self.token[who, None]
        counts = None if all_alive else self.left[who].clamp(0, 1)
        if not ride:
            return self._settle(who, self._logprobs(head(self._append(token, counts)[:, 0])))
        room = (self.budget[who] >= ride) & (self.length[who] + 1 + ride <= self.max_length)
        rode = ride * room if all_alive else ride * room * counts
        if together:
            tokens, counts = F.pad(token, (0, ride), value=pause_id), rode + (1 if all_alive else counts)
            without, behind = head(self._append(tokens, counts, slice(None, None, ride)).transpose(0, 1))
            logprobs, wanted = self._wants(who, without)
            kept = rode * wanted
            self.length[who] += kept - rode
        else:
            logprobs, wanted = self._wants(who, head(self._append(token, counts)[:, 0]))
            kept, behind = rode * wanted, None
            if kept.any():
                self.pause_passes += 1
                behind = head(self._append(token.new_full((n, ride), pause_id), kept, slice(-1, None))[:, 0])
        return self._settle(who, logprobs, kept, behind)

    def _prefill(self, tokens: Tensor, sequences: Tensor, ride: int) -> Tensor:
        """Read prompts, and begin the sequences whose prompts end here.

        tokens: int64 [5, N]: ids, positions, slots of the cache as one row, lo, hi. sequences: int64 [8, n]: columns of
        the state, rows of the prompts' last tokens and of the last pauses, pauses, and the state."""
        ids, positions, slots, lo, hi = tokens[:, None]
        who, first, last, rode, length, left, budget, seed = sequences
        row = self.cache.flatten(2, 3).unsqueeze(2)  # a view
        x = self.model.hidden(
            ids, positions=positions, slots=slots, lo=lo.int(), hi=hi.int(), cache=row,
            rows=torch.stack((first, last), 1).flatten() if ride else first,
        )[0]  # fmt: skip
        zero = torch.zeros_like(length)
        self.state[:, who] = torch.stack((length, zero, zero, left, budget, seed))
        if not ride:
            return self._settle(who, self._logprobs(self.model.head(x)))
        without, behind = self.model.head(x.unflatten(0, (-1, 2)).transpose(0, 1))
        logprobs, wanted = self._wants(who, without)
        kept = rode * wanted
        self.length[who] += kept
        return self._settle(who, logprobs, kept, behind)

    def _logprobs(self, logits: Tensor, n_more: int = 0) -> Tensor:
        """Of text, and of n_more ids behind it, float32 [n, V]; −∞ for others, pauses and padded ids. Logits in float32
        become them in place: other memory would have to be written too."""
        logits = logits.float()
        logits[:, self.tokenizer.pause_id + n_more :].fill_(-torch.inf)
        return torch.log_softmax(logits, -1, out=logits)

    def _sample(self, logprobs: Tensor, seed: Tensor, place: Tensor) -> Tensor:
        noise = gumbel(seed, place, logprobs.shape[-1]) if self.sampling.temperature else None
        return self.sampling.choose(logprobs, noise)

    def _wants(self, who: slice | Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """_logprobs of the logits [n, V] without pauses, and which of the sequences `who` pause by them, bool [n]."""
        asks = None
        if self.policy.asks:
            # With noise of its own: what is said after the pauses must not depend on that which asked for them.
            said = self._sample(self._logprobs(logits, 1), ~self.seed[who], self.place[who])
            asks = said == self.tokenizer.pause_id
        logprobs = self._logprobs(logits)
        return logprobs, self.policy.wants(logprobs, asks)

    def _settle(
        self, who: slice | Tensor, logprobs: Tensor, kept: Tensor | None = None, behind: Tensor | None = None
    ) -> Tensor:
        """The next token of the sequences `who`, from _logprobs without pauses. kept: their pauses, int64 [n], where
        they might have some; behind: the logits [n, V] behind these, None if there are none.

        Returns what the host reads, float32 [n, 3 + …]: id, its log-probability, tokens left to make; with `kept`
        pauses, the log-probability without them, whether the policy is off; with trace the likeliest tokens."""
        state = self.state[:, who]
        length, token, place, left, budget, seed = state
        said = logprobs
        if behind is not None:
            said = torch.where(kept[:, None] > 0, self._logprobs(behind), logprobs)
        choice = self._sample(said, seed, place)[:, None]
        of_choice = said.gather(1, choice)
        token.copy_(choice[:, 0])
        place += 1
        left -= 1
        left.masked_fill_((choice == self.ends).any(1) | (length >= self.max_length), 0)
        columns, likely = [choice, of_choice, left[:, None]], [said]
        if kept is not None:
            of_choice_without = of_choice if behind is None else logprobs.gather(1, choice)
            self.policy.observe((of_choice - of_choice_without)[:, 0], kept > 0)
            budget -= kept
            off = torch.zeros_like(choice) | self.policy.is_off()
            columns, likely = [*columns, kept[:, None], of_choice_without, off], [said, logprobs]
        if not isinstance(who, slice):  # it was a copy
            self.state[:, who] = state
        if self.trace:
            columns += [torch.stack(x.topk(N_TOP)[::-1], 2).flatten(1) for x in likely]
        return torch.cat([column.float() for column in columns], 1)

    def _run(self, key: tuple, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), on a GPU by the CUDA graph of `key`, which is captured the first time."""
        if self.device.type != "cuda":
            return function(*inputs)
        with torch.cuda.device(self.device):
            if key not in self.graphs:
                self.graphs[key] = self._capture(function, inputs)
            graph, static, result = self.graphs[key]
            for mine, given in zip(static, inputs):
                mine.copy_(given)
            graph.replay()
        return result

    def _capture(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple:
        """The graph, its inputs and its result; the state is as before."""
        with torch.inference_mode(False):  # they are written to in and outside of it
            static = [x.clone() for x in inputs]
        state = self.state, *self.policy.tensors()
        before, side = [x.clone() for x in state], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*static)  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph, others = torch.cuda.CUDAGraph(), list(self.graphs.values())
        with torch.cuda.graph(graph, pool=others[0][0].pool() if others else None):
            result = function(*static)
        for tensor, was in zip(state, before):
            tensor.copy_(was)
        return graph, static, result

    # The batch

    def stream(
        self,
        prompts: Sequence[str | list[int]],
        pauses: int | Policy = 0,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 1337,
        attention: Literal["causal", "prefix"] = "causal",
        until: Sequence[str] = (),
        trace: bool = False,
    ) -> Iterator[Token]:
        """The tokens of all prompts as they come, until each has an end of text, a text of `until`, max_new_tokens or
        no room.

        prompts: texts, which begin as the tokenizer has it, or token ids; an empty one starts after an end of text.
        pauses: that many after every prompt, or a policy. seed: prompt i draws with seed + i, or with seed[i], and gets
        the same text in any batch, but for roundings (nanopause.packed), and for StopWhenUseless, which measures all.
        attention: "prefix" lets a prompt and its pauses read each other in both directions; pauses that may be taken
        back are then left to the tokens after it. until: texts, of which the first ends what holds it, and stays in it.
        trace: keep the likeliest ids.

        Raises UserError, before the first token, where a number is out of its range or a prompt and its pauses are
        longer than max_length.
        """
        policy = pauses if isinstance(pauses, Policy) else AfterPrompt(pauses)
        check_whole("max_new_tokens", max_new_tokens, 0, 2**31)
        check("temperature", temperature, 0, 1e6)
        check_whole("top_k", top_k, 0, 2**31)
        check("top_p", top_p, 0, 1)
        if attention not in ("causal", "prefix"):
            raise UserError(f"attention={attention!r} is neither 'causal' nor 'prefix'")
        policy.check_attention(attention)
        if isinstance(prompts, str):
            raise UserError("generation takes a list of prompts, not one")
        if isinstance(until, str):
            raise UserError("until takes a list of texts, not one")
        for each in seed if isinstance(seed, Sequence) else [seed]:
            check_whole("seed", each, 0, 2**62)
        seeds = seed if isinstance(seed, Sequence) else range(seed, seed + len(prompts))
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one, or one a prompt")
        n_certain, waiting = policy.at_prompt if policy.certain else 0, deque()
        for i, prompt in enumerate(prompts):
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
                raise UserError(
                    f"prompt {i} and its pauses are {len(ids)} + {n_certain} tokens, and at most {self.max_length} can "
                    f"be read: shorten the prompt or lower the number of pauses"
                )
            if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
                raise UserError(f"prompt {i} has a token id that is not 0 to {self.model.config.vocab_size - 1}")
            waiting.append(_Sequence(i, ids, seeds[i]))
        settings = policy, Sampling(temperature, top_k, top_p), trace
        stops = [text.encode() for text in until]
        return self._stream(waiting, settings, max_new_tokens, attention == "prefix", stops)

    def generate(self, prompts: Sequence[str | list[int]], pauses: int | Policy = 0, **options) -> list[Generation]:
        """What `stream` makes of each prompt, in their order."""
        stream, made = self.stream(prompts, pauses, **options), [Generation() for _ in prompts]
        for token in stream:
            made[token.sequence].tokens.append(token)
        for generation in made:
            generation.text = self.tokenizer.decode(generation.ids)
        return made

    def _stream(
        self,
        waiting: deque[_Sequence],
        settings: tuple[Policy, Sampling, bool],
        max_new_tokens: int,
        prefix: bool,
        stops: list[bytes],
    ) -> Iterator[Token]:
        if max_new_tokens == 0:
            return
        self.policy, self.sampling, self.trace = settings
        policy, running, in_flight, current = self.policy, [], deque(), object()
        policy.to(self.device)
        # A policy that has other numbers now, or measures elsewhere, is another one.
        settings = (*settings, repr(policy), [tensor.data_ptr() for tensor in policy.tensors()])
        if self.settings != settings:
            self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] == "append"}
        self.settings, self.current = settings, current
        lag, waited = 0 if self.lockstep else 2, 0  # passes that the host is ahead, and that a batch has waited for
        per_token = policy.per_token if policy.per_token + 2 <= self.max_length else 0
        together = not self.lockstep
        self.left.zero_()
        off = bool(policy.is_off())
        while waiting or running or in_flight:
            if self.current is not current:
                raise UserError("the engine has begun another stream since: it serves one at a time")
            tokens = []
            with torch.inference_mode():  # not around the generator, which Python may close when PyTorch is gone
                at_prompt = 0 if off or (prefix and not policy.certain) else policy.at_prompt
                for slot in self._free(self.max_batch, running)[: len(waiting)] if waiting else ():
                    running.append(waiting.popleft())
                    running[-1].slot = slot
                n = self._close_ranks(running)
                reading = [sequence for sequence in running if sequence.read < len(sequence.prompt)]
                if reading:
                    in_flight.append(self._read_prompts(reading, max_new_tokens, at_prompt, prefix))
                writing = [sequence for sequence in running if 0 < sequence.asked < max_new_tokens]
                unread = sum(len(sequence.prompt) - sequence.read for sequence in reading)
                # A batch that begins waits for the last two passes over its prompts: a step for some of them costs as
                # much as one for all.
                begins = writing and waited < 2 and all(sequence.asked == 1 for sequence in writing)
                waited = waited + 1 if begins and 0 < unread <= 2 * self.chunk else 0
                if writing and not waited:
                    for sequence in writing:
                        sequence.asked += 1
                    may_pause = any(policy.budget - sequence.paused >= per_token for sequence in writing)
                    ride = per_token if may_pause and not off else 0
                    # The host knows that none has ended where it has seen all passes.
                    all_alive = self.lockstep and not reading
                    case = n, ride, together, all_alive
                    rows = self._run(("decode", *case), partial(self._decode, *case))
                    self.paused_steps += ride > 0 and together
                    in_flight.append(self._send(rows, ride > 0, {sequence.slot: sequence for sequence in writing}))
                while in_flight and (len(in_flight) > lag or not (reading or writing)):
                    new, now_off = self._receive(in_flight.popleft(), max_new_tokens, stops, prefix)
                    tokens, off = tokens + new, off | now_off
                    together = not self.lockstep or any(token.pauses for token in new)
                    running = [sequence for sequence in running if not sequence.done]
            yield from tokens

    def _bucket(self, n: int) -> int:
        """The size of a pass over n sequences or tokens: that of a graph."""
        return n if self.lockstep else 1 << (n - 1).bit_length()

    def _free(self, n: int, running: list[_Sequence]) -> list[int]:
        """Rows below n that no sequence has."""
        return sorted(set(range(n)) - {sequence.slot for sequence in running})

    def _close_ranks(self, running: list[_Sequence]) -> int:
        """How many rows a step needs. Sequences beyond them move to rows that others left."""
        n = min(self._bucket(len(running)), self.max_batch)
        for sequence in running:
            if sequence.slot >= n:
                slot = self._free(n, running)[0]
                for tensor in (self.cache, self.state[:, None]):
                    tensor[:, :, slot] = tensor[:, :, sequence.slot]
                self.left[sequence.slot] = 0
                sequence.slot = slot
        return n

    def _read_prompts(self, reading: list[_Sequence], max_new_tokens: int, at_prompt: int, prefix: bool) -> _Pass:
        """Read the next tokens of prompts, the first come first, about `chunk`. The last token of a prompt and its
        pauses are not parted, for the policy compares them."""
        S, pause_id, room, parts = self.max_length + 1, self.tokenizer.pause_id, self.chunk, []
        if self.lockstep:  # where no graph has a size of its own, passes are even: the last is not for a few tokens
            unread = sum(len(sequence.prompt) - sequence.read + at_prompt for sequence in reading)
            room = math.ceil(unread / max(1, round(unread / self.chunk)))
        for sequence in reading:
            length = len(sequence.prompt)
            room_for_pauses = at_prompt <= self.policy.budget and length + at_prompt <= self.max_length
            ride = at_prompt if room_for_pauses else 0
            rest = length - sequence.read
            if parts and (room <= 0 or (prefix and rest + ride > room)):
                break
            ends = prefix or rest == 1 or rest + ride <= room
            count, n_pauses = (rest, ride) if ends else (min(rest - 1, room), 0)
            parts.append((sequence, count, n_pauses, ends))
            room -= count + n_pauses
        parts.sort(key=lambda part: part[0].slot)  # which is that of their keys
        columns, begun, numbers, n = [], {}, [], 0
        for sequence, count, n_pauses, ends in parts:
            start, length = sequence.read, len(sequence.prompt)
            sequence.read += count
            ids = sequence.prompt[start : sequence.read] + [pause_id] * n_pauses
            positions = np.arange(start, start + len(ids))
            slots = sequence.slot * S + positions
            lo = np.full_like(slots, sequence.slot * S)
            hi = np.full_like(slots, slots[-1] + 1) if prefix else slots + 1
            columns.append(np.stack((ids, positions, slots, lo, hi)))
            n += len(ids)
            if ends:
                sequence.asked = 1
                begun[len(numbers)] = sequence
                numbers.append((sequence.slot, n - 1 - n_pauses, n - 1, n_pauses, length, max_new_tokens,
                                self.policy.budget, sequence.seed))  # fmt: skip
                self.paused_prompts += n_pauses > 0
        if not self.lockstep:
            end = self.max_batch * S
            columns.append(np.repeat([[pause_id], [0], [end - 1], [end], [end]], self._bucket(n) - n, axis=1))
        tokens = np.concatenate(columns, 1)
        # Sequences that are no one's: rows that are read must ascend, and there is one at least.
        last = tokens.shape[1] - 1
        numbers += [(self.max_batch, last, last, *[0] * 5)] * ((1 if self.lockstep else self.max_batch) - len(numbers))
        sequences = np.transpose(numbers)
        rows = self._run(
            ("prefill", tokens.shape[1], at_prompt), partial(self._prefill, ride=at_prompt),
            self._to_device(tokens), self._to_device(sequences),
        )  # fmt: skip
        return self._send(rows, at_prompt > 0, begun)

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _send(self, rows: Tensor, paused: bool, sequences: dict[int, _Sequence]) -> _Pass:
        """Set out to bring a pass's rows to the host."""
        if self.device.type != "cuda":
            return _Pass(rows, paused, None, sequences)
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _Pass(host, paused, event, sequences)

    def _receive(self, sent: _Pass, max_new_tokens: int, stops: list[bytes], prefix: bool) -> tuple[list[Token], bool]:
        """The tokens of a pass, and whether the policy is off."""
        if sent.event is not None:
            sent.event.synchronize()  # others follow it: the device has work
        rows, tokens, off = sent.rows.tolist(), [], False
        for i, sequence in sent.sequences.items():
            id, logprob, left, *top = rows[i]
            if sent.paused:
                pauses, logprob_without, off, *top = top
            else:
                pauses, logprob_without, top = 0, logprob, 2 * top
            if sequence.done:  # before this pass, which did not know
                continue
            if prefix and pauses and not sequence.made:
                logprob_without, top = math.nan, top[: 2 * N_TOP]
            sequence.made, sequence.paused = sequence.made + 1, sequence.paused + int(pauses)
            sequence.done, end = left <= 0, None
            if sequence.done and id in self.tokenizer.end_ids:
                end = "eot"
            elif sequence.done:
                end = "length" if sequence.made == max_new_tokens else "context"
            if stops and end != "eot":
                text = sequence.tail + self.tokenizer.decode_bytes([int(id)])
                sequence.tail = text[-max(map(len, stops)) :]
                if any(stop in text for stop in stops):  # which the device does not know
                    sequence.done, self.left[sequence.slot], end = True, 0, "until"
            pairs = [(int(id), logprob) for id, logprob in zip(top[::2], top[1::2])] if top else []
            tokens.append(Token(sequence.index, int(id), int(pauses), logprob, logprob_without, end, pairs[:N_TOP],
                                pairs[N_TOP:]))  # fmt: skip
        return tokens, bool(off)
