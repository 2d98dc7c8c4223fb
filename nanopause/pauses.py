"""Insertion of pauses: pure functions on arrays of token ids. A pause is one id outside the text vocabulary."""

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a masked position, which has no loss


def insert_random(tokens: np.ndarray, rate: float, pause_id: int, rng: np.random.Generator) -> np.ndarray:
    """Pause pretraining's insertion [Goyal et al. 2023, Algorithm 1]: insert at random, truncate to the same length.

    tokens: integers [..., N]. rate·N pauses (the paper's Mpt) are inserted into every sequence, all arrangements
    equally likely, and the result is truncated to N. On average rate/(1+rate) of the positions are pauses. If rate·N is
    not whole, it is rounded up or down at random, so that its expectation is rate·N.
    Returns the same shape and dtype.
    """
    if tokens.ndim > 1:
        return np.stack([insert_random(row, rate, pause_id, rng) for row in tokens])
    n = len(tokens)
    m, fraction = divmod(round(rate * n, 9), 1)  # rounded: 0.1 · 30 is 3.0000000000000004
    m = int(m) + int(fraction > 0 and rng.random() < fraction)
    is_pause = (rng.permuted(np.arange(n + m)) < m)[:n]
    # The i-th position that is not a pause gets the i-th token.
    source = np.cumsum(~is_pause) - 1
    return np.where(is_pause, tokens.dtype.type(pause_id), tokens[np.maximum(source, 0)])


def insert_between(tokens: np.ndarray, n: int, pause_id: int) -> np.ndarray:
    """Insert n pauses between consecutive tokens: integers [..., N] become [..., N + n·(N − 1)], same dtype."""
    longer = np.full((*tokens.shape, 1 + n), pause_id, dtype=tokens.dtype)
    longer[..., 0] = tokens
    return longer.reshape(*tokens.shape[:-1], -1)[..., : tokens.shape[-1] * (1 + n) - n]


def insert_at(tokens: np.ndarray, places: np.ndarray, n: int, pause_id: int) -> np.ndarray:
    """n pauses before each of these places, int [P] in 0 … N: integers [N] become [N + n·P], of the same dtype."""
    return np.insert(tokens, np.repeat(places, n), pause_id)


def next_tokens(tokens: np.ndarray, pause_id: int) -> np.ndarray:
    """The next text token after each position, skipping pauses, int64 [..., N]; IGNORE if there is none. Used as hints
    of targets_of, they give a token and every pause after it the same target."""
    positions = np.where(tokens == pause_id, tokens.shape[-1], np.arange(tokens.shape[-1]))
    following = np.minimum.accumulate(positions[..., :0:-1], axis=-1)[..., ::-1]  # of positions 0 … N − 2
    padded = np.append(tokens, np.full_like(tokens[..., :1], pause_id), axis=-1)
    text = np.take_along_axis(padded, following, axis=-1)
    found = np.full(tokens.shape, IGNORE, dtype=np.int64)
    found[..., :-1] = np.where(text == pause_id, IGNORE, text)
    return found


def append(tokens: list[int], n: int, pause_id: int) -> list[int]:
    """Append n pauses, as in pause inference [Goyal et al. 2023, Algorithm 3]."""
    return tokens + [pause_id] * n


def prepend(tokens: list[int], n: int, pause_id: int) -> list[int]:
    """Prepend n pauses [Goyal et al. 2023, an ablation]. Under causal attention they do not attend to the tokens."""
    return [pause_id] * n + tokens


def targets_of(tokens: np.ndarray, pause_id: int, n_prefix: int = 0, hints: np.ndarray | None = None) -> np.ndarray:
    """Next-token targets, int64 [..., N]: the target of position k is token k+1, or IGNORE if that is a pause.

    So a pause before a text token has a loss and a pause before a pause has none. The last position has none, as no
    token follows. n_prefix: length of a prefix without loss; its last position predicts the token after the prefix and
    has a loss. hints: integers [..., N]; where not IGNORE, they replace the target, also at pauses [London & Kanade
    2025, section 5].
    """
    targets = np.full(tokens.shape, IGNORE, dtype=np.int64)
    targets[..., :-1] = tokens[..., 1:]
    targets[targets == pause_id] = IGNORE
    targets[..., : max(0, n_prefix - 1)] = IGNORE
    return targets if hints is None else np.where(hints == IGNORE, targets, hints)


# Pauses within the target, for finetuning. Position k of inputs and targets is a token and the token after it.


def lowest_likelihood(log_likelihoods: Tensor, m: int, document: Tensor | None = None) -> Tensor:
    """Mask of the m least likely targets of every document, or of all if there are fewer [Kim et al. 2025, section 3].

    log_likelihoods: of each position's target in nats, float [B, T]; +inf for targets that must not be chosen.
    document: integers [B, T], the document of each position; None: each of the B sequences is one document. Ties are
    broken by position, the earlier first. Returns bool [B, T] on the same device, without host synchronisation.
    """
    if document is None:
        document = torch.arange(len(log_likelihoods), device=log_likelihoods.device)[:, None]
    values, document = log_likelihoods.flatten(), document.expand_as(log_likelihoods).flatten()
    order = values.argsort(stable=True)
    order = order[document[order].argsort(stable=True)]  # by document, then by likelihood
    of = document[order]
    rank = torch.arange(len(of), device=of.device) - torch.searchsorted(of, of)
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter(0, order, rank < m)
    return (chosen & (values < torch.inf)).view_as(log_likelihoods)


def after_words(pieces: list[bytes]) -> list[int]:
    """Positions of the tokens before which a word ends, including len(pieces) [Kim et al. 2025, AAW].

    pieces: bytes of each token of a text. White space belongs to the word after it.
    """
    begins = [not piece[:1].strip() for piece in pieces[1:]] + [True]
    return [i for i, (piece, begin) in enumerate(zip(pieces, begins), 1) if begin and piece[-1:].strip()]


def insert_before(
    inputs: Tensor, targets: Tensor, chosen: Tensor, n: int, pause_id: int, total: int, fill: int = IGNORE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Insert n pauses before every chosen target; the target is then predicted at the last of them.

    inputs, targets: int64 [N]. chosen: bool [N], indexed as targets. total: number of chosen targets, passed by the
    caller so that the output's length needs no host synchronisation. fill: target of the positions before a pause.
    Returns inputs and targets, int64 [N + n·total]; the new position of each old one, int64 [N]; and for each new
    position the old one that it is or, for a pause, that it follows, int64 [N + n·total].
    """
    before = chosen.cumsum(0) - chosen.long()
    place = torch.arange(len(inputs), device=inputs.device) + n * before
    longer = inputs.new_full((len(inputs) + n * total,), pause_id)
    row = torch.zeros_like(longer).scatter(0, place, torch.ones_like(place)).cumsum(0) - 1
    last = place + n * chosen
    return longer.scatter(0, place, inputs), torch.full_like(longer, fill).scatter(0, last, targets), place, row
