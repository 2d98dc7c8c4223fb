"""Packed layers: the same products, and the parameters of the model they were made from."""

import pytest
import torch
from torch import nn

from nanopause.model import GPT, GPTConfig
from nanopause.packed import MAX_ROWS, PackedLinear, packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 4), (1, 7, 3), (MAX_ROWS,), (MAX_ROWS + 1,), (0,)])
def test_products_are_the_linear_layers(rows, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 72, bias=bias), torch.randn(*rows, 40)
    with torch.inference_mode():
        got, expected = PackedLinear(linear)(x), linear.double()(x.double())
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied, mlp", [(True, "gelu"), (False, "gelu"), (True, "swiglu"), (True, "relu2")])
def test_a_packed_model_follows_the_parameters_it_shares(tied, mlp, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("nanopause.packed.MIN_ELEMENTS", 32 * 64)  # all but what follows attention
    config = GPTConfig(vocab_size=70, n_embd=32, n_head=2, n_layer=2, tied=tied, mlp=mlp, zero_init=False)
    model = GPT(config).eval()
    copy, tokens = packed(model), torch.randint(70, (2, 5))
    assert [id(p) for p in copy.parameters()] == [id(p) for p in model.parameters()]
    assert sum(isinstance(module, PackedLinear) for module in copy.modules()) == 3 * 2 + 1
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    before = copy(tokens)
    torch.testing.assert_close(before, model(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy(tokens[:1, :2]), before[:1, :2], rtol=1e-5, atol=1e-5)  # too few rows for blocks
    model.load_state_dict({name: 2 * weight for name, weight in model.state_dict().items()})
    assert not torch.allclose(copy(tokens), before, atol=1e-2)
    torch.testing.assert_close(copy(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_other_precisions_are_not_packed():
    model = GPT(GPTConfig()).bfloat16()
    assert packed(model) is model
