"""Device properties for the launchers, and tile operations shared by all kernels."""

import os
from functools import cache

import torch
import triton
import triton.language as tl

# With TRITON_INTERPRET=1, kernels run on the CPU in NumPy. Triton reads the variable when a kernel is defined.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@cache
def architecture(device: torch.device) -> str:
    """Key of the tile tables for a device: sm_80, sm_90, sm_100 or gfx942. The tiles of sm_80 fit into the shared
    memory of the smaller GPUs of capability 8 and 12. The interpreter uses sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_properties(device).major, "sm_80")


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 << 20


def precision(dtype: torch.dtype, arch: str, width: int = 0) -> str:
    """input_precision of tl.dot. float32: tf32 if torch.set_float32_matmul_precision allows it; otherwise full
    precision, which NVIDIA's tensor cores reach by three tf32 products. Heads wider than 128 do not fit into registers
    three times and use ordinary float32 arithmetic."""
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if arch == "gfx942" or width > 128 else "tf32x3"


def all_registers(arch: str) -> dict[str, int]:
    """Launch option that allows a thread the maximum number of registers. Without it ptxas may aim for more programs
    per multiprocessor and spill a few values to the stack."""
    return {} if arch == "gfx942" else {"maxnreg": 255}


def batch_strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.stride(0) for x in tensors)


def unit_stride(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, each made contiguous if the stride of its last dimension is not 1."""
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def check_input(what: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{what} in Triton takes float32, bfloat16 or float16, not {tensor.dtype}: pass impl='torch'")
    if tensor.device.type == "cpu" and not INTERPRET.value:
        raise ValueError(f"{what} in Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts")


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """a b + c, accumulated in float32."""
    if INTERPRET:  # its tl.dot treats bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x, float32, rounded to the nearest value of dtype."""
    if INTERPRET and dtype == tl.bfloat16:  # the interpreter truncates to bfloat16
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_rows(p, o_row, n_rows, o_col, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile at pointers p [R, C], with zeros past the last row (if ROWS) and past the last column (if COLS)."""
    if ROWS and COLS:
        return tl.load(p, mask=(o_row[:, None] < n_rows) & (o_col[None, :] < n_cols), other=0.0)
    elif ROWS:
        return tl.load(p, mask=o_row[:, None] < n_rows, other=0.0)
    elif COLS:
        return tl.load(p, mask=o_col[None, :] < n_cols, other=0.0)
    else:
        return tl.load(p)
