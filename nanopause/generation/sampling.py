"""From logits to tokens: pure functions of tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """temperature 0 takes the likeliest token. top_k > 0 keeps the k likeliest tokens, top_p < 1 the fewest whose
    probabilities reach top_p; both keep tokens as likely as the last one kept."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0


def logprobs_among(n_ids: int, logits: Tensor) -> Tensor:
    """Log-probabilities among the first n_ids of V ids, float32 [B, n_ids], of logits [B, V]."""
    return logits[:, :n_ids].float().log_softmax(-1)


def gumbel(seed: Tensor, place: Tensor, n: int) -> Tensor:
    """Gumbel noise, float32 [B, n]. It depends only on seed and place (tokens generated before), int64 [B], and on the
    column: a sequence gets the same noise in any batch. The bits are mixed as in SplitMix64 [Steele et al. 2014]."""

    def mix(x: Tensor) -> Tensor:
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # int64: >> copies the sign, & drops it
        return x

    golden = -7046029254386353131
    row = mix(mix(seed * golden) + place * golden)
    column = torch.arange(1, n + 1, device=seed.device)
    # 23 bits and a half: exact in float32's 24, and never 0 or 1, where the noise would be infinite.
    bits = mix(row[:, None] + column * golden) & (1 << 23) - 1
    return -(-((bits.float() + 0.5) * 2**-23).log()).log()


def sample(logprobs: Tensor, sampling: Sampling, seed: Tensor, place: Tensor) -> Tensor:
    """Token ids, int64 [B], drawn from logprobs, float32 [B, V], with the noise of seed and place, int64 [B]."""
    if sampling.temperature == 0:
        return logprobs.argmax(-1)
    x = (logprobs - logprobs.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered = x.sort(descending=True).values
        probability = ordered.softmax(-1)
        is_kept = probability.cumsum(-1) - probability < sampling.top_p
        is_kept[:, 0] = True
        x = x.masked_fill(x < torch.where(is_kept, ordered, torch.inf).amin(-1, keepdim=True), -torch.inf)
    return (x + gumbel(seed, place, x.shape[-1])).argmax(-1)  # the Gumbel-max trick: a draw from softmax(x)
