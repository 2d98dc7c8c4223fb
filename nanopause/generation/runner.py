"""Steps of generation as tensors: the cache, the state of every slot, and the forward passes.

Keys and values are in a static cache, [n_layer, 2, max_batch, max_length + 1, G, D], one slot per sequence;
the last position takes what padding writes. Every step is an interval mask over it (nanopause.kernels):

    decode     queries [n, 1 + M], one row per slot, attend to keys [0, length + j + 1) of their slot
    prefill    queries [1, N], prompts one after the other. The cache is viewed as one long row of S = max_length + 1
               positions per slot; the prompt in slot b attends to [b·S, b·S + position + 1), in a prefix-LM to the end
               of its prefix
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopause.errors import check_whole
from nanopause.generation.sampling import Sampling, logprobs_among, sample
from nanopause.generation.scheduler import Chunk
from nanopause.model import GPT
from nanopause.policy import Never, Policy
from nanopause.tokenizer import Tokenizer

N_TOP = 5  # likeliest tokens that a trace keeps


@dataclass
class Slots:
    """State of every slot, int64 [max_batch + 1]; the last entry belongs to padding."""

    length: Tensor  # tokens in the cache; later positions hold nothing that a query attends to
    token: Tensor  # the last one generated, which is not in the cache yet
    n_generated: Tensor
    left: Tensor  # tokens still to generate; 0 once the sequence has ended
    budget: Tensor  # pauses that may still be committed
    seed: Tensor


class Tokens(NamedTuple):
    """The tokens of a prefill, int64 [N]. write_at, lo, hi: in the cache as one row."""

    id: Tensor
    position: Tensor
    write_at: Tensor
    lo: Tensor
    hi: Tensor


class Starts(NamedTuple):
    """The sequences whose prompts end in a prefill, int64 [n]. last, last_pause: indices in Tokens."""

    slot: Tensor
    last: Tensor
    last_pause: Tensor
    n_pauses: Tensor
    length: Tensor
    left: Tensor
    budget: Tensor
    seed: Tensor


class Output(NamedTuple):
    """What a step generated, one entry per sequence."""

    token: Tensor  # int64 [n]
    logprob: Tensor  # float32 [n]
    logprob_without: Tensor  # float32 [n], before the pauses
    n_pauses: Tensor  # int64 [n], committed
    is_last: Tensor  # bool [n], by end of text or length
    is_off: Tensor  # bool [], of the policy
    top: Tensor | None  # with trace: ids [n, N_TOP]
    top_logprob: Tensor | None
    top_without: Tensor | None
    top_logprob_without: Tensor | None


class Runner:
    """Runs the steps of a Scheduler. On a GPU each kind and size of step is a CUDA graph, so sizes are padded to powers
    of two (`pads`), and no method waits for the device."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_batch: int, max_length: int):
        self.model, self.tokenizer, self.max_batch, self.max_length = model, tokenizer, max_batch, max_length
        self.device = model.head.weight.device
        self.pads = self.device.type == "cuda"
        with torch.inference_mode(False):  # these are written to inside and outside of inference mode
            self.cache = model.new_cache(max_batch, max_length + 1)
            self.slots = Slots(*torch.zeros(6, max_batch + 1, dtype=torch.int64, device=self.device).unbind())
            self.end_ids = torch.tensor(tokenizer.end_ids, device=self.device)
        self.graphs = {}
        self.settings = None
        self.configure(Never(), Sampling(), trace=False)  # append may be called before any list of prompts

    def configure(self, policy: Policy, sampling: Sampling, trace: bool) -> None:
        """Set what all sequences have in common, and forget those that are not finished."""
        policy.to(self.device)
        self.policy, self.sampling, self.trace = policy, sampling, trace
        self.slots.left.zero_()
        settings = (sampling, trace, repr(policy), [tensor.data_ptr() for tensor in policy.tensors()])
        if settings != self.settings:  # graphs have them built in
            self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] == "append"}
            self.settings = settings

    # The steps

    @torch.no_grad()
    def append(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Append the first counts[b] of tokens[b] to the sequence in slot b < n, without generating: for one's own
        loops and for benches. A sequence starts with slots.length[b] = 0.

        tokens: int64 [n, Q]; counts: int64 [n], 0 to Q. slots.length[b] + counts[b] must not exceed max_length.
        Returns the hidden states after the last norm, [n, Q, C], valid until the next call; rows from counts[b] on are
        undefined. Raises UserError for more than max_batch sequences."""
        n, Q = tokens.shape
        check_whole("sequences", n, 1, self.max_batch)
        n_padded, width = min(self.rounded(n), self.max_batch), self.rounded(Q)
        tokens, counts = F.pad(tokens, (0, width - Q, 0, n_padded - n)), F.pad(counts, (0, n_padded - n))

        def run(tokens: Tensor, counts: Tensor) -> Tensor:
            x = self._hidden(tokens, counts)
            self.slots.length[:n_padded] += counts
            return x

        return self._run(("append", n_padded, width), run, tokens, counts)[:n, :Q]

    def decode(self, n_slots: int, n_pauses: int) -> Output:
        """One token more for the first n_slots slots, each fused with n_pauses pauses after the last token, where the
        sequence has room and budget for them. The result is valid until the next call."""
        n_slots = min(self.rounded(n_slots), self.max_batch)

        def run() -> Output:
            first, slots = slice(0, n_slots), self.slots
            is_active = slots.left[first] > 0
            fits = slots.length[first] + 1 + n_pauses <= self.max_length
            n_offered = n_pauses * (is_active & fits & (slots.budget[first] >= n_pauses))
            tokens = F.pad(slots.token[first, None], (0, n_pauses), value=self.tokenizer.pause_id)
            x = self._hidden(tokens, is_active + n_offered)
            slots.length[first] += is_active
            return self._emit(first, x[:, 0], x[:, n_pauses], n_offered if n_pauses else None)

        return self._run(("decode", n_slots, n_pauses), run)

    def prefill(self, chunks: list[Chunk], max_new_tokens: int, is_prefix_lm: bool) -> Output | None:
        """Prefill parts of prompts, in order of their slots, and generate the first token after each that ends here;
        None if no prompt ends. Rows of Output after those of the prompts that end are padding. The result is valid
        until the next call."""
        tokens, starts = self._layout(chunks, max_new_tokens, is_prefix_lm)
        has_ends, has_pauses = any(c.ends_prompt for c in chunks), any(c.n_pauses for c in chunks)

        def run(tokens: Tensor, starts: Tensor) -> Output | None:
            tokens, starts, slots = Tokens(*tokens.unbind()), Starts(*starts.unbind()), self.slots
            x = self.model.hidden(
                tokens.id[None], positions=tokens.position[None], write_at=tokens.write_at[None],
                lo=tokens.lo[None].int(), hi=tokens.hi[None].int(),
                cache=self.cache.flatten(2, 3).unsqueeze(2),  # a view
            )[0]  # fmt: skip
            if not has_ends:
                return None
            for name in ("length", "left", "budget", "seed"):
                getattr(slots, name)[starts.slot] = getattr(starts, name)
            slots.n_generated[starts.slot] = 0
            n_offered = starts.n_pauses if has_pauses else None
            return self._emit(starts.slot, x[starts.last], x[starts.last_pause], n_offered)

        key = "prefill", tokens.shape[1], has_ends, has_pauses
        return self._run(key, run, self._to_device(tokens), self._to_device(starts))

    def end(self, slot: int) -> None:
        """The sequence in this slot generates no more."""
        self.slots.left[slot] = 0

    def rounded(self, n: int) -> int:
        """The padded size of a step over n sequences or tokens."""
        return 1 << (n - 1).bit_length() if self.pads and n else n

    # Their parts

    def _hidden(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Forward pass of append and decode: hidden states [n, Q, C]. Lengths stay."""
        n, Q = tokens.shape
        length = self.slots.length[:n, None]
        position = length + torch.arange(Q, device=self.device)
        end = length + counts[:, None]
        is_new = position < end
        hi = torch.minimum(position + 1, end) * (counts[:, None] > 0)  # an idle slot attends to nothing
        return self.model.hidden(
            tokens, positions=torch.where(is_new, position, 0), write_at=torch.where(is_new, position, self.max_length),
            hi=hi.int(), cache=self.cache[:, :, :n],
        )  # fmt: skip

    def _emit(self, which: slice | Tensor, x: Tensor, x_paused: Tensor, n_offered: Tensor | None) -> Output:
        """Let the policy commit or roll back the pauses, and sample the next token of the slots `which`.

        x, x_paused: hidden states [n, C] after the last token and after the pauses. n_offered: pauses in the cache
        after it, int64 [n]; None if there are none."""
        slots, policy, n_text = self.slots, self.policy, self.tokenizer.pause_id  # text ids are those below the pause
        seed, n_generated = slots.seed[which], slots.n_generated[which]
        logits = self.model.head(x)
        logprobs = logprobs_without = logprobs_among(n_text, logits)
        n_pauses = torch.zeros_like(n_generated)
        if n_offered is not None:
            requests = None
            if policy.asks:  # ~seed: the token after the pauses must not depend on the noise that requested them
                requests = sample(logprobs_among(n_text + 1, logits), self.sampling, ~seed, n_generated) == n_text
            # Where this is 0 the pauses are rolled back: the length stays, so that later tokens overwrite them.
            n_pauses = n_offered * policy.wants(logprobs_without, requests)
            slots.length[which] += n_pauses
            slots.budget[which] -= n_pauses
            logprobs_paused = logprobs_among(n_text, self.model.head(x_paused))
            logprobs = torch.where(n_pauses[:, None] > 0, logprobs_paused, logprobs_without)
        token = sample(logprobs, self.sampling, seed, n_generated)
        logprob, logprob_without = (each.gather(1, token[:, None])[:, 0] for each in (logprobs, logprobs_without))
        if n_offered is not None:
            policy.observe(logprob - logprob_without, n_pauses > 0)
        must_end = (token[:, None] == self.end_ids).any(1) | (slots.length[which] >= self.max_length)
        left = (slots.left[which] - 1).clamp(min=0).masked_fill(must_end, 0)
        slots.token[which] = token
        slots.n_generated[which] = n_generated + 1
        slots.left[which] = left
        is_off = torch.zeros((), dtype=torch.bool, device=self.device) | policy.is_off()
        top = (None,) * 4
        if self.trace:
            top = [each for values in (logprobs, logprobs_without) for each in values.topk(N_TOP)[::-1]]
        return Output(token, logprob, logprob_without, n_pauses, left == 0, is_off, *top)

    def _layout(self, chunks: list[Chunk], max_new_tokens: int, is_prefix_lm: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and Starts of a prefill, int64 [5, N] and [8, n]."""
        S, pause_id, columns, starts, n_tokens = self.max_length + 1, self.tokenizer.pause_id, [], [], 0
        for chunk in chunks:
            sequence = chunk.sequence
            ids = sequence.prompt[chunk.start : chunk.stop] + [pause_id] * chunk.n_pauses
            position = chunk.start + np.arange(len(ids))
            write_at = sequence.slot * S + position
            lo = np.full_like(write_at, sequence.slot * S)
            hi = np.full_like(write_at, write_at[-1] + 1) if is_prefix_lm else write_at + 1
            columns.append(np.stack(Tokens(ids, position, write_at, lo, hi)))
            n_tokens += len(ids)
            if chunk.ends_prompt:
                starts.append(Starts(
                    sequence.slot, n_tokens - 1 - chunk.n_pauses, n_tokens - 1, chunk.n_pauses, chunk.stop,
                    max_new_tokens, self.policy.budget, sequence.seed,
                ))  # fmt: skip
        n_padding = self.rounded(n_tokens) - n_tokens
        padding = Tokens(pause_id, 0, self.max_batch * S - 1, self.max_batch * S, self.max_batch * S)
        columns.append(np.repeat(np.array(padding)[:, None], n_padding, axis=1))
        n_starts = self.max_batch if self.pads else max(1, len(starts))
        starts += [Starts(self.max_batch, 0, 0, 0, 0, 0, 0, 0)] * (n_starts - len(starts))
        return np.concatenate(columns, axis=1), np.array(starts).T

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    # CUDA graphs

    def _run(self, key: tuple, function: Callable, *inputs: Tensor):
        """function(*inputs); on a GPU by the CUDA graph of `key`, captured at first use."""
        if self.device.type != "cuda":
            return function(*inputs)
        with torch.cuda.device(self.device):
            if key not in self.graphs:
                self.graphs[key] = self._capture(function, inputs)
            graph, static_inputs, result = self.graphs[key]
            for static, new in zip(static_inputs, inputs):
                static.copy_(new)
            graph.replay()
        return result

    def _capture(self, function: Callable, inputs: tuple[Tensor, ...]) -> tuple:
        """The graph, its inputs and its result. The state of slots and policy is left as it was."""
        with torch.inference_mode(False):
            static = [x.clone() for x in inputs]
        state = [*vars(self.slots).values(), *self.policy.tensors()]
        before = [x.clone() for x in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*static)  # compiles the kernels
        torch.cuda.current_stream().wait_stream(side)
        graph, others = torch.cuda.CUDAGraph(), list(self.graphs.values())
        with torch.cuda.graph(graph, pool=others[0][0].pool() if others else None):
            result = function(*static)
        for tensor, was in zip(state, before):
            tensor.copy_(was)
        return graph, static, result
