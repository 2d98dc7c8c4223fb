"""A CPU's matrices, laid out for products with few rows."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopause.model import MLP

SMALL = 1 << 19  # elements below which a matrix stays in the cache
# Rows of x for which these are faster than the usual layout: a small matrix by columns, a large one in oneDNN's blocks,
# which have GELU for free, and then a small one too.
BY_COLUMNS, IN_BLOCKS, IN_BLOCKS_BEFORE_GELU = range(2, 65), range(4, 1025), range(65, 1025)


class PackedLinear(nn.Module):
    """A linear layer that shares its parameters with `linear`, and has its matrix in other layouts too. gelu: what it
    returns goes through GELU (tanh), which alone is slow.

    BLAS copies a matrix that lies by rows into blocks for every product of 4 rows or more, which takes as long as
    reading it. The other layouts are made again when the parameter was written to."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        small = linear.weight.numel() < SMALL
        self.by_columns = BY_COLUMNS if small else ()
        self.in_blocks = IN_BLOCKS if not small else IN_BLOCKS_BEFORE_GELU if gelu else ()
        self.columns = self.blocks = None
        self.version = -1

    def _layouts(self) -> tuple[Tensor | None, Tensor | None]:
        weight = self.weight.detach()
        if self.version != weight._version:
            self.columns = weight.T.contiguous().T if self.by_columns else None
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight, 8) if self.in_blocks else None
            self.version = weight._version
        return self.columns, self.blocks

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows in self.in_blocks:
            after = ("gelu", [], "tanh") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self._layouts()[1], self.bias, *after)
        x = F.linear(x, self._layouts()[0] if rows in self.by_columns else self.weight, self.bias)
        return F.gelu(x, approximate="tanh") if self.gelu else x


def packed(model: nn.Module) -> nn.Module:
    """What to generate with: the model itself, or on a CPU in float32 a copy that shares its parameters and has its
    linear layers packed, which take as much memory again."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    mlps = [module for module in model.modules() if isinstance(module, MLP) and module.activation == "gelu"]
    before_gelu = {id(mlp.up) for mlp in mlps}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    copied = copy.deepcopy(model, shared | {id(x): PackedLinear(x, id(x) in before_gelu) for x in linears})
    for mlp in copied.modules():
        if isinstance(mlp, MLP) and mlp.activation == "gelu":
            mlp.activation = None
    return copied
