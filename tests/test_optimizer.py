"""Muon against torch's own, and the learning rates of a run."""

import pytest
import torch

from nanopause.config import Config
from nanopause.model import GPT
from nanopause.optimizer import Muon, make_optimizers, orthogonalise, set_learning_rates


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (16, 16)])
def test_in_bfloat16_it_is_torchs_muon(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    pair = [Muon([ours], **settings, dtype=torch.bfloat16), torch.optim.Muon([theirs], **settings)]
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # updates are about 0.02 / √16


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_orthogonalise_keeps_the_singular_vectors(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    rotated = u.T @ orthogonalise(x) @ v.T
    values = rotated.diagonal()
    assert 0.5 < values.min() and values.max() < 1.5
    torch.testing.assert_close(rotated, values.diag(), rtol=0, atol=1e-9)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    config = Config(tied=False)
    model = GPT(config.gpt(258))
    adamw, muon = make_optimizers(model, config)
    of = lambda optimizer: {id(p) for group in optimizer.param_groups for p in group["params"]}  # noqa: E731
    matrices = {id(p) for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2}
    assert of(muon) == matrices and of(adamw) == {id(p) for p in model.parameters()} - matrices
    (alone,) = make_optimizers(model, Config(optimizer="adamw"))
    assert of(alone) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "decay, shares",
    [
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("cosine", {4: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {9: 1.0, 79: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_warmup_and_decay(decay, shares):
    config = Config(decay=decay, warmup_steps=10, max_steps=100, min_lr_ratio=0.1, wsd_share=0.2)
    optimizers = make_optimizers(GPT(config.gpt(258)), config)
    for step, share in shares.items():
        assert set_learning_rates(optimizers, step, config) == pytest.approx(share)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == pytest.approx([share * 0.03] * 3)
