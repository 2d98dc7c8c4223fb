"""FLOPs of a forward or training step, and the peak FLOP/s of a device.

A multiply-add is 2 FLOPs. Matrix products are counted, including attention's two, which are counted dense: every query
with every key, regardless of the mask, as in torch's FlopCounterMode and PaLM's model FLOPs utilisation [Chowdhery et
al. 2022, appendix B]. Norms, activations, rotations and embedding look-ups are not counted.
"""

import json
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from nanopause.files import replace_file
from nanopause.model import GPTConfig


def forward_flops(
    config: GPTConfig, n_tokens: int, *, batch_size: int = 1, context: int = 0, n_live: int | None = None
) -> int:
    """FLOPs of one forward pass over n_tokens new tokens of each of batch_size sequences.

    context: cached tokens of each sequence before the new ones. n_live: positions of the whole batch at which the head
    is computed; default: all. Masked positions cost no head (kernels.linear_cross_entropy).

    [Goyal et al. 2023, appendix I] gives (4nadh + 2an²d + 8nh²)·l for n tokens, a heads of width d, ad = h and l
    layers: the multiply-adds, half of the FLOPs, of a model with a key-value heads, MLP width 4h, and no head.
    """
    C, D = config.n_embd, config.head_width
    projections = 2 * C * (2 * config.n_head + 2 * config.n_kv_head) * D
    attention = 4 * config.n_head * D * (context + n_tokens)
    mlp = 2 * C * config.n_mlp * (3 if config.mlp == "swiglu" else 2)
    rows = batch_size * n_tokens
    head = 2 * C * config.vocab_size * (rows if n_live is None else n_live)
    return rows * config.n_layer * (projections + attention + mlp) + head


def training_flops(config: GPTConfig, n_tokens: int, *, batch_size: int = 1, n_live: int | None = None) -> int:
    """FLOPs of a forward and a backward pass over batch_size sequences of n_tokens, with n_live unmasked positions.

    Three times the forward pass, as the backward pass has two products for each one. Recomputation is not counted.
    """
    return 3 * forward_flops(config, n_tokens, batch_size=batch_size, n_live=n_live)


def step_flops(config: GPTConfig, lengths: np.ndarray, n_live: int) -> int:
    """FLOPs of a forward and a backward pass over sequences of the given lengths, int [n], with n_live unmasked
    positions in total. A forward pass alone is a third."""
    return 3 * int(np.sum(forward_flops(config, lengths, n_live=0)) + forward_flops(config, 0, n_live=n_live))


def flops_per_pause(config: GPTConfig, context: int) -> int:
    """FLOPs of one additional pause at the end of a forward pass, after `context` tokens, cached or of the same pass.

    Its projections, its MLP, and its attention to context + 1 keys. No head: it is computed at the last position of a
    prefix only, with or without pauses. Under a causal mask earlier tokens do not attend to pauses, so M pauses after n
    tokens cost the sum over contexts n to n + M - 1. In a prefix-LM they do: 4·n_head·head_width·n_layer more for each
    of n·M pairs, and of M·(M - 1)/2 pairs of pauses. forward_flops is dense and always counts these pairs.
    """
    return forward_flops(config, 1, context=context, n_live=0)


# Dense FLOP/s of the tensor cores with float32 accumulation, from the manufacturers' data sheets. The full name must
# match: the names of MIG slices and laptop GPUs contain those of faster GPUs.
HALF = (torch.float16, torch.bfloat16)
DATA_SHEETS = (
    (r"NVIDIA B200", HALF, 2250e12),
    (r"NVIDIA H200", HALF, 989.4e12),
    (r"NVIDIA H100 80GB HBM3", HALF, 989.4e12),  # SXM
    (r"NVIDIA H[12]00 NVL", HALF, 835.5e12),
    (r"NVIDIA H100 PCIe", HALF, 756e12),
    (r"(NVIDIA )?A100[- ](SXM4|PCIE|80GB)[- ](40GB|80GB|PCIe)", HALF, 312e12),
    (r"NVIDIA L40S", HALF, 362.05e12),
    (r"NVIDIA L4", HALF, 121e12),
    (r"NVIDIA A10G", HALF, 70e12),
    (r"Tesla T4", (torch.float16,), 65e12),
    (r"NVIDIA GeForce RTX 5090", HALF, 209.5e12),
    (r"NVIDIA GeForce RTX 4090", HALF, 165.2e12),
    (r"NVIDIA GeForce RTX 3090", HALF, 71e12),
    (r"AMD Instinct MI300X.*", HALF, 1307.4e12),
)


def peak_flops(device: str | torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of matrix products in dtype on a device, and the source of the figure.

    For GPUs in DATA_SHEETS, in float16 or bfloat16, from the data sheet. Otherwise measured, which takes about 2 s, and
    kept in a file in the user's cache folder, for this device, dtype, torch version and number of threads. Model FLOPs
    utilisation is training_flops / seconds / this.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        for name, dtypes, flops in DATA_SHEETS:
            if dtype in dtypes and re.fullmatch(name, gpu):
                return flops, f"data sheet of {gpu}"
    key, measured = _cache_key(device, dtype), _read_cache()
    if key not in measured:
        measured[key] = _measure(device, dtype)
        _write_cache(measured)
    flops, size = measured[key]
    return flops, f"measured by a {size}×{size} matrix product"


def forget_peak(device: str | torch.device, dtype: torch.dtype) -> None:
    """Delete a kept measurement, so that the next run measures again. For one that is exceeded: it was made while the
    device was busy."""
    measured = _read_cache()
    if measured.pop(_cache_key(torch.device(device), dtype), None):
        _write_cache(measured)


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """The best FLOP/s of square matrix products, and the size of that product. Measures for 2 s, while other programs
    may slow down some of the products. The size doubles while four products of the larger size fit."""

    def seconds_of_product():
        start = perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return perf_counter() - start

    # A separate generator: measuring must not change the run's random numbers.
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seconds = seconds_of_product()  # warm-up: loads libraries
    best, end = (0.0, 0), perf_counter() + 2
    while not best[1] or perf_counter() + seconds < end:
        seconds = seconds_of_product()
        best = max(best, (2 * len(a) ** 3 / seconds, len(a)))
        if len(a) < 8192 and perf_counter() + 4 * 8 * seconds < end:  # twice the size takes 8 times as long
            a = a.repeat(2, 2)
    return best


def cpu_name() -> str:
    """The model name of the CPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _cache_key(device: torch.device, dtype: torch.dtype) -> str:
    name = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanopause" / "peak_flops.json"


def _read_cache() -> dict[str, tuple[float, int]]:
    try:
        return {key: (float(flops), int(size)) for key, (flops, size) in json.loads(_cache_file().read_text()).items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):  # missing or damaged, or no home folder
        return {}


def _write_cache(measured: dict[str, tuple[float, int]]) -> None:
    with suppress(OSError, RuntimeError):  # where it cannot be written, every run measures
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        replace_file(_cache_file(), json.dumps(measured, indent=1) + "\n")
