"""torch's optimizers on the right parameters, and the learning rate of a step."""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from nanopause.config import Config


def make_optimizers(model: nn.Module, config: Config) -> list[Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for embeddings, head, norms and biases."""
    parameters = dict(model.named_parameters())
    matrices = [
        name for name, p in parameters.items() if config.optimizer == "muon" and "blocks." in name and p.ndim == 2
    ]
    rest = [p for name, p in parameters.items() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                [parameters[name] for name in matrices],
                lr=config.matrix_learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
        )
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[Optimizer], step: int, config: Config) -> float:
    """Sets every group's rate for a step and returns its share of the peak: linear warmup, then config.decay."""
    share = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    start = config.max_steps * (1 - config.wsd_share) if config.decay == "wsd" else config.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, config.max_steps - start)))
    curve = (1 + math.cos(math.pi * progress)) / 2 if config.decay == "cosine" else 1 - progress
    share *= config.min_lr_ratio + (1 - config.min_lr_ratio) * curve
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * share
    return share
