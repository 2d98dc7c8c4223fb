"""AdamW and Muon with their parameter groups, and the learning-rate schedule."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanopause.config import Config

TRAINABLE = {
    "pause": ("token_embedding.weight",),
    "embeddings": ("token_embedding.weight", "position_embedding.weight"),
}


def orthogonalise(x: Tensor) -> Tensor:
    """Approximately the nearest matrix with orthonormal rows or columns: singular values 0.5 to 1.5, by five steps of a
    quintic Newton-Schulz iteration with a steep slope at zero [Jordan et al. 2024, Muon]. x: [M, N], any float."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(Optimizer):
    """torch.optim.Muon with a configurable dtype for the orthogonalisation.

    torch always rounds the gradient to bfloat16: a difference in its last bit becomes 1e-3 of loss within 20 steps, and
    a CPU multiplies bfloat16 at a third of the speed of float32. dtype None: bfloat16 on a GPU, otherwise the
    parameter's dtype.
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype | None = None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                dtype = self.dtype or (torch.bfloat16 if p.is_cuda else p.dtype)
                update = orthogonalise(p.grad.lerp(average, momentum).to(dtype))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def set_trainable(model: nn.Module, trainable: Literal["all", "pause", "embeddings"], pause_id: int) -> None:
    """Freeze all parameters except the token and position embeddings ("embeddings") or the pause's row of the token
    embedding ("pause"; the other rows get zero gradient). A tied head is trained with the token embedding."""
    if trainable == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in TRAINABLE[trainable])
    if trainable == "pause":
        weight = model.token_embedding.weight
        row = torch.zeros(len(weight), 1, device=weight.device, dtype=weight.dtype)
        row[pause_id] = 1
        weight.register_hook(lambda gradient: gradient * row)


def make_optimizers(model: nn.Module, config: Config) -> list[Optimizer]:
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for embeddings, head, norms and biases. With
    trainable="pause" there is no weight decay, which would change the other rows of the embedding too."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weight_decay = 0.0 if config.trainable == "pause" else config.weight_decay
    matrices = [
        name for name, p in parameters.items() if config.optimizer == "muon" and "blocks." in name and p.ndim == 2
    ]
    rest = [p for name, p in parameters.items() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)]
    if matrices:
        optimizers.append(
            Muon(
                [parameters[name] for name in matrices],
                lr=config.matrix_learning_rate,
                momentum=config.momentum,
                weight_decay=weight_decay,
            )
        )
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[Optimizer], step: int, config: Config) -> float:
    """Set the learning rate of every group for a step and return it as a fraction of the peak: linear warmup, then
    config.decay."""
    share = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    start = config.max_steps * (1 - config.wsd_share) if config.decay == "wsd" else config.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, config.max_steps - start)))
    curve = (1 + math.cos(math.pi * progress)) / 2 if config.decay == "cosine" else 1 - progress
    share *= config.min_lr_ratio + (1 - config.min_lr_ratio) * curve
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * share
    return share
