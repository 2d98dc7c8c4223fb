"""Where pauses go: pure functions on arrays of token ids. A pause is one id outside the text vocabulary."""

import numpy as np

IGNORE = -100  # the target of a position that has no loss


def insert_random(tokens: np.ndarray, rate: float, pause_id: int, rng: np.random.Generator) -> np.ndarray:
    """Pause pretraining's insertion [Goyal et al. 2023, Algorithm 1]: insert at random, trim back to length.

    tokens: integers [..., N]. Mpt = round(rate·N) pauses go into every row, all arrangements equally likely; what the
    longer row has beyond N is cut. So a share of rate/(1+rate) of the positions are pauses on average.
    Returns the same shape and dtype.
    """
    n = tokens.shape[-1]
    m = round(rate * n)
    slots = np.broadcast_to(np.arange(n + m), (*tokens.shape[:-1], n + m))
    is_pause = (rng.permuted(slots, axis=-1) < m)[..., :n]
    # The i-th slot that is no pause takes the i-th token.
    source = np.cumsum(~is_pause, axis=-1) - 1
    shifted = np.take_along_axis(tokens, np.maximum(source, 0), axis=-1)
    return np.where(is_pause, tokens.dtype.type(pause_id), shifted)


def append(tokens: list[int], n: int, pause_id: int) -> list[int]:
    """Pause inference's prefix [Goyal et al. 2023, Algorithm 3]: n pauses after the tokens."""
    return tokens + [pause_id] * n


def prepend(tokens: list[int], n: int, pause_id: int) -> list[int]:
    """n pauses before the tokens, which under causal attention they cannot see [Goyal et al. 2023, an ablation]."""
    return [pause_id] * n + tokens


def targets_of(tokens: np.ndarray, pause_id: int) -> np.ndarray:
    """Next-token targets, int64 [..., N]: position k has token k+1, or IGNORE where that is a pause.

    A pause before a text token keeps its loss, a pause before a pause has none. The last position has none: what
    follows it is not known.
    """
    targets = np.full(tokens.shape, IGNORE, dtype=np.int64)
    targets[..., :-1] = tokens[..., 1:]
    targets[targets == pause_id] = IGNORE
    return targets
