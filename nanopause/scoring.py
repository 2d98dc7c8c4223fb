"""Log-probability of a continuation after a prefix and its pauses, for scoring choices; and the FLOPs of answers."""

import math
from collections.abc import Iterator, Sequence

import torch

from nanopause.flops import forward_flops
from nanopause.model import GPT, GPTConfig

CHUNK_ELEMENTS = 1 << 24  # logits in memory at once, 64 MiB in float32
Scored = tuple[list[int], list[int]]  # tokens of a prefix, pauses included, and of its continuation


@torch.inference_mode()
def score(
    model: GPT, pairs: Sequence[Scored], attention: str = "causal", batch_size: int = 8
) -> Iterator[tuple[int, float, bool]]:
    """Yields (i, log p of the i-th continuation in nats, whether greedy decoding generates it), longest pair first.

    Prefixes must not be empty; with attention="prefix" attention within them is bidirectional. The softmax is over all
    ids of the vocabulary.

    Pairs of similar length form a batch. Padding is on the right, where causal queries do not attend, so no mask is
    needed. Logits are computed at the scored positions only."""
    device = model.head.weight.device

    def on_device(numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(device)

    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start in range(0, len(pairs), batch_size):
        batch = order[start : start + batch_size]
        prefixes, scored = zip(*(pairs[i] for i in batch))
        sequences = [prefix + tokens[:-1] for prefix, tokens in zip(prefixes, scored)]
        T = len(sequences[0])
        inputs = on_device([sequence + [0] * (T - len(sequence)) for sequence in sequences])
        hi = None
        if attention == "prefix":
            ends = on_device([[len(prefix)] for prefix in prefixes])
            hi = torch.arange(1, T + 1, device=device).maximum(ends).int()
        positions = [b * T + len(prefixes[b]) - 1 + j for b in range(len(batch)) for j in range(len(scored[b]))]
        x = model.hidden(inputs, hi=hi).flatten(0, 1)[on_device(positions)]
        targets = on_device([token for tokens in scored for token in tokens])
        logprobs, is_greedy = [], []
        size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
        for x_chunk, target in zip(x.split(size), targets.split(size)):
            logits = model.head(x_chunk)
            is_greedy += (logits.argmax(1) == target).tolist()
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprobs += (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)).tolist()
        first = 0
        for i, tokens in zip(batch, scored):
            last = first + len(tokens)
            yield i, math.fsum(logprobs[first:last]), all(is_greedy[first:last])
            first = last


def generation_flops(config: GPTConfig, n_prompt: int, pauses: Sequence[int]) -> int:
    """FLOPs of prefill of n_prompt tokens, pauses included, and of one decode step per generated token but the last.

    pauses: number that a policy inserted before each generated token, fused with the step of the token before. Pauses
    that were rolled back are not counted."""
    flops, context = 0, 0
    n_new = n_prompt
    for n in pauses:
        flops += forward_flops(config, n_new + n, context=context, n_live=2 if n else 1)
        context += n_new + n
        n_new = 1
    return flops


def choice_flops(config: GPTConfig, n_prompt: int, n_scored: int) -> int:
    """FLOPs of the forward pass over prompt, pauses and choice. The last token of the choice is not an input."""
    return forward_flops(config, n_prompt + n_scored - 1, n_live=n_scored)
