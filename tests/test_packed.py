"""Packed layers: the same products, and the parameters of the model they were made from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanopause.model import GPT, GPTConfig
from nanopause.packed import PackedLinear, packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (2, 4), (1, 7, 3), (64,), (65,), (1024,), (1025,)])
@pytest.mark.parametrize("small, gelu", [(True, False), (True, True), (False, False), (False, True)])
def test_products_are_the_linear_layers(rows, bias, small, gelu, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("nanopause.packed.SMALL", 40 * 72 + small)
    linear, x = nn.Linear(40, 72, bias=bias), torch.randn(*rows, 40)
    layer = PackedLinear(linear, gelu)
    with torch.inference_mode():
        got, expected = layer(x), linear.double()(x.double())
        expected = F.gelu(expected, approximate="tanh") if gelu else expected
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_layouts_are_made_where_they_are_faster():
    def made(rows, n, gelu=False):
        layer = PackedLinear(nn.Linear(1 << 10, n), gelu)
        with torch.no_grad():
            layer(torch.randn(rows, 1 << 10))
        return [out.__name__ for out in layer.made]

    small, large = (1 << 9) - 1, 1 << 9
    assert made(8, small) == made(8, small, gelu=True) == ["by_columns"]
    assert made(8, large) == made(65, small, gelu=True) == ["in_blocks"]
    assert made(1, small) == made(1, large) == made(65, small) == made(1025, large) == []


@torch.inference_mode()
def test_parameters_of_inference_mode_are_not_packed():
    """They tell no version: a copy of them would be stale when they were written to."""
    model = GPT(GPTConfig())
    assert packed(model) is model


@torch.no_grad()
def test_a_parameter_in_another_place_is_packed_again():
    linear, x = nn.Linear(40, 72), torch.randn(8, 40)
    layer = PackedLinear(linear)
    torch.testing.assert_close(layer(x), linear(x))
    linear.weight.data = torch.randn(72, 40)
    torch.testing.assert_close(layer(x), linear(x))


@torch.no_grad()
@pytest.mark.parametrize("tied, mlp", [(True, "gelu"), (False, "gelu"), (True, "swiglu"), (True, "relu2")])
def test_a_packed_model_follows_the_parameters_it_shares(tied, mlp, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("nanopause.packed.SMALL", 32 * 64)  # what follows attention
    config = GPTConfig(vocab_size=70, n_embd=32, n_head=2, n_layer=2, tied=tied, mlp=mlp, zero_init=False)
    model = GPT(config).eval()
    copy, tokens = packed(model), torch.randint(70, (2, 5))
    assert [id(p) for p in copy.parameters()] == [id(p) for p in model.parameters()]
    assert sum(isinstance(module, PackedLinear) for module in copy.modules()) == 4 * 2 + 1
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    before = copy(tokens)
    torch.testing.assert_close(before, model(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy(tokens[:1, :2]), before[:1, :2], rtol=1e-5, atol=1e-5)  # 2 rows
    model.load_state_dict({name: 2 * weight for name, weight in model.state_dict().items()})
    assert not torch.allclose(copy(tokens), before, atol=1e-2)
    torch.testing.assert_close(copy(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_other_precisions_are_not_packed():
    model = GPT(GPTConfig()).bfloat16()
    assert packed(model) is model
