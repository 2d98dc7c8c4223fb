"""Where pauses go, and which positions have a loss: METHOD's off-by-one cases, and what every insertion keeps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nanopause.kernels import linear_cross_entropy
from nanopause.model import GPT, GPTConfig
from nanopause.pauses import IGNORE, append, insert_between, insert_random, next_tokens, targets_of

P, A, B, C = 99, 1, 2, 3
X = IGNORE
properties = settings(max_examples=100, deadline=None, derandomize=True, database=None)
token_blocks = npst.arrays(
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
    shape=st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 4), st.integers(1, 40))),
    elements=st.integers(0, P - 1),
)


def rng(seed=0):
    return np.random.default_rng(seed)


# Targets


@pytest.mark.parametrize(
    "tokens, targets",
    [
        ([A, P, B], [X, B, X]),
        ([A, P, P, B], [X, X, B, X]),
        ([A, B, P], [B, X, X]),
        ([P, A, B], [A, B, X]),
        ([A, P, B, P, P, C, A], [X, B, X, X, C, A, X]),
        ([P, P, P], [X, X, X]),
        ([A, B, C], [B, C, X]),
        ([A], [X]),
        ([P], [X]),
        ([[A, P, P, B], [A, B, C, P], [P, P, P, P]], [[X, X, B, X], [B, C, X, X], [X, X, X, X]]),
    ],
    ids=str,
)
def test_targets(tokens, targets):
    for dtype in (np.uint16, np.int64):
        got = targets_of(np.array(tokens, dtype=dtype), P)
        assert got.dtype == np.int64 and got.tolist() == targets


H, J = 7, 8  # hints


@pytest.mark.parametrize(
    "tokens, n_prefix, hints, targets",
    [
        ([A, B, P, P, C, A], 4, None, [X, X, X, C, A, X]),
        ([A, B, P, P, C, A], 4, [X, X, H, X, X, X], [X, X, H, C, A, X]),  # a pause with a target of its own
        ([A, B, P, P, C, A], 4, [X, X, H, J, X, X], [X, X, H, J, A, X]),  # it replaces the next token
        ([A, B, C, A], 2, [H, X, X, X], [H, C, A, X]),
        ([A, P, P, B], 0, [H, J, X, X], [H, J, B, X]),
        ([P, P, P], 0, [H, X, J], [H, X, J]),
        ([A, P, B, C], 3, None, [X, X, C, X]),
        ([A, P, B, C], 1, None, [X, B, C, X]),
        ([[A, P, B], [P, A, P]], 2, [[X, H, X], [X, X, J]], [[X, H, X], [X, X, J]]),
    ],
    ids=str,
)
def test_targets_of_a_prefix_with_hints(tokens, n_prefix, hints, targets):
    hints = hints if hints is None else np.array(hints)
    assert targets_of(np.array(tokens), P, n_prefix, hints).tolist() == targets


@pytest.mark.parametrize(
    "tokens, n, longer, following",
    [
        ([A, B, C], 0, [A, B, C], [B, C, X]),
        ([A, B, C], 1, [A, P, B, P, C], [B, B, C, C, X]),
        ([A, B], 3, [A, P, P, P, B], [B, B, B, B, X]),
        ([A], 2, [A], [X]),
        ([[A, B], [C, A]], 1, [[A, P, B], [C, P, A]], [[B, B, X], [A, A, X]]),
    ],
    ids=str,
)
def test_pauses_between_tokens(tokens, n, longer, following):
    got = insert_between(np.array(tokens, dtype=np.uint16), n, P)
    assert got.dtype == np.uint16 and got.tolist() == longer
    assert next_tokens(got, P).tolist() == following


@pytest.mark.parametrize(
    "tokens, following",
    [([A, P, P, B, C, P], [B, B, B, C, X, X]), ([P, P], [X, X]), ([P], [X]), ([P, A], [A, X])],
    ids=str,
)
def test_next_tokens(tokens, following):
    assert next_tokens(np.array(tokens), P).tolist() == following


@properties
@given(tokens=token_blocks, rate=st.floats(0, 1), seed=st.integers(0, 9))
def test_live_targets_are_the_text_after_the_first_token(tokens, rate, seed):
    """Pauses take no loss away and add none: read in order, the live targets are the text tokens."""
    block = insert_random(tokens, rate, P, rng(seed))
    for row, targets in zip(np.atleast_2d(block), np.atleast_2d(targets_of(block, P))):
        text = row[row != P]
        live = targets[targets != IGNORE]
        # The first position is nobody's target.
        assert live.tolist() == text[0 if row[0] == P else 1 :].tolist()
        assert targets[-1] == IGNORE


@pytest.mark.parametrize("block", [[P] * 5, [A] + [P] * 4])
def test_nothing_but_pauses_to_predict_gives_no_loss(block):
    """Loss 0, gradients 0 and no NaN, through the loss alone and through a model."""
    block = np.array([block])
    targets = torch.from_numpy(targets_of(block, P))
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    loss = linear_cross_entropy(x, weight, targets[0])
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))

    model = GPT(GPTConfig(vocab_size=100, n_layer=1, n_head=2, n_embd=16, zero_init=False))
    loss = model(torch.from_numpy(block), targets)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)


def test_the_loss_of_a_batch_is_of_its_live_positions():
    """Rows with different numbers of pauses, one whose last target is masked: the mean is over all live positions."""
    block = np.array([[A, P, B, C], [A, B, P, P], [P, P, P, C]])
    targets = torch.from_numpy(targets_of(block, P)).flatten()
    logits = torch.randn(12, 100, generator=torch.Generator().manual_seed(0))
    live = [(1, B), (2, C), (4, B), (10, C)]
    expected = -sum(logits[k].log_softmax(-1)[target] for k, target in live) / len(live)
    torch.testing.assert_close(linear_cross_entropy(logits, torch.eye(100), targets), expected)


# Insertion


@properties
@given(tokens=token_blocks, rate=st.floats(0, 1), seed=st.integers(0, 9))
def test_insertion_keeps_the_text(tokens, rate, seed):
    block = insert_random(tokens, rate, P, rng(seed))
    assert block.shape == tokens.shape and block.dtype == tokens.dtype
    m = math.ceil(rate * tokens.shape[-1])
    for row, original in zip(np.atleast_2d(block), np.atleast_2d(tokens)):
        text = row[row != P]
        assert text.tolist() == original[: len(text)].tolist()
        assert len(row) - len(text) <= m


@given(tokens=token_blocks)
@properties
def test_rate_0_changes_nothing(tokens):
    block = insert_random(tokens, 0, P, rng())
    assert block.dtype == tokens.dtype and np.array_equal(block, tokens)


def test_the_argument_is_left_alone():
    tokens = np.arange(50)
    insert_random(tokens, 0.5, P, rng())
    assert np.array_equal(tokens, np.arange(50))


@pytest.mark.parametrize("rate, share", [(0.1, 0.1 / 1.1), (1.0, 0.5)])
def test_realised_share(rate, share):
    """rate/(1+rate): pauses beyond the block are cut. The number in the first N of N + M slots, M of them pauses, is
    hypergeometric, and so is known how far the mean of many rows may stray."""
    rows, n = 5000, 200
    block = insert_random(np.zeros((rows, n), dtype=np.uint16), rate, P, rng())
    m = round(rate * n)
    variance = n * share * (1 - share) * m / (n + m - 1)
    assert abs((block == P).sum() - rows * n * share) < 4 * (rows * variance) ** 0.5


@pytest.mark.parametrize("rate, n", [(0.01, 33), (0.1, 257), (0.3, 5), (1e-3, 1)])
def test_the_expected_number_of_pauses_is_the_rate_times_the_length(rate, n):
    """Also where rate · N is not whole, or below one half. Pauses beyond the block are cut: each of the m inserted ones
    is inside with probability N/(N + m)."""
    rows, low = 20_000, math.floor(rate * n)
    share = rate * n - low  # of the rows that get one pause more
    expected = low * n / (n + low) * (1 - share) + (low + 1) * n / (n + low + 1) * share
    counts = (insert_random(np.zeros((rows, n), dtype=np.uint16), rate, P, rng()) == P).sum(axis=1)
    assert abs(counts.mean() - expected) < 4 * (counts.std() + 1e-9) / rows**0.5
    assert counts.any()


def test_a_whole_number_of_pauses_takes_no_random_number():
    """rate · N is 3.0000000000000004 here, and the places are those of a shuffle alone."""
    is_pause = insert_random(np.zeros(30, dtype=np.uint16), 0.1, P, rng()) == P
    assert is_pause.tolist() == (rng().permuted(np.arange(33)) < 3)[:30].tolist()


def test_places_are_uniform():
    """Every slot is a pause equally often, and so is every pair of neighbours, within 4 standard deviations."""
    rows, n, m = 20_000, 100, 10
    is_pause = insert_random(np.zeros((rows, n), dtype=np.uint16), m / n, P, rng()) == P
    share, pair = m / (n + m), m * (m - 1) / ((n + m) * (n + m - 1))
    for frequency, p in ((is_pause.mean(axis=0), share), ((is_pause[:, 1:] & is_pause[:, :-1]).mean(axis=0), pair)):
        assert np.abs(frequency - p).max() < 4 * (p * (1 - p) / rows) ** 0.5


def test_rows_are_independent():
    """Rows of one block differ, and two rows' pauses meet as often as chance has it."""
    rows, n, m = 20_000, 100, 10
    is_pause = insert_random(np.zeros((rows, n), dtype=np.uint16), m / n, P, rng()) == P
    both, p = (is_pause[0::2] & is_pause[1::2]).mean(), (m / (n + m)) ** 2
    assert abs(both - p) < 4 * (p * (1 - p) / (rows / 2 * n)) ** 0.5


def test_the_generator_decides():
    tokens = np.arange(1000, dtype=np.int64).reshape(4, 250)
    first, again, other = (insert_random(tokens, 0.1, 5000, rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_append():
    tokens = [A, B]
    assert append(tokens, 3, P) == [A, B, P, P, P] and append(tokens, 0, P) == [A, B] and tokens == [A, B]
