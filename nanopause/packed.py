"""A CPU's matrices, laid out for products with few rows."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopause.model import MLP

MIN_ROWS, MAX_ROWS = 4, 1024  # below and above the usual layout is as fast
MIN_ELEMENTS = 1 << 19  # and for smaller matrices, which stay in the cache, it is faster


class PackedLinear(nn.Module):
    """A linear layer that shares its parameters with `linear`, and has its matrix a second time in oneDNN's blocks.
    gelu: what it returns goes through GELU (tanh), which then costs nothing.

    BLAS copies a matrix into blocks for every product of 4 rows or more, which takes as long as reading it. The blocks
    are made again when the parameter was written to."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, False
        self.blocks, self.version = None, -1

    def forward(self, x: Tensor) -> Tensor:
        if not MIN_ROWS <= x.numel() // x.shape[-1] <= MAX_ROWS:
            x = F.linear(x, self.weight, self.bias)
            return F.gelu(x, approximate="tanh") if self.gelu else x
        if self.version != self.weight._version:
            self.version = self.weight._version
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 8)
        after = ("gelu", [], "tanh") if self.gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, *after)


def packed(model: nn.Module) -> nn.Module:
    """What to generate with: the model itself, or on a CPU in float32 a copy that shares its parameters and has its
    large linear layers packed, which take as much memory again."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    large = {id(linear): PackedLinear(linear) for linear in linears if linear.weight.numel() >= MIN_ELEMENTS}
    copied = copy.deepcopy(model, shared | large)
    for mlp in copied.modules():
        if isinstance(mlp, MLP) and mlp.activation == "gelu" and isinstance(mlp.up, PackedLinear):
            mlp.activation, mlp.up.gelu = None, True
    return copied
