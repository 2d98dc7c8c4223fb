"""Packed layers: the same products, and the parameters of the model they were made from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanopause.model import GPT, GPTConfig
from nanopause.packed import PackedLinear, by_columns, by_rows, in_blocks, packed

LAYOUTS = pytest.mark.parametrize("layout", [by_rows, by_columns, in_blocks], ids=lambda layout: layout.__name__)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr("nanopause.packed.FASTEST", {})


def always(layout, monkeypatch):
    monkeypatch.setattr(PackedLinear, "_layout", lambda self, rows: layout)


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (2, 4), (1, 7, 3), (64,), (257,)])
@pytest.mark.parametrize("gelu", [True, False])
def test_products_are_the_linear_layers(layout, rows, bias, gelu, monkeypatch):
    torch.manual_seed(0)
    always(layout, monkeypatch)
    linear, x = nn.Linear(40, 72, bias=bias), torch.randn(*rows, 40)
    layer = PackedLinear(linear, gelu)
    with torch.inference_mode():
        got, expected = layer(x), linear.double()(x.double())
        expected = F.gelu(expected, approximate="tanh") if gelu else expected
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a product takes, by layout and number of rows."""
    seconds, now, product = {}, [0.0], PackedLinear._product

    def timed(self, x, layout, weight):
        now[0] += seconds[layout, len(x)]
        return product(self, x, layout, weight)

    monkeypatch.setattr(PackedLinear, "_product", timed)
    monkeypatch.setattr("nanopause.packed.perf_counter", lambda: now[0])
    return seconds


@torch.no_grad()
def test_the_faster_layout_is_taken_for_few_rows_of_a_large_matrix(clock, monkeypatch):
    """Which is measured once for a kind of matrix and a number of rows."""
    monkeypatch.setattr("nanopause.packed.SMALL", 40 * 72)
    one, other = (PackedLinear(nn.Linear(40, 72)) for _ in "ab")
    clock |= {(by_rows, 1): 1e-3, (in_blocks, 1): 2e-3, (by_rows, 3): 2e-3, (in_blocks, 3): 1e-3}
    one(torch.randn(1, 40)), one(torch.randn(3, 40))
    clock.clear()
    clock[by_rows, 1] = clock[in_blocks, 3] = 0
    other(torch.randn(1, 40)), other(torch.randn(3, 40))  # nothing else is tried
    assert list(other.made) == [in_blocks]
    with pytest.raises(KeyError):
        PackedLinear(nn.Linear(40, 72), gelu=True)(torch.randn(3, 40))  # of another kind
    with pytest.raises(KeyError):
        other(torch.randn(2, 40))


@torch.no_grad()
def test_no_other_layout_depends_on_the_clock(clock, monkeypatch):
    large, small, with_gelu = (PackedLinear(nn.Linear(*size)) for size in ((40, 72), (40, 71), (40, 71)))
    with_gelu.gelu = True
    monkeypatch.setattr("nanopause.packed.SMALL", 40 * 72)
    monkeypatch.setattr("nanopause.packed.LITTLE", 64 * 40 * 71)
    clock |= {(in_blocks, 4): 0, (in_blocks, 64): 0, (by_columns, 1): 0, (by_columns, 31): 0}
    large(torch.randn(4, 40)), large(torch.randn(64, 40))
    for layer in (small, with_gelu):
        layer(torch.randn(1, 40)), layer(torch.randn(31, 40)), layer(torch.randn(64, 40))
    clock |= {(in_blocks, 32): 0, (by_columns, 63): 0}
    with_gelu(torch.randn(32, 40)), small(torch.randn(63, 40))
    assert [set(layer.made) for layer in (large, small, with_gelu)] == [{in_blocks}, *2 * [{by_columns, in_blocks}]]


@torch.no_grad()
def test_layouts_are_timed_for_a_number_of_threads(monkeypatch):
    calls = []
    monkeypatch.setattr("nanopause.packed.SMALL", 40 * 72)
    monkeypatch.setattr(PackedLinear, "_fastest", lambda self, rows: calls.append(rows) or by_rows)
    layer, x, n = PackedLinear(nn.Linear(40, 72)), torch.randn(3, 40), torch.get_num_threads()
    try:
        for threads in (n, n, n + 1):
            torch.set_num_threads(threads)
            layer(x)
    finally:
        torch.set_num_threads(n)
    assert calls == [3, 3]


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_nothing_is_packed_where_algorithms_are_deterministic():
    """The clock chooses a layout for a few rows."""
    model = GPT(GPTConfig())
    assert packed(model) is model


@torch.inference_mode()
def test_parameters_of_inference_mode_are_not_packed():
    """They tell no version: a copy of them would be stale when they were written to."""
    model = GPT(GPTConfig())
    assert packed(model) is model


@LAYOUTS
@torch.no_grad()
def test_a_parameter_in_another_place_is_packed_again(layout, monkeypatch):
    always(layout, monkeypatch)
    linear, x = nn.Linear(40, 72), torch.randn(8, 40)
    layer = PackedLinear(linear)
    torch.testing.assert_close(layer(x), linear(x))
    linear.weight.data = torch.randn(72, 40)
    torch.testing.assert_close(layer(x), linear(x))


@LAYOUTS
@torch.no_grad()
@pytest.mark.parametrize("tied, mlp", [(True, "gelu"), (False, "gelu"), (True, "swiglu"), (True, "relu2")])
def test_a_packed_model_follows_the_parameters_it_shares(layout, tied, mlp, monkeypatch):
    torch.manual_seed(0)
    always(layout, monkeypatch)
    config = GPTConfig(vocab_size=70, n_embd=32, n_head=2, n_layer=2, tied=tied, mlp=mlp, zero_init=False)
    model = GPT(config).eval()
    copy, tokens = packed(model), torch.randint(70, (2, 5))
    assert [id(p) for p in copy.parameters()] == [id(p) for p in model.parameters()]
    assert sum(isinstance(module, PackedLinear) for module in copy.modules()) == 4 * 2 + 1
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    before = copy(tokens)
    torch.testing.assert_close(before, model(tokens), rtol=1e-5, atol=1e-5)
    model.load_state_dict({name: 2 * weight for name, weight in model.state_dict().items()})
    assert not torch.allclose(copy(tokens), before, atol=1e-2)
    torch.testing.assert_close(copy(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_other_precisions_are_not_packed():
    model = GPT(GPTConfig()).bfloat16()
    assert packed(model) is model
