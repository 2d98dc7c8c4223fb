"""What a launcher asks of the device, and the tile loads that all kernels share."""

import os
from functools import cache

import torch
import triton
import triton.language as tl

# Triton reads the variable when a kernel is defined: the kernels then run on the CPU, in numpy.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@cache
def architecture(device: torch.device) -> str:
    """Whose tiles a device takes, sm_80's, sm_90's, sm_100's or gfx942's. sm_80's need no more shared memory than the
    smaller GPUs of capability 8 and 12 have; the interpreter takes sm_90's."""
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
    """How tl.dot multiplies. float32: in tf32 where torch.set_float32_matmul_precision allows it; else exactly, which
    NVIDIA's matrix units do by three products in tf32. Heads wider than 128 do not fit into registers three times:
    they are multiplied one number at a time."""
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if arch == "gfx942" or width > 128 else "tf32x3"


def all_registers(arch: str) -> dict[str, int]:
    """The option of a launch that lets a thread have all registers it asks for. Without it ptxas may aim at more
    programs a multiprocessor and keep a few values on the stack."""
    return {} if arch == "gfx942" else {"maxnreg": 255}


def batch_strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.stride(0) for x in tensors)


def unit_stride(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, copied where neighbours in the last dimension are not neighbours in memory."""
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def check_input(what: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{what} in Triton takes float32, bfloat16 or float16, not {tensor.dtype}: pass impl='torch'")
    if tensor.device.type == "cpu" and not INTERPRET.value:
        raise ValueError(f"{what} in Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts")


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """a b + c, in float32."""
    if INTERPRET:  # whose tl.dot takes bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x, float32, rounded to nearest."""
    if INTERPRET and dtype == tl.bfloat16:  # which would be cut off
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_rows(p, o_row, n_rows, o_col, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile at pointers p [R, C], zeros past the last row (if ROWS) and past the last column (if COLS)."""
    if ROWS and COLS:
        return tl.load(p, mask=(o_row[:, None] < n_rows) & (o_col[None, :] < n_cols), other=0.0)
    elif ROWS:
        return tl.load(p, mask=o_row[:, None] < n_rows, other=0.0)
    elif COLS:
        return tl.load(p, mask=o_col[None, :] < n_cols, other=0.0)
    else:
        return tl.load(p)
