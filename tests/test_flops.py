"""The FLOP formulas against torch's own counter, and the peak that utilisation is measured by."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanopause import flops
from nanopause.flops import flops_per_pause, forward_flops, peak_flops, training_flops
from nanopause.model import GPT, GPTConfig
from nanopause.pauses import IGNORE

GPT2 = GPTConfig(vocab_size=101, block_size=32, n_layer=3, n_head=4, n_embd=48, norm="layer", qk_norm=False,
                 position="learned", mlp="gelu", tied=True, bias=True, zero_init=False)  # fmt: skip
LLAMA = GPTConfig(vocab_size=101, block_size=32, n_layer=2, n_head=6, n_kv_head=2, n_embd=48, n_mlp=136,
                  qk_norm=False, mlp="swiglu", zero_init=False)  # fmt: skip
SHAPES = pytest.mark.parametrize("config", [GPT2, LLAMA, GPTConfig(n_layer=2)], ids=["gpt2", "llama", "default"])
B, T = 3, 20


def counted(run) -> int:
    """FLOPs by FlopCounterMode, with SDPA as matrix products: it has no formula for the CPU's flash attention, and the
    one for a GPU's counts the scores' second computation in the backward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def batch(config, n_live=None):
    tokens, targets = torch.randint(config.vocab_size, (2, B, T), generator=torch.Generator().manual_seed(0))
    if n_live is not None:
        targets.flatten()[torch.randperm(B * T, generator=torch.Generator().manual_seed(1))[n_live:]] = IGNORE
    return tokens, targets


@SHAPES
def test_forward(config):
    model, (tokens, _) = GPT(config), batch(config)
    assert counted(lambda: model(tokens)) == forward_flops(config, T, batch_size=B)
    assert counted(lambda: model.hidden(tokens)) == forward_flops(config, T, batch_size=B, n_live=0)
    assert counted(lambda: model(tokens[:1])) == forward_flops(config, T)


@SHAPES
@pytest.mark.parametrize("n_live", [B * T // 2, 0])
def test_training(config, n_live):
    model, (tokens, targets) = GPT(config), batch(config, n_live)
    assert counted(lambda: model(tokens, targets).backward()) == training_flops(config, T, batch_size=B, n_live=n_live)


@SHAPES
def test_masked_rows_cost_no_head(config):
    all_live, half, none = (training_flops(config, T, batch_size=B, n_live=n) for n in (B * T, B * T // 2, 0))
    assert all_live - none == 2 * (half - none) == 3 * B * T * 2 * config.n_embd * config.vocab_size
    assert training_flops(config, T, batch_size=B) == all_live == 3 * forward_flops(config, T, batch_size=B)


@SHAPES
@pytest.mark.parametrize("n_tokens", [1, 4])
def test_cache(config, n_tokens):
    model, (tokens, _), context = GPT(config), batch(config), 11
    cache = model.new_cache(B, context + n_tokens)
    positions = torch.arange(context, context + n_tokens).expand(B, -1)

    @torch.no_grad()
    def step():
        model(tokens[:, :n_tokens], positions=positions, cache=cache)

    assert counted(step) == forward_flops(config, n_tokens, batch_size=B, context=context)


@SHAPES
def test_one_more_pause(config):
    model, (tokens, _), n = GPT(config), batch(config), 11
    cache = model.new_cache(1, n + 1)
    positions = torch.tensor([[n]])
    with torch.no_grad():
        assert counted(
            lambda: model.hidden(tokens[:1, :1], positions=positions, cache=cache)
        ) == flops_per_pause(config, n)  # fmt: skip
    # Riding along in a pass over n tokens, as the docstring has it.
    M = 5
    alone = sum(flops_per_pause(config, n + i) for i in range(M))
    read_by_earlier = 4 * config.n_embd * config.n_layer * (n * M + M * (M - 1) // 2)
    assert forward_flops(config, n + M, n_live=1) - forward_flops(config, n, n_live=1) == alone + read_by_earlier


def test_paper():
    """Appendix I of Goyal et al. 2023, which counts multiply-adds: (4nadh + 2an²d + 8nh²)·l."""
    n, l, h, a = 2048, 12, 768, 12  # noqa: E741
    d = h // a
    config = replace(GPT2, n_layer=l, n_head=a, n_kv_head=a, n_embd=h, n_mlp=4 * h)
    assert forward_flops(config, n, n_live=0) == 2 * (4 * n * a * d * h + 2 * a * n**2 * d + 8 * n * h**2) * l


def test_gpt2_by_hand():
    """GPT-2 124M at T = 1024 trains at 6·N + 12·l·h·T a token [PaLM, appendix B], N its matrices with the head once."""
    config = replace(GPT2, vocab_size=50304, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_mlp=3072)
    matrices = 12 * 12 * 768**2 + 50304 * 768
    assert training_flops(config, 1024, batch_size=8) == 8 * 1024 * (6 * matrices + 12 * 12 * 768 * 1024)


GPUS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "AMD Instinct MI300X": 1307.4e12,
}


@pytest.fixture
def gpu(monkeypatch):
    """Names the GPU that is found; where it must be measured, the figure is (1.0, 8)."""
    monkeypatch.setattr(flops, "_read_cache", dict)
    monkeypatch.setattr(flops, "_write_cache", lambda measured: None)
    monkeypatch.setattr(flops, "_measure", lambda device, dtype: (1.0, 8))
    return lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize("name", GPUS)
def test_peak_by_data_sheet(gpu, name):
    gpu(name)
    for dtype in (torch.float16, torch.bfloat16):
        assert peak_flops("cuda", dtype) == (GPUS[name], f"data sheet of {name}")
    assert peak_flops("cuda", torch.float32) == (1.0, "measured by a 8×8 matrix product")


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GB200", "NVIDIA L40"]
)
def test_peak_of_a_similar_name_is_measured(gpu, name):
    gpu(name)
    assert peak_flops("cuda:0", torch.bfloat16)[0] == 1.0


def test_peak_of_t4_has_no_bfloat16(gpu):
    gpu("Tesla T4")
    assert peak_flops("cuda", torch.float16)[0] == 65e12
    assert peak_flops("cuda", torch.bfloat16)[0] == 1.0


def test_peak_is_measured_once_on_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    peak, source = peak_flops("cpu", torch.float32)
    assert source.startswith("measured by a ") and 1e8 < peak < 1e15
    assert torch.equal(torch.get_rng_state(), before), "measuring must not disturb a run's random numbers"
    assert int(source.split("×")[1].split()[0]) >= 512

    monkeypatch.setattr(flops, "_measure", lambda device, dtype: (1.0, 8))
    assert peak_flops("cpu", torch.float32) == (peak, source)
    assert peak_flops("cpu", torch.bfloat16)[0] == 1.0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert peak_flops("cpu", torch.float32)[0] == 1.0
    torch.set_num_threads(threads)
    flops.forget_peak("cpu", torch.float32)  # the training was faster
    assert peak_flops("cpu", torch.float32)[0] == 1.0
    (tmp_path / "nanopause" / "peak_flops.json").write_text("[1]")  # damaged
    assert peak_flops("cpu", torch.float32)[0] == 1.0


def test_no_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(flops, "_measure", lambda device, dtype: (1.0, 8))
    assert peak_flops("cpu", torch.float32)[0] == 1.0
