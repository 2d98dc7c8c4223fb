"""Pause finetuning's batches [Goyal et al. 2023, Algorithm 2]: a prefix, its pauses, a target that alone has a loss.

    tokens     p1  p2  <pause>  <pause>  t1  t2         with M = 2 pauses appended
    target     –   –   –        t1       t2  <eot>

With attention="prefix" everything before t1 reads itself in both directions; the target is always causal.

The examples of a pass lie one behind the other in one row, and an example reads nothing of its neighbours. Nothing is
padded (but to a multiple of data.ROW_MULTIPLE on a GPU), and attention costs what the examples do. Rows of a fixed
length, filled by best fit, would leave the last ones half empty: a step of 16 examples is only a few of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nanopause import tasks
from nanopause.config import Config
from nanopause.data import Batch, Shuffled, evenly
from nanopause.errors import UserError
from nanopause.pauses import IGNORE, append, insert_before, lowest_likelihood, prepend, targets_of
from nanopause.placement import TASK, Row
from nanopause.tasks import Example
from nanopause.tasks.task import Hints
from nanopause.tokenizer import Tokenizer

Position = Literal["append", "prepend"]
PLACES = {"append": append, "prepend": prepend}
LOGIT_ROWS = 256  # logits in memory at once, of as many targets


def with_pauses(
    prefix: list[int],
    tokenizer: Tokenizer,
    room: int,
    pauses: int = 0,
    pause_position: Position = "append",
    cut: Literal["left", "right"] = "left",
) -> tuple[list[int], int]:
    """A prefix and its pauses as at most `room` tokens, and how many tokens of the prefix are cut.

    A prefix that is too long loses its first tokens, or with cut="right" its last; the beginning of text that some
    tokenizers have stays in front, and the pauses stay after the prefix, or before it.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = max(0, room - len(bos) - pauses)
    kept = prefix[max(0, len(prefix) - room) :] if cut == "left" else prefix[:room]
    return bos + PLACES[pause_position](kept, pauses, tokenizer.pause_id), len(prefix) - len(kept)


def continuation(tokenizer: Tokenizer, prefix: str, text: str) -> list[int]:
    """The tokens of a text after a prefix: the tokens of the joined text without those of the prefix, as in
    lm-evaluation-harness, because some tokenizers begin every text with a space. Where a token of the joined text spans
    the end of the prefix, this would lose a part of the text, and the text is encoded alone."""
    before, joined = tokenizer.encode(prefix), tokenizer.encode(prefix + text)
    is_split = tokenizer.decode_bytes(joined[: len(before)]) == tokenizer.decode_bytes(before)
    return joined[len(before) :] if is_split else tokenizer.encode(text)


@dataclass(frozen=True)
class Pair:
    """tokens: prefix with its pauses, target and end of text, int64 [N]. n_prefix: tokens before the target. n_cut:
    tokens of the prefix that are left out. hints: int64 [N], as targets_of takes them, or None."""

    tokens: np.ndarray
    n_prefix: int
    n_cut: int = 0
    hints: np.ndarray | None = None

    @property
    def prompt(self) -> list[int]:
        """The prefix with its pauses, for an engine."""
        return self.tokens[: self.n_prefix].tolist()


def encode(
    example: Example,
    tokenizer: Tokenizer,
    block_size: int,
    pauses: int = 0,
    pause_position: Position = "append",
    cut: Literal["left", "right"] = "left",
    inside: "TargetPauses | None" = None,
    hints: Hints | None = None,
) -> Pair | None:
    """An example as at most block_size tokens, less the pauses that its target is going to get; None where the target
    leaves no room for a token of the prefix. hints: one of Task.hints.

    Raises UserError where hints do not fit the tokens of the prefix."""
    prefix = tokenizer.encode(example.prefix)
    target = [*continuation(tokenizer, example.prefix, example.target), tokenizer.eot_id]
    if inside:
        block_size -= inside.n_added(target)
    before, n_cut = with_pauses(prefix, tokenizer, block_size - len(target), pauses, pause_position, cut)
    if n_cut == len(prefix) or len(before) + len(target) > block_size:
        return None
    tokens = np.array(before + target, dtype=np.int64)
    targets = hint_targets(tokens, len(before), tokenizer, *hints(example.prefix, pauses)) if hints else None
    return Pair(tokens, len(before), n_cut, targets)


def hint_targets(
    tokens: np.ndarray, n_prefix: int, tokenizer: Tokenizer,
    of_prefix: Sequence[str | None], of_pauses: Sequence[str | None],
) -> np.ndarray:  # fmt: skip
    """Hints as targets, int64 [N], of a pair's tokens [N]; IGNORE where there is none."""
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)
    in_prefix, is_pause = np.arange(len(tokens)) < n_prefix, tokens == tokenizer.pause_id
    in_text = in_prefix & ~is_pause & (tokens != tokenizer.bos_id)
    ids = {text: tokenizer.encode(text) for text in {*of_prefix, *of_pauses} - {None}} | {None: [IGNORE]}
    for is_here, texts in ((in_text, of_prefix), (in_prefix & is_pause, of_pauses)):
        n_tokens = np.count_nonzero(is_here)
        if n_tokens != len(texts) or {*map(len, ids.values())} != {1}:
            raise UserError(f"{len(texts)} hints do not fit {n_tokens} tokens: a hint is one token, and so is every "
                            f"character of the prefix; use --tokenizer=bytes, or raise --block_size")  # fmt: skip
        targets[is_here] = [ids[text][0] for text in texts]
    return targets


def load_pairs(
    config: Config, split: str, tokenizer: Tokenizer, inside: "TargetPauses | None" = None
) -> tuple[list[Pair], str]:
    """The pairs of a split of config.task, and a sentence that describes their source and what of them is cut. Only
    training has hints.

    Raises UserError: no such task, hints or data, a bad row, or no pair that fits."""
    task, training = tasks.get_task(config.task), split == "train"
    if config.hints and config.hints not in task.hints:
        choices = f"choose {', '.join(task.hints)}" if task.hints else "leave out --hints"
        raise UserError(f"hints={config.hints} is not a hint of {task.name}: {choices}")
    examples, source = tasks.load(task, split, config.data_dir or None, config.limit if training else None)
    hints = task.hints.get(config.hints) if training else None
    settings = config.block_size, config.prefix_pauses, config.pause_position, config.cut, inside, hints
    pairs = [pair for example in examples if (pair := encode(example, tokenizer, *settings))]
    if hints and all((pair.hints == IGNORE).all() for pair in pairs):
        raise UserError(f"hints={config.hints} gives no target with pauses={config.pauses}: set --pauses to 2 or more, "
                        f"or leave out the hints with --hints=")  # fmt: skip
    if not pairs:
        raise UserError(f"no target of {config.task}'s {split} split, {config.pauses} pauses and a prefix fit into "
                        f"block_size={config.block_size} tokens: raise --block_size or lower --pauses")  # fmt: skip
    if n_cut := sum(pair.n_cut > 0 for pair in pairs):
        source += f"; {n_cut:,} prefixes are cut from the {config.cut} to fit {config.block_size} tokens"
    if n_dropped := len(examples) - len(pairs):
        source += f"; {n_dropped:,} examples are left out, as their target alone is too long"
    return pairs, source


def described(config: Config) -> str:
    """What an example of a run looks like."""
    about = f"prefix, target; {TASK[config.placement].__doc__}"
    if config.placement == "appd":
        about += f": {config.pauses} (pause_position {config.pause_position})"
    elif config.placement != "sft":
        about += f": pauses {config.pauses}, consecutive {config.consecutive}"
    about += f", hints {config.hints}" * bool(config.hints)
    return f"{about}; attention {config.attention}, trainable {config.trainable}"


def pack(pairs: Sequence[Pair], pause_id: int, attention: Literal["causal", "prefix"]) -> Batch:
    """Pairs as one packed batch."""
    lengths = np.array([len(pair.tokens) - 1 for pair in pairs])
    ends = np.cumsum(lengths)
    starts, place = np.repeat(ends - lengths, lengths), np.arange(ends[-1])
    inputs = np.concatenate([pair.tokens[:-1] for pair in pairs])
    targets = [targets_of(pair.tokens, pause_id, pair.n_prefix, pair.hints)[:-1] for pair in pairs]
    targets = np.concatenate(targets)
    n_prefix = np.repeat([pair.n_prefix for pair in pairs], lengths)
    hi = place + 1 if attention == "causal" else np.maximum(place + 1, starts + n_prefix)
    layout = {"positions": place - starts, "lo": starts.astype(np.int32), "hi": hi.astype(np.int32)}
    return Batch(
        torch.from_numpy(inputs)[None],
        torch.from_numpy(targets)[None],
        n_live=int((targets != IGNORE).sum()),
        n_pauses=int((inputs == pause_id).sum()),
        ends=tuple(ends.tolist()),
        lives=tuple(len(pair.tokens) - pair.n_prefix for pair in pairs),
        layout={name: torch.from_numpy(x)[None] for name, x in layout.items()},
    )


class TargetPauses:
    """Pauses inside targets [Kim et al. 2025]: config.placement dit, ran or aaw."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.placement, self.m, self.n = config.placement, config.pauses, config.consecutive
        self.tokenizer = tokenizer
        self.fill = tokenizer.pause_id if config.pause_loss else IGNORE

    def _longer(self, tokens: np.ndarray, n_prefix: int, key: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(key)
        return TASK[self.placement](Row(tokens, self.tokenizer, rng, n_prefix, self.m, consecutive=self.n))

    def n_added(self, target: Sequence[int]) -> int:
        """Pauses that a target with its end of text gets."""
        if self.placement == "dit":
            return self.n * min(self.m, len(target))
        return len(self._longer(np.array(target), 0, (0,))) - len(target)

    def placed(self, pair: Pair, key: tuple[int, ...]) -> Pair:
        """A pair with the pauses of ran or aaw; key: of its random numbers."""
        tokens = self._longer(pair.tokens, pair.n_prefix, key)
        hints = pair.hints
        if self.fill != IGNORE:  # a pause is a target too
            is_before_pause = np.append(tokens[1:] == self.fill, False) & (np.arange(len(tokens)) >= pair.n_prefix - 1)
            hints = np.where(is_before_pause, self.fill, IGNORE)
        return replace(pair, tokens=tokens, hints=hints)

    @torch.no_grad()
    def least_likely(self, model: Callable, batch: Batch, micro_batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihoods of a packed batch's targets under the current model, nats, float [1, T], +inf where there is
        no target; and whether they are among the m lowest of their document, bool [1, T]."""
        losses = [
            model(part.inputs, part.targets, reduction="none", **part.layout)[: part.ends[-1]]
            for part in batch.split(micro_batch_size)
        ]
        log_likelihoods = torch.where(batch.targets == IGNORE, torch.inf, -torch.cat(losses))
        return log_likelihoods, lowest_likelihood(log_likelihoods, self.m, batch.layout["lo"])

    def chosen_by(self, model: Callable, batch: Batch, micro_batch_size: int) -> Batch:
        """A packed batch with dit's pauses, before the least likely targets. Their number depends on lengths alone, so
        there is no host-device synchronisation."""
        _, chosen = self.least_likely(model, batch, micro_batch_size)
        return self.insert(batch, chosen, np.minimum(self.m, batch.lives))

    def insert(self, batch: Batch, chosen: torch.Tensor, counts: Sequence[int]) -> Batch:
        """A packed batch with pauses before the chosen targets, bool [1, T]; counts: chosen targets per document."""
        inputs, targets, place, row = insert_before(
            batch.inputs[0], batch.targets[0], chosen[0], self.n, self.tokenizer.pause_id, int(sum(counts)), self.fill
        )
        here = torch.arange(len(row), device=row.device)
        lo, hi = (batch.layout[name][0, row] for name in ("lo", "hi"))
        # An interval begins and ends with the same tokens as before. A pause attends to what the token before it does,
        # and to the pauses between them and itself.
        lo, hi = place[lo], torch.maximum(here, place[hi - 1]) + 1
        layout = {"positions": here - lo, "lo": lo.int(), "hi": hi.int()}
        n_new = self.n * np.asarray(counts)
        return replace(
            batch, inputs=inputs[None], targets=targets[None], n_pauses=batch.n_pauses + int(n_new.sum()),
            n_live=batch.n_live + int(n_new.sum()) * (self.fill != IGNORE),
            ends=tuple((batch.ends + np.cumsum(n_new)).tolist()), layout={k: x[None] for k, x in layout.items()},
        )  # fmt: skip


class TaskBatches:
    """`batches[step]` is this rank's share of a step's batch of batch_size pairs, selected by Shuffled and packed, with
    the pauses of ran and aaw in their targets."""

    def __init__(
        self, pairs: Sequence[Pair], batch_size: int, pause_id: int, attention: str, seed: int, rank: int, n_ranks: int,
        inside: TargetPauses | None = None,
    ):  # fmt: skip
        self.pairs, self.pause_id, self.attention, self.inside = pairs, pause_id, attention, inside
        self.seed, self.chosen = seed, Shuffled(len(pairs), batch_size, seed, rank, n_ranks)

    def __getitem__(self, step: int) -> Batch:
        pairs = [self.pairs[i] for i in self.chosen[step]]
        if self.inside and self.inside.placement != "dit":
            keys = [(self.seed, 1, step, row) for row in self.chosen.rows]
            pairs = [self.inside.placed(pair, key) for pair, key in zip(pairs, keys)]
        return pack(pairs, self.pause_id, self.attention)


def task_validation_batches(
    pairs: Sequence[Pair], n: int, batch_size: int, pause_id: int, attention: str, rank: int, n_ranks: int
) -> Iterator[Batch]:
    """This rank's share of n pairs spread evenly over a split, always the same."""
    chosen = evenly(n, len(pairs))[rank::n_ranks]
    for i in range(0, len(chosen), batch_size):
        yield pack([pairs[j] for j in chosen[i : i + batch_size]], pause_id, attention)


def n_generated(head: nn.Module, x: Tensor, targets: Tensor, ends: Sequence[int]) -> int:
    """Examples of a packed batch whose target greedy decoding generates: each of its tokens is the most likely one.

    head: hidden states to logits. x: float [T, C]; targets: int64 [T], IGNORE outside of the target; ends: where each
    example ends."""
    places = (targets != IGNORE).nonzero()[:, 0]
    is_wrong = torch.cat([head(x[some]).argmax(1) != targets[some] for some in places.split(LOGIT_ROWS)])
    wrong = torch.searchsorted(torch.tensor(ends, device=x.device), places[is_wrong], right=True)
    return len(ends) - len(wrong.unique())
