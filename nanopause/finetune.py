"""Pause finetuning's batches [Goyal et al. 2023, Algorithm 2]: a prefix, its pauses, a target that alone has a loss.

    tokens     p1  p2  <pause>  <pause>  t1  t2         with M = 2 pauses appended
    target     –   –   –        t1       t2  <eot>

With attention="prefix", the prefix and its pauses attend to each other in both directions; the target is causal.

The examples of a forward pass are concatenated to one sequence, and none attends to another. There is no padding (but
to a multiple of data.ROW_MULTIPLE on a GPU), so the cost of attention is the sum over the examples.
"""

import hashlib
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
LOGIT_ROWS = 256  # targets whose logits are in memory at once
MIN_WHOLE = 0.9  # fraction of the examples; if fewer are neither cut nor dropped, there is a warning


def with_pauses(
    prefix: list[int],
    tokenizer: Tokenizer,
    room: int,
    pauses: int = 0,
    pause_position: Position = "append",
    cut: Literal["left", "right"] = "left",
) -> tuple[list[int], int]:
    """A prefix and its pauses as at most `room` tokens, and the number of tokens cut from the prefix.

    A prefix that is too long loses its first tokens, or with cut="right" its last ones; the tokenizer's bos_id, if it
    has one, and the pauses are kept.
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
    """A tokenized example. tokens: prefix with its pauses, target, end of text, int64 [N]. n_prefix: number of tokens
    before the target. n_cut: number of tokens cut from the prefix. hints: targets of the prefix, int64 [N], as in
    targets_of, or None."""

    tokens: np.ndarray
    n_prefix: int
    n_cut: int = 0
    hints: np.ndarray | None = None

    @property
    def prompt(self) -> list[int]:
        """The prefix with its pauses, for an engine."""
        return self.tokens[: self.n_prefix].tolist()


def sha256_of(pairs: Sequence[Pair]) -> str:
    """The hex digest of all that training uses of the pairs."""
    digest = hashlib.sha256()
    for pair in pairs:
        for values in (pair.n_prefix, pair.tokens, () if pair.hints is None else pair.hints):
            digest.update(np.asarray(values, np.int64).tobytes())
    return digest.hexdigest()


def encode(
    example: Example,
    tokenizer: Tokenizer,
    block_size: int,
    pauses: int = 0,
    pause_position: Position = "append",
    cut: Literal["left", "right"] = "left",
    target_pauses: "TargetPauses | None" = None,
    hints: Hints | None = None,
) -> Pair | None:
    """An example as at most block_size tokens, including the pauses that target_pauses adds later; None if the target
    leaves no room for a token of the prefix. hints: one of Task.hints.

    Raises UserError if the hints do not fit the tokens of the prefix."""
    prefix = tokenizer.encode(example.prefix)
    target = [*continuation(tokenizer, example.prefix, example.target), tokenizer.eot_id]
    if target_pauses:
        block_size -= target_pauses.n_added(target)
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
    """Hints as targets, int64 [N], of a pair's tokens [N]; IGNORE at positions without a hint."""
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)
    in_prefix, is_pause = np.arange(len(tokens)) < n_prefix, tokens == tokenizer.pause_id
    in_text = in_prefix & ~is_pause & (tokens != tokenizer.bos_id)
    ids = {text: tokenizer.encode(text) for text in {*of_prefix, *of_pauses} - {None}} | {None: [IGNORE]}
    for selected, texts in ((in_text, of_prefix), (in_prefix & is_pause, of_pauses)):
        n_tokens = np.count_nonzero(selected)
        if n_tokens != len(texts) or {*map(len, ids.values())} != {1}:
            raise UserError(f"{len(texts)} hints do not fit {n_tokens} tokens: each hint and each character of the "
                            f"prefix must be one token; use --tokenizer=bytes, or raise --block_size")  # fmt: skip
        targets[selected] = [ids[text][0] for text in texts]
    return targets


def load_pairs(
    config: Config, split: str, tokenizer: Tokenizer, target_pauses: "TargetPauses | None" = None
) -> tuple[list[Pair], str]:
    """The pairs of a split of config.task, and a description of their source and of how many are cut or left out. Only
    the training split has hints.

    Raises UserError for an unknown task or hint, missing data, an invalid row, or if no pair fits into block_size."""
    task, is_training = tasks.get_task(config.task), split == "train"
    if config.hints and config.hints not in task.hints:
        choices = f"choose {', '.join(task.hints)}" if task.hints else "leave out --hints"
        raise UserError(f"hints={config.hints} is not a hint of {task.name}: {choices}")
    examples, source = tasks.load(task, split, config.data_dir or None, config.limit if is_training else None)
    hints = task.hints.get(config.hints) if is_training else None
    settings = config.block_size, config.prefix_pauses, config.pause_position, config.cut, target_pauses, hints
    pairs = [pair for example in examples if (pair := encode(example, tokenizer, *settings))]
    if not pairs:
        raise UserError(f"no target of {config.task}'s {split} split, {config.pauses} pauses and a prefix fit into "
                        f"block_size={config.block_size} tokens: raise --block_size or lower --pauses")  # fmt: skip
    if hints and all((pair.hints == IGNORE).all() for pair in pairs):
        raise UserError(f"hints={config.hints} gives no target with pauses={config.pauses}: set --pauses to 2 or more, "
                        f"or leave out the hints with --hints=")  # fmt: skip
    n_cut, n_dropped = sum(pair.n_cut > 0 for pair in pairs), len(examples) - len(pairs)
    if n_cut:
        source += f"; {n_cut:,} prefixes are cut from the {config.cut} to fit into {config.block_size} tokens"
    if n_dropped:
        source += f"; {n_dropped:,} examples are left out because the target alone is too long"
    if len(pairs) - n_cut < MIN_WHOLE * len(examples):
        source += (f"\nWARNING: only {len(pairs) - n_cut:,} of {len(examples):,} examples are whole: raise "
                   f"--block_size to use all of their text")  # fmt: skip
    return pairs, source


def described(config: Config) -> str:
    """The form of a run's examples, for logs and model cards."""
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
    """Pauses between the tokens of targets [Kim et al. 2025]: config.placement dit, ran or aaw."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.placement, self.m, self.n = config.placement, config.pauses, config.consecutive
        self.tokenizer = tokenizer
        self.pause_target = tokenizer.pause_id if config.pause_loss else IGNORE

    def _place(self, tokens: np.ndarray, n_prefix: int, key: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(key)
        return TASK[self.placement](Row(tokens, self.tokenizer, rng, n_prefix, self.m, consecutive=self.n))

    def n_added(self, target: Sequence[int]) -> int:
        """Number of pauses added to a target with its end of text."""
        if self.placement == "dit":
            return self.n * min(self.m, len(target))
        return len(self._place(np.array(target), 0, (0,))) - len(target)

    def placed(self, pair: Pair, key: tuple[int, ...]) -> Pair:
        """A pair with the pauses of ran or aaw. key: seed of its random numbers."""
        tokens = self._place(pair.tokens, pair.n_prefix, key)
        hints = pair.hints
        if self.pause_target != IGNORE:  # --pause_loss: pauses are targets too
            is_before_pause = np.append(tokens[1:] == self.pause_target, False) & (
                np.arange(len(tokens)) >= pair.n_prefix - 1
            )
            hints = np.where(is_before_pause, self.pause_target, IGNORE)
        return replace(pair, tokens=tokens, hints=hints)

    @torch.no_grad()
    def least_likely(self, model: Callable, batch: Batch, micro_batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihoods of a packed batch's targets in nats, float [1, T], +inf at positions without a target; and
        whether each is among the m lowest of its document, bool [1, T]."""
        losses = [
            model(part.inputs, part.targets, reduction="none", **part.layout)[: part.ends[-1]]
            for part in batch.split(micro_batch_size)
        ]
        log_likelihoods = torch.where(batch.targets == IGNORE, torch.inf, -torch.cat(losses))
        return log_likelihoods, lowest_likelihood(log_likelihoods, self.m, batch.layout["lo"])

    def chosen_by(self, model: Callable, batch: Batch, micro_batch_size: int) -> Batch:
        """A packed batch with dit's pauses, before the least likely targets. Their number depends on the lengths only,
        so there is no host-device synchronisation."""
        _, chosen = self.least_likely(model, batch, micro_batch_size)
        return self.insert(batch, chosen, np.minimum(self.m, batch.lives))

    def insert(self, batch: Batch, chosen: torch.Tensor, counts: Sequence[int]) -> Batch:
        """A packed batch with pauses before the chosen targets. chosen: bool [1, T]; counts: number of them per
        document."""
        inputs, targets, place, row = insert_before(
            batch.inputs[0],
            batch.targets[0],
            chosen[0],
            self.n,
            self.tokenizer.pause_id,
            int(sum(counts)),
            self.pause_target,
        )
        index = torch.arange(len(row), device=row.device)
        lo, hi = (batch.layout[name][0, row] for name in ("lo", "hi"))
        # An interval begins and ends at the same tokens as before. A pause attends to the interval of the token before
        # it, to the pauses in between and to itself.
        lo, hi = place[lo], torch.maximum(index, place[hi - 1]) + 1
        layout = {"positions": index - lo, "lo": lo.int(), "hi": hi.int()}
        n_new = self.n * np.asarray(counts)
        return replace(
            batch, inputs=inputs[None], targets=targets[None], n_pauses=batch.n_pauses + int(n_new.sum()),
            n_live=batch.n_live + int(n_new.sum()) * (self.pause_target != IGNORE),
            ends=tuple((batch.ends + np.cumsum(n_new)).tolist()), layout={k: x[None] for k, x in layout.items()},
        )  # fmt: skip


class TaskBatches:
    """`batches[step]` is this rank's share of a step's batch of batch_size pairs, selected by Shuffled and packed, with
    the pauses of ran and aaw in their targets."""

    def __init__(
        self, pairs: Sequence[Pair], batch_size: int, pause_id: int, attention: str, seed: int, rank: int, n_ranks: int,
        target_pauses: TargetPauses | None = None,
    ):  # fmt: skip
        self.pairs, self.pause_id, self.attention, self.target_pauses = pairs, pause_id, attention, target_pauses
        self.seed, self.chosen = seed, Shuffled(len(pairs), batch_size, seed, rank, n_ranks)

    def __getitem__(self, step: int) -> Batch:
        pairs = [self.pairs[i] for i in self.chosen[step]]
        if self.target_pauses and self.target_pauses.placement != "dit":
            keys = [(self.seed, 1, step, row) for row in self.chosen.rows]
            pairs = [self.target_pauses.placed(pair, key) for pair, key in zip(pairs, keys)]
        return pack(pairs, self.pause_id, self.attention)


def task_validation_batches(
    pairs: Sequence[Pair], n: int, batch_size: int, pause_id: int, attention: str, rank: int, n_ranks: int
) -> Iterator[Batch]:
    """This rank's share of n pairs, evenly spaced over a split; always the same pairs."""
    chosen = evenly(n, len(pairs))[rank::n_ranks]
    for i in range(0, len(chosen), batch_size):
        yield pack([pairs[j] for j in chosen[i : i + batch_size]], pause_id, attention)


def n_generated(head: nn.Module, x: Tensor, targets: Tensor, ends: Sequence[int]) -> int:
    """Number of examples of a packed batch whose target greedy decoding generates: each token is the most likely one.

    head: maps hidden states to logits. x: hidden states, float [T, C]. targets: int64 [T], IGNORE at positions without
    a target. ends: end position of each example."""
    places = (targets != IGNORE).nonzero()[:, 0]
    is_wrong = torch.cat([head(x[part]).argmax(1) != targets[part] for part in places.split(LOGIT_ROWS)])
    wrong = torch.searchsorted(torch.tensor(ends, device=x.device), places[is_wrong], right=True)
    return len(ends) - len(wrong.unique())
