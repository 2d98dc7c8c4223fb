"""A CPU's matrices, laid out for products with few rows."""

import copy
from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopause.model import MLP


def by_rows(weight: Tensor) -> Tensor:
    return weight


def by_columns(weight: Tensor) -> Tensor:
    return weight.T.contiguous().T


def in_blocks(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8)


Layout = Callable[[Tensor], Tensor]
# Elements of a matrix, and multiply-adds with it (half as many before GELU), below which a call of oneDNN costs more
# than its blocks save.
SMALL, LITTLE = 1 << 18, 1 << 23
FEW = 3  # rows up to which some CPUs' BLAS reads a matrix by rows as fast as memory gives it
FASTEST: dict[tuple, Layout] = {}  # for few rows of x: by a layer's kind, threads, and the number of rows


class PackedLinear(nn.Module):
    """A linear layer that shares its parameters with `linear`, and has its matrix in other layouts too. gelu: what it
    returns goes through GELU (tanh), which oneDNN has for free and PyTorch takes long for.

    BLAS copies a matrix that lies by rows into blocks for products of a few rows, which takes as long as reading it. In
    oneDNN's blocks a large one is as fast or faster for any number of rows, but for the fewest on some CPUs: there both
    are timed, once a process for a kind of matrix. A small one lies by columns, and in blocks for many rows. Layouts
    are made when they are first used, and again after the parameter was written to (which shows, unless it was through
    `.data`)."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        self.kind = (*linear.weight.shape, gelu)
        self.made, self.version = {}, None

    def _laid(self, layout: Layout) -> Tensor:
        weight = self.weight
        if layout is by_rows:
            return weight
        version = weight._version, weight.data_ptr()
        if version != self.version:
            self.made, self.version = {}, version
        if layout not in self.made:
            self.made[layout] = layout(weight.detach())
        return self.made[layout]

    def _product(self, x: Tensor, layout: Layout, weight: Tensor) -> Tensor:
        if layout is in_blocks:
            after = ("gelu", [], "tanh") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, *after)
        x = F.linear(x, weight, self.bias)
        return F.gelu(x, approximate="tanh") if self.gelu else x

    def _fastest(self, rows: int) -> Layout:
        x, times, start = self.weight.new_ones(rows, self.weight.shape[1]), {by_rows: [], in_blocks: []}, perf_counter()
        while len(times[by_rows]) < 3 or perf_counter() - start < 0.02:
            for layout, seconds in times.items():
                laid, began = self._laid(layout), perf_counter()
                self._product(x, layout, laid)
                seconds.append(perf_counter() - began)
        return min(times, key=lambda layout: min(times[layout]))

    def _layout(self, rows: int) -> Layout:
        size = self.weight.numel()
        if size < SMALL and rows * size < LITTLE >> self.gelu:
            return by_columns
        if rows > FEW:
            return in_blocks
        case = *self.kind, torch.get_num_threads(), rows
        if case not in FASTEST:
            FASTEST[case] = self._fastest(rows)
        return FASTEST[case]

    def forward(self, x):
        layout = self._layout(x.numel() // x.shape[-1])
        return self._product(x, layout, self._laid(layout))


def packed(model: nn.Module) -> nn.Module:
    """What to generate with: the model itself, or on a CPU in float32 a copy that shares its parameters and has its
    linear layers packed, whose matrices take as much memory again, small ones up to twice. Two processes may find
    different layouts fastest for a few rows, and then round in different ways: nothing is packed where PyTorch shall
    use deterministic algorithms. Parameters made in inference mode do not tell that they were written to, and are not
    packed either. The copy is not to be moved or rewired: its modules have their parts as plain attributes too."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    if torch.are_deterministic_algorithms_enabled() or any(x.is_inference() for x in model.parameters()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    before_gelu = {id(mlp.up) for mlp in model.modules() if isinstance(mlp, MLP) and mlp.activation == "gelu"}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    copied = copy.deepcopy(model, shared | {id(x): PackedLinear(x, id(x) in before_gelu) for x in linears})
    for mlp in copied.modules():
        if isinstance(mlp, MLP) and mlp.activation == "gelu" and isinstance(mlp.up, PackedLinear):
            mlp.activation = None
    # As plain attributes: what nn.Module looks for takes up to 5 μs each, seventy times a step of three layers.
    for module in copied.modules():
        module.__dict__.update(module._parameters | module._buffers | module._modules)
    return copied
