"""Log-probability of what follows a prefix with its pauses, by which choices are scored."""

import math
from collections.abc import Iterator, Sequence

import torch

from nanopause.model import GPT

CHUNK_ELEMENTS = 1 << 24  # logits in memory at once: in float32 64 MiB
Scored = tuple[list[int], list[int]]  # tokens of a context and of what follows it


@torch.inference_mode()
def score(
    model: GPT, pairs: Sequence[Scored], attention: str = "causal", batch_size: int = 8
) -> Iterator[tuple[int, float, bool]]:
    """(i, log p of the i-th pair's second part in nats, whether it is the likeliest token by token), the longest first.

    The first parts, which have their pauses, are not empty; with attention="prefix" they read themselves in both
    directions. The softmax is over all rows of the vocabulary.

    A batch is of like lengths and padded on the right, where causal queries do not look: it needs no mask. Logits are
    computed for the scored tokens alone."""
    device = model.head.weight.device

    def on_device(numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(device)

    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start in range(0, len(pairs), batch_size):
        batch = order[start : start + batch_size]
        prefixes, scored = zip(*(pairs[i] for i in batch))
        rows = [prefix + tokens[:-1] for prefix, tokens in zip(prefixes, scored)]
        T = len(rows[0])
        inputs = on_device([row + [0] * (T - len(row)) for row in rows])
        hi = None
        if attention == "prefix":
            ends = on_device([[len(prefix)] for prefix in prefixes])
            hi = torch.arange(1, T + 1, device=device).maximum(ends).int()
        where = [b * T + len(prefixes[b]) - 1 + j for b in range(len(batch)) for j in range(len(scored[b]))]
        x = model.hidden(inputs, hi=hi).flatten(0, 1)[on_device(where)]
        targets = on_device([token for tokens in scored for token in tokens])
        logprobs, greedy = [], []
        size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
        for x_rows, target in zip(x.split(size), targets.split(size)):
            logits = model.head(x_rows)
            greedy += (logits.argmax(1) == target).tolist()
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprobs += (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)).tolist()
        first = 0
        for i, tokens in zip(batch, scored):
            last = first + len(tokens)
            yield i, math.fsum(logprobs[first:last]), all(greedy[first:last])
            first = last
