"""Generation: the prompt and its pauses are one parallel pass, every further token one step on the cache."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nanopause.errors import UserError
from nanopause.model import GPT
from nanopause.pauses import append
from nanopause.tokenizer import Tokenizer


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """A token id, int64 [], of logits [V]. temperature 0: the likeliest. top_k 0 and top_p 1 do not restrict; else the
    k likeliest tokens, and the fewest whose probabilities reach top_p, stay."""
    if temperature == 0:
        return logits.argmax()
    logits, ids = ((logits - logits.max()) / temperature).sort(descending=True)
    if top_k:
        logits[top_k:] = -torch.inf
    probability = logits.softmax(0)
    probability[1:][probability.cumsum(0)[:-1] >= top_p] = 0
    return ids[torch.multinomial(probability, 1, generator=generator)[0]]


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    pauses: int = 0,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1337,
) -> Iterator[int]:
    """Token ids that follow a prompt and its pauses [Goyal et al. 2023, Algorithm 3], one at a time, until the end of
    text, max_new_tokens or the model's context. The pause and padded ids are never sampled.

    An empty prompt starts after an end of text. Raises UserError, before the first token, where a number is out of its
    range or prompt and pauses are longer than the context.
    """
    limits = {"pauses": (pauses, 0, 2**31), "max_new_tokens": (max_new_tokens, 0, 2**31), "top_k": (top_k, 0, 2**31),
              "top_p": (top_p, 0, 1), "temperature": (temperature, 0, 1e6), "seed": (seed, 0, 2**62)}  # fmt: skip
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise UserError(f"{name}={value} must be {low} to {high:g}")
    tokens = append(tokenizer.encode(prompt) or [tokenizer.eot_id], pauses, tokenizer.pause_id)
    if len(tokens) > model.config.block_size:
        raise UserError(
            f"prompt and pauses are {len(tokens)} tokens, and the model reads {model.config.block_size} at most: "
            f"shorten the prompt or lower --pauses"
        )
    device = model.head.weight.device
    choose = partial(
        sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=torch.Generator(device).manual_seed(seed)
    )
    return _steps(model, tokenizer, torch.tensor([tokens], device=device), max_new_tokens, choose)


@torch.inference_mode()
def _steps(
    model: GPT, tokenizer: Tokenizer, new: Tensor, max_new_tokens: int, choose: Callable[[Tensor], Tensor]
) -> Iterator[int]:
    """new: the prefix, int64 [1, T]; choose(logits [V]) is the next token."""
    if max_new_tokens == 0:
        return
    length = min(model.config.block_size, new.shape[1] + max_new_tokens - 1)  # the last new token is not read
    cache = model.new_cache(1, length)
    start = 0
    while True:
        positions = torch.arange(start, start + new.shape[1], device=new.device)[None]
        logits = model.head(model.hidden(new, positions=positions, cache=cache)[0, -1]).float()
        logits[tokenizer.pause_id :] = -torch.inf
        start += new.shape[1]
        token = choose(logits)
        if token == tokenizer.eot_id:
            return
        yield token.item()
        if start == length:
            return
        new = token[None, None]
