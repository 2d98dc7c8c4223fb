"""How many floating-point operations a pass takes, and how many a device can do in a second.

A multiply-add is 2 FLOPs. Matrix products count, and so do attention's two, which are dense: every query with every
key, whatever the mask hides, as torch's FlopCounterMode and PaLM's model FLOPs utilisation count them [Chowdhery et
al. 2022, appendix B]. Norms, activations, rotations and look-ups do not.
"""

import re
from time import perf_counter

import numpy as np
import torch

from nanopause.model import GPTConfig


def forward_flops(
    config: GPTConfig, n_tokens: int, *, batch_size: int = 1, context: int = 0, n_live: int | None = None
) -> int:
    """FLOPs of one forward pass over n_tokens new tokens of each of batch_size sequences.

    context: cached tokens before the new ones, a sequence. n_live: rows of the batch that the head computes, in all;
    every position by default. Rows without loss cost no head (kernels.linear_cross_entropy).

    [Goyal et al. 2023, appendix I] has (4nadh + 2an²d + 8nh²)·l for n tokens, a heads of width d, ad = h and l layers:
    the multiply-adds, half of the FLOPs, of a model with as many key-value heads as heads, an MLP of 4h, and no head.
    """
    C, D = config.n_embd, config.head_width
    projections = 2 * C * (2 * config.n_head + 2 * config.n_kv_head) * D
    attention = 4 * config.n_head * D * (context + n_tokens)
    mlp = 2 * C * config.n_mlp * (3 if config.mlp == "swiglu" else 2)
    rows = batch_size * n_tokens
    head = 2 * C * config.vocab_size * (rows if n_live is None else n_live)
    return rows * config.n_layer * (projections + attention + mlp) + head


def training_flops(config: GPTConfig, n_tokens: int, *, batch_size: int = 1, n_live: int | None = None) -> int:
    """FLOPs of a forward and a backward pass over batch_size sequences of n_tokens, n_live of them with a loss.

    Three forwards: the backward has two products for each one. What an implementation computes again is not counted.
    """
    return 3 * forward_flops(config, n_tokens, batch_size=batch_size, n_live=n_live)


def step_flops(config: GPTConfig, lengths: np.ndarray, n_live: int) -> int:
    """FLOPs of a forward and a backward pass over sequences of these lengths, int [n], n_live targets with a loss in
    all. A forward pass alone is a third."""
    return 3 * int(np.sum(forward_flops(config, lengths, n_live=0)) + forward_flops(config, 0, n_live=n_live))


def flops_per_pause(config: GPTConfig, context: int) -> int:
    """FLOPs of one more pause at the end of a pass, after `context` tokens, cached or of the same pass.

    Its own projections and MLP, and its attention to context + 1 keys. No head: a prefix asks it of its last token
    only, pause or not. Under a causal mask the tokens before do not read a pause, so M pauses after n tokens cost the
    sum of this at contexts n to n + M - 1. In a prefix-LM the tokens before do read them: 4·n_head·head_width·n_layer
    per such pair, n·M pairs, and M·(M - 1)/2 among the pauses. forward_flops, being dense, always counts these too.
    """
    return forward_flops(config, 1, context=context, n_live=0)


# Dense FLOP/s of the tensor cores, summing in float32, by the makers' data sheets. The whole name must match: a MIG
# slice or a laptop's GPU carries the name of a faster one.
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
    """The most FLOP/s of matrix products in dtype that a device can do, and where the figure comes from.

    From the data sheet of a GPU we know, in float16 or bfloat16; otherwise the best of a few products, a third of a
    second's work. Model FLOPs utilisation is training_flops / seconds / this.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        for name, dtypes, flops in DATA_SHEETS:
            if dtype in dtypes and re.fullmatch(name, gpu):
                return flops, f"data sheet of {gpu}"
    flops, size = _measure(device, dtype)
    return flops, f"measured by a {size}×{size} matrix product"


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """The best FLOP/s of a square matrix product within 0.25 s, and its size, which doubles while time allows."""

    def seconds_of_product():
        start = perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return perf_counter() - start

    # A generator of its own: the run's random numbers stay the same whether the peak was measured or not.
    a = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seconds_of_product()  # loads libraries
    best, seconds, end = (0.0, 0), 0.0, perf_counter() + 0.25
    while perf_counter() + seconds < end:
        seconds = seconds_of_product()
        best = max(best, (2 * len(a) ** 3 / seconds, len(a)))
        # A product of twice the size is 8 times the work; there must be time for two.
        if len(a) < 8192 and perf_counter() + 16 * seconds < end:
            a = a.repeat(2, 2)
    return best
