"""Where pauses go: pure functions on arrays of token ids. A pause is one id outside the text vocabulary."""

import numpy as np
import torch
from torch import Tensor

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


def insert_between(tokens: np.ndarray, n: int, pause_id: int) -> np.ndarray:
    """n pauses between neighbouring tokens: integers [..., N] become [..., N + n·(N − 1)], of the same dtype."""
    longer = np.full((*tokens.shape, 1 + n), pause_id, dtype=tokens.dtype)
    longer[..., 0] = tokens
    return longer.reshape(*tokens.shape[:-1], -1)[..., : tokens.shape[-1] * (1 + n) - n]


def next_tokens(tokens: np.ndarray, pause_id: int) -> np.ndarray:
    """The text token after each position, across pauses, int64 [..., N]; IGNORE where none follows. As hints of
    targets_of they give the same target to a token and to every pause after it."""
    places = np.where(tokens == pause_id, tokens.shape[-1], np.arange(tokens.shape[-1]))
    following = np.minimum.accumulate(places[..., :0:-1], axis=-1)[..., ::-1]  # of positions 0 … N − 2
    padded = np.append(tokens, np.full_like(tokens[..., :1], pause_id), axis=-1)
    text = np.take_along_axis(padded, following, axis=-1)
    found = np.full(tokens.shape, IGNORE, dtype=np.int64)
    found[..., :-1] = np.where(text == pause_id, IGNORE, text)
    return found


def append(tokens: list[int], n: int, pause_id: int) -> list[int]:
    """Pause inference's prefix [Goyal et al. 2023, Algorithm 3]: n pauses after the tokens."""
    return tokens + [pause_id] * n


def prepend(tokens: list[int], n: int, pause_id: int) -> list[int]:
    """n pauses before the tokens, which under causal attention they cannot see [Goyal et al. 2023, an ablation]."""
    return [pause_id] * n + tokens


def targets_of(tokens: np.ndarray, pause_id: int, n_prefix: int = 0, hints: np.ndarray | None = None) -> np.ndarray:
    """Next-token targets, int64 [..., N]: position k has token k+1, or IGNORE where that is a pause.

    A pause before a text token keeps its loss, a pause before a pause has none. The last position has none: the token
    after it is unknown. n_prefix: tokens of a prefix without a loss; its last position predicts the token after the
    prefix and keeps its loss. hints: integers [..., N], a target of its own for each position where it is not IGNORE,
    at a pause too [London & Kanade 2025, section 5]; it replaces the next token.
    """
    targets = np.full(tokens.shape, IGNORE, dtype=np.int64)
    targets[..., :-1] = tokens[..., 1:]
    targets[targets == pause_id] = IGNORE
    targets[..., : max(0, n_prefix - 1)] = IGNORE
    return targets if hints is None else np.where(hints == IGNORE, targets, hints)


# Finetuning's pauses inside of the target. A row of inputs and targets is a token and the one after it.


def lowest_likelihood(log_likelihoods: Tensor, m: int, document: Tensor | None = None) -> Tensor:
    """The m least likely targets of every document, or all where there are fewer [Kim et al. 2025, section 3].

    log_likelihoods: of each row's target, float [B, T], +inf where it is none to choose. document: integers [B, T],
    equal in rows of one document; None: each of the B is one. Of equals the earlier are chosen.
    Returns bool [B, T], on the device and without waiting for it.
    """
    if document is None:
        document = torch.arange(len(log_likelihoods), device=log_likelihoods.device)[:, None]
    values, document = log_likelihoods.flatten(), document.expand_as(log_likelihoods).flatten()
    order = values.argsort(stable=True)
    order = order[document[order].argsort(stable=True)]  # document by document, each from its lowest
    of = document[order]
    rank = torch.arange(len(of), device=of.device) - torch.searchsorted(of, of)
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter(0, order, rank < m)
    return (chosen & (values < torch.inf)).view_as(log_likelihoods)


def after_words(pieces: list[bytes]) -> list[int]:
    """The places before which a word has ended, the end of the text among them [Kim et al. 2025, AAW].

    pieces: the bytes of each token of a text. White space belongs to the word after it.
    """
    begins = [not piece[:1].strip() for piece in pieces[1:]] + [True]
    return [i for i, (piece, begin) in enumerate(zip(pieces, begins), 1) if begin and piece[-1:].strip()]


def insert_before(
    inputs: Tensor, targets: Tensor, chosen: Tensor, n: int, pause_id: int, total: int, fill: int = IGNORE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n pauses before every chosen target, which is then predicted at the last of them.

    inputs, targets: int64 [N]. chosen: bool [N], by row of the target. total: how many are chosen, as the host must
    know the length of what it gets without asking the device. fill: the target where a pause follows.
    Returns inputs and targets, int64 [N + n·total]; the rows' new places, int64 [N]; and of every new place the row
    that it is or, being a pause, follows, int64 [N + n·total].
    """
    before = chosen.cumsum(0) - chosen.long()
    place = torch.arange(len(inputs), device=inputs.device) + n * before
    longer = inputs.new_full((len(inputs) + n * total,), pause_id)
    row = torch.zeros_like(longer).scatter(0, place, torch.ones_like(place)).cumsum(0) - 1
    last = place + n * chosen
    return longer.scatter(0, place, inputs), torch.full_like(longer, fill).scatter(0, last, targets), place, row
