"""A CPU's matrices, laid out for products with few rows."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopause.model import MLP

SMALL = 1 << 19  # elements below which a matrix stays in the cache
# Rows of x for which another layout is faster than the usual one:
FOR_COLUMNS = range(2, 65)  # a small matrix by columns,
FOR_BLOCKS = range(4, 1025)  # a large one in oneDNN's blocks,
FOR_BLOCKS_BEFORE_GELU = range(65, 1025)  # and a small one too, as a product in blocks has GELU for free.


def by_columns(weight: Tensor) -> Tensor:
    return weight.T.contiguous().T


def in_blocks(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8)


class PackedLinear(nn.Module):
    """A linear layer that shares its parameters with `linear`, and has its matrix in other layouts too. gelu: what it
    returns goes through GELU (tanh), which alone is slow.

    BLAS copies a matrix that lies by rows into blocks for every product of 4 rows or more, which takes as long as
    reading it. Other layouts are made when they are first used, and again after the parameter was written to (which
    shows, unless it was through `.data`)."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        small = linear.weight.numel() < SMALL
        self.for_columns = FOR_COLUMNS if small else ()
        self.for_blocks = FOR_BLOCKS if not small else FOR_BLOCKS_BEFORE_GELU if gelu else ()
        self.made, self.version = {}, None

    def _laid(self, out: Callable[[Tensor], Tensor]) -> Tensor:
        weight = self.weight
        version = weight._version, weight.data_ptr()
        if version != self.version:
            self.made, self.version = {}, version
        if out not in self.made:
            self.made[out] = out(weight.detach())
        return self.made[out]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows in self.for_blocks:
            after = ("gelu", [], "tanh") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self._laid(in_blocks), self.bias, *after)
        x = F.linear(x, self._laid(by_columns) if rows in self.for_columns else self.weight, self.bias)
        return F.gelu(x, approximate="tanh") if self.gelu else x


def packed(model: nn.Module) -> nn.Module:
    """What to generate with: the model itself, or on a CPU in float32 a copy that shares its parameters and has its
    linear layers packed, whose matrices take as much memory again. Parameters made in inference mode do not tell that
    they were written to, and are not packed."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    if any(parameter.is_inference() for parameter in model.parameters()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    before_gelu = {id(mlp.up) for mlp in model.modules() if isinstance(mlp, MLP) and mlp.activation == "gelu"}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    copied = copy.deepcopy(model, shared | {id(x): PackedLinear(x, id(x) in before_gelu) for x in linears})
    for mlp in copied.modules():
        if isinstance(mlp, MLP) and mlp.activation == "gelu" and isinstance(mlp.up, PackedLinear):
            mlp.activation = None
    return copied
