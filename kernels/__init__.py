"""The one door to the two operations a transformer spends its time in, and the choice of who computes them.

An implementation is `triton` (attention.py, decode.py, linear_cross_entropy.py), `torch` (plain.py: the fastest plain
PyTorch) or `reference` (dense and obvious, the oracle of all tests). `impl=None` picks by device and says once which.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels import plain, reference

IMPLEMENTATIONS = {"torch": plain, "reference": reference}
if find_spec("triton"):  # there is none for macOS and Windows
    # Before the functions below, which take their modules' names.
    from kernels.attention import attention as _attention
    from kernels.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy

    IMPLEMENTATIONS["triton"] = SimpleNamespace(attention=_attention, linear_cross_entropy=_linear_cross_entropy)
_said = set()


def choose(impl: str | None, device: torch.device) -> str:
    """The name of the implementation that runs; for None the device's, said once on stderr."""
    if impl is None:
        impl, why = "torch", ""
        if device.type == "cuda":
            if "triton" not in IMPLEMENTATIONS:
                why = ": Triton is not installed"
            elif torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
                why = ": the Triton kernels need compute capability 8.0"
            else:
                impl = "triton"
        if device.type not in (*_said, "meta") and not torch.compiler.is_compiling():
            _said.add(device.type)
            print(f"kernels: {impl} on {device.type}{why}", file=sys.stderr)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return impl


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast in its precision, as every matrix product."""
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)
    return tensors


class Attend:
    """Attention for the layers of a pass, whose queries read the same: what an implementation makes of the intervals,
    such as a mask, it makes once. Arguments as in `attention`; lo and hi must not be written to in between, and an
    Attend of inference mode is not for training."""

    def __init__(
        self, lo: Tensor | None = None, hi: Tensor | None = None, *, scale: float | None = None, impl: str | None = None
    ):
        self.lo, self.hi, self.scale, self.impl = lo, hi, scale, impl
        self.case = self.run = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _autocast(q, k, v)
        case = q.shape, k.shape, q.dtype
        if case != self.case:
            self.run, self.case = self._prepare(q, k, v), case
        return self.run(q, k, v)

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
        lo, hi, scale = self.lo, self.hi, D**-0.5 if self.scale is None else self.scale
        if k.shape != (B, S, G, D) or v.shape != k.shape or H % G:
            raise ValueError(f"attention takes q [B,T,H,D], k and v [B,S,G,D], with H a multiple of G, "
                             f"not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")  # fmt: skip
        if any(bound is not None and bound.shape != (B, T) for bound in (lo, hi)):
            shapes = [None if bound is None else list(bound.shape) for bound in (lo, hi)]
            raise ValueError(f"attention takes lo and hi [B,T] = {[B, T]}, not {shapes[0]} and {shapes[1]}")
        if scale <= 0:
            raise ValueError(f"attention takes a positive scale, not {scale}")
        impl = choose(self.impl, q.device)
        if impl == "torch":
            return partial(plain.attention, parts=plain.parts_of(q, k, lo, hi), scale=scale)
        if impl == "reference":
            t = torch.arange(T, device=q.device).expand(B, T)
            lo, hi = torch.zeros_like(t) if lo is None else lo, t + (S - T + 1) if hi is None else hi
        return partial(IMPLEMENTATIONS[impl].attention, lo=lo, hi=hi, scale=scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention in which query t reads the keys lo[t] ≤ s < hi[t].

    q: [B, T, H, D]; k, v: [B, S, G, D], where query head h reads key head h // (H // G).
    lo, hi: int32 [B, T], both non-decreasing along t. None: lo = 0, and hi = S - T + t + 1, causal with the last query
    reading all keys. scale: positive, 1/√D by default.
    Returns [B, T, H, D]. A query with an empty interval returns zeros and gives zero gradient.
    """
    return Attend(lo, hi, scale=scale, impl=impl)(q, k, v)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of the logits x weightᵀ, which are never in memory whole, and never computed for masked rows.

    x: [N, C]; weight: [V, C]; targets: int64 [N], `ignore_index` where a row has no loss.
    reduction: "mean" over the live rows, "sum", or "none" for the loss of every row, [N], 0 where there is none.
    Returns float32 or wider, in nats; with no live row the loss and all gradients are 0.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy takes x [N,C], weight [V,C] and targets [N], "
                         f"not {list(x.shape)}, {list(weight.shape)}, {list(targets.shape)}")  # fmt: skip
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy takes targets in int64, not {targets.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is none of 'mean', 'sum' and 'none'")
    impl, by_rows = choose(impl, x.device), reduction == "none"
    loss = IMPLEMENTATIONS[impl].linear_cross_entropy(*_autocast(x, weight), targets, ignore_index, by_rows)
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss
