"""API of the two operations that dominate a transformer's run time, with a choice of implementations.

Implementations: `triton` (attention.py, decode.py, linear_cross_entropy.py), `torch` (plain.py: the fastest plain
PyTorch) and `reference` (dense and simple, the oracle of all tests). `impl=None` selects by device and prints the
choice once.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nanopause.kernels import plain, reference

IMPLEMENTATIONS = {"torch": plain, "reference": reference}
if find_spec("triton"):  # not available for macOS and Windows
    # Import before the functions below shadow the names of these modules.
    from nanopause.kernels.attention import attention as _attention
    from nanopause.kernels.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy

    IMPLEMENTATIONS["triton"] = SimpleNamespace(attention=_attention, linear_cross_entropy=_linear_cross_entropy)
_said = set()

if __name__ == "kernels":
    # In the root of a clone `import kernels` finds this folder, but other libraries mean Hugging Face's package.
    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [path for path in sys.path if Path(path).resolve() != _root])
    if _spec:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])


def choose(impl: str | None, device: torch.device) -> str:
    """The name of the implementation to run. None: the default of the device, printed once per device type to stderr.

    Raises ValueError for an unknown name."""
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
    """Cast to the autocast dtype if autocast is enabled, as for every matrix product."""
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)
    return tensors


class Attend:
    """Attention shared by the layers of one forward pass, which have the same intervals: what an implementation derives
    from them, such as a mask, is computed once. Arguments as in `attention`. lo and hi must not be modified between
    calls, and an Attend used in inference mode must not be used for training."""

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
        if k.shape != (B, S, G, D) or v.shape != k.shape or not (G and D) or H % G:
            raise ValueError(f"attention takes q [B,T,H,D], k and v [B,S,G,D], with H a multiple of G, "
                             f"and G and D above 0, not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")  # fmt: skip
        lo, hi, scale = self.lo, self.hi, D**-0.5 if self.scale is None else self.scale
        for bound in (lo, hi):
            if bound is not None and (bound.shape != (B, T) or bound.dtype != torch.int32):
                raise ValueError(f"attention takes lo and hi int32 [B,T] = {[B, T]}, "
                                 f"not {bound.dtype} {list(bound.shape)}")  # fmt: skip
        if not 0 < scale < math.inf:
            raise ValueError(f"attention takes a positive and finite scale, not {scale}")
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
    """Attention in which query t attends to the keys lo[t] ≤ s < hi[t].

    q: [B, T, H, D]; k, v: [B, S, G, D]; query head h attends to key head h // (H // G).
    lo, hi: int32 [B, T], both non-decreasing along t. None: lo = 0, and hi = S - T + t + 1, causal with the last query
    attending to all keys. scale: positive; default 1/√D. impl: see `choose`.
    Returns [B, T, H, D]. The output of a query with an empty interval is zero, and so are its gradients. All keys and
    values must be finite, also those that no query attends to: a NaN times a probability of 0 is NaN.
    Raises ValueError for shapes or dtypes that do not fit together, or a scale that is not positive and finite.
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
    """Cross-entropy of the logits x weightᵀ, which are never stored as a whole, and not computed at masked positions.

    x: [N, C]; weight: [V, C]; targets: int64 [N], `ignore_index` at masked positions. impl: see `choose`.
    reduction: "mean" over the unmasked positions, "sum", or "none" for the loss of every position, [N], 0 if masked.
    Returns float32 or wider, in nats. If all positions are masked, the loss and all gradients are 0.
    It can be differentiated once, in reverse mode; impl="reference" again and in forward mode.
    Raises ValueError for shapes, dtypes or reductions other than these.
    """
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1] and targets.shape == x.shape[:1]
    if not (fits and weight.numel()):
        raise ValueError(f"linear_cross_entropy takes x [N,C], weight [V,C] and targets [N] with V and C above 0, "
                         f"not {list(x.shape)}, {list(weight.shape)}, {list(targets.shape)}")  # fmt: skip
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy takes targets in int64, not {targets.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is none of 'mean', 'sum' and 'none'")
    impl, by_rows = choose(impl, x.device), reduction == "none"
    if impl != "reference" and not torch.compiler.is_compiling():
        if any(forward_ad.unpack_dual(each).tangent is not None for each in (x, weight)):
            raise NotImplementedError(f"impl={impl!r} has no forward-mode derivative: use impl='reference'")
    loss = IMPLEMENTATIONS[impl].linear_cross_entropy(*_autocast(x, weight), targets, ignore_index, by_rows)
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss
