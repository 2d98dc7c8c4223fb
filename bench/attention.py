"""kernels.attention beside SDPA's backends, FlexAttention, torch's varlen_attn and flash-attn.

Causal, packed documents, prefix-LM, forward and backward; and decode steps, a few queries against a cache, forward.
16k tokens and H·D = 2048, as FlashAttention's own benchmark has them. FLOPs are those of the visible pairs of query and
key, 4·D a pair and head forward, 3.5 times that forward and backward; of a decode step, the bytes of the visible keys
and values. Masks of rivals are made beforehand; the time that FlexAttention's takes is measured by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
from bench.harness import OURS, Bench, Rival, Shape, number, passes
from data.pydocs import documents
from nanopause.tokenizer import load_tokenizer

# GPT-2 124M's heads, and Llama 3 8B's.
GPT2, LLAMA = {"H": 12, "D": 64}, {"H": 32, "G": 8, "D": 128}


def shapes(device_type: str, quick: bool) -> Iterator[Shape]:
    """mask, B sequences of T queries, S keys (as many, where not given), H heads of D, G of them (or H) with keys."""
    if device_type == "cpu":
        heads = {"H": 4, "D": 64}
        for T in (512,) if quick else (512, 1024, 2048):
            yield {"mask": "causal", "B": 2048 // T, "T": T} | heads
        for mask in ("packed",) if quick else ("packed", "prefix"):
            for T in (1024,) if quick else (1024, 2048):
                yield {"mask": mask, "B": 2048 // T, "T": T} | heads
        for T in (11,) if quick else (1, 11, 51):
            yield {"mask": "decode", "B": 8, "T": T, "S": 1024} | GPT2
        if not quick:
            yield {"mask": "causal", "B": 2, "T": 1024, "H": 2, "D": 128}
        return
    wide = {64: {"H": 32, "D": 64}, 128: {"H": 16, "D": 128}}
    for T in (4096,) if quick else (512, 1024, 2048, 4096, 8192, 16384):
        for heads in wide.values():
            yield {"mask": "causal", "B": 16384 // T, "T": T} | heads
    if quick:
        yield {"mask": "packed", "B": 1, "T": 16384} | wide[64]
        yield {"mask": "prefix", "B": 4, "T": 4096} | wide[64]
        for T in (1, 11):
            yield {"mask": "decode", "B": 8, "T": T, "S": 4096} | GPT2
        return
    yield {"mask": "causal", "B": 4, "T": 4096} | LLAMA
    for mask in ("packed", "prefix"):
        for T in (2048, 16384):
            for heads in wide.values():
                yield {"mask": mask, "B": 16384 // T, "T": T} | heads
    for B in (1, 8, 32):
        for T in (1, 11, 16, 51):
            yield {"mask": "decode", "B": B, "T": T, "S": 4096} | GPT2
    for S in (1024, 16384):
        for T in (1, 11):
            yield {"mask": "decode", "B": 8, "T": T, "S": S} | GPT2
    for B, T, S in ((1, 1, 4096), (8, 1, 4096), (8, 11, 4096), (32, 11, 4096), (8, 11, 16384)):
        yield {"mask": "decode", "B": B, "T": T, "S": S} | LLAMA


@dataclass
class Problem:
    """Tensors of a shape: q, upstream [B,T,H,D]; k, v [B,S,G,D]. lo, hi: as kernels.attention takes them.

    starts: packed only, int32, where documents start in the B·T tokens, and B·T; longest: the tokens of the longest.
    lengths: decode only, int32 [B], the keys of each sequence, of which the last T are the queries' own.
    """

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    lo: Tensor | None = None
    hi: Tensor | None = None
    starts: Tensor | None = None
    longest: int | None = None
    lengths: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, T, S, H, G, D."""
        return *self.q.shape[:2], *self.k.shape[1:2], self.q.shape[2], *self.k.shape[2:]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v}

    def bounds(self) -> tuple[Tensor, Tensor]:
        """lo and hi [B, T], also where they are None."""
        B, T, S, *_ = self.sizes
        causal = torch.arange(S - T + 1, S + 1, device=self.q.device).expand(B, T)
        lo = torch.zeros_like(causal) if self.lo is None else self.lo
        return lo, causal if self.hi is None else self.hi

    def dense_mask(self) -> Tensor:
        """[B, 1, T, S] to add to scores: 0 where a query reads a key and -inf elsewhere."""
        lo, hi = self.bounds()
        s = torch.arange(self.k.shape[1], device=self.q.device)
        hidden = (s < lo[..., None]) | (s >= hi[..., None])
        return torch.zeros_like(hidden, dtype=self.q.dtype).masked_fill_(hidden, -torch.inf)[:, None]


@cache
def document_lengths() -> np.ndarray:
    """Of the default corpus, in GPT-2's tokens with the end of text, in an order of its own."""
    tokenizer = load_tokenizer("gpt2")
    lengths = [len(tokenizer.encode(text)) + 1 for text in documents()]
    return np.random.default_rng(0).permutation(lengths)


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    """The problem of a shape, the same every time."""
    B, T, H, D = (shape[name] for name in "BTHD")
    S, G = shape.get("S", T), shape.get("G", H)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, upstream = (
        torch.randn(size, generator=generator, device=device).to(dtype)
        for size in ((B, T, H, D), (B, S, G, D), (B, S, G, D), (B, T, H, D))
    )
    problem = Problem(shape, q, k, v, upstream)
    draws = np.random.default_rng(0)

    def tensor(array):
        return torch.tensor(array, dtype=torch.int32, device=device)

    if shape["mask"] == "packed":
        # Documents one after another, as a loader packs them: the end of a row cuts the one that stands there.
        lengths = document_lengths()
        ends = np.cumsum(np.tile(lengths, -(-B * T // lengths.sum())))
        starts = np.union1d(np.arange(0, B * T, T), ends[ends < B * T])
        document = np.searchsorted(starts, np.arange(B * T), side="right") - 1
        problem.lo = tensor(starts[document].reshape(B, T) % T)
        starts = np.append(starts, B * T)
        problem.starts, problem.longest = tensor(starts), int(np.diff(starts).max())
    elif shape["mask"] == "prefix":
        prefix = draws.integers(T // 4, 3 * T // 4 + 1, size=(B, 1))
        problem.hi = tensor(np.maximum(np.arange(1, T + 1), prefix))
    elif shape["mask"] == "decode":
        lengths = draws.integers(max(T, S // 2), S + 1, size=B)
        lengths[0] = S
        problem.lengths = tensor(lengths)
        problem.hi = tensor(lengths[:, None] - T + np.arange(1, T + 1))
    return problem


def truth(problem: Problem) -> dict[str, Tensor]:
    """out, dq, dk, dv by the reference, one key head after another, for its scores are all in memory."""
    wide = torch.float64 if problem.q.dtype == torch.float32 else torch.float32
    _, _, _, H, G, _ = problem.sizes
    results = []
    for g in range(G):
        heads, head = slice(g * H // G, (g + 1) * H // G), slice(g, g + 1)
        inputs = [
            x.to(wide).requires_grad_() for x in (problem.q[:, :, heads], problem.k[:, :, head], problem.v[:, :, head])
        ]
        out = kernels.attention(*inputs, problem.lo, problem.hi, impl="reference")
        results.append((out.detach(), *torch.autograd.grad(out, inputs, problem.upstream[:, :, heads].to(wide))))
    return {name: torch.cat(parts, dim=2) for name, parts in zip(("out", "dq", "dk", "dv"), zip(*results))}


# Rivals: problem → function of q, k, v. What they need beside these, such as masks, is made here and is not timed; nor
# is what kernels.Attend makes of the intervals.


def sdpa(backend: SDPBackend, problem: Problem) -> Callable:
    B, T, S, H, G, _ = problem.sizes
    causal, mask = T == S and problem.lo is None and problem.hi is None, None
    if problem.lengths is not None and B == 1:  # the whole cache: nothing to mask but the queries from each other
        if T > 1:
            mask = causal_lower_right(T, S) if backend == SDPBackend.FLASH_ATTENTION else problem.dense_mask()
    elif not causal:
        mask = problem.dense_mask()
    grouped = {"enable_gqa": True} if G != H else {}

    def function(q, k, v):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **grouped).transpose(1, 2)

    return function


def block_mask(problem: Problem):
    B, T, S, *_ = problem.sizes
    lo, hi = problem.lo, problem.hi

    def visible(b, h, q, k):
        seen = k <= q if hi is None else k < hi[b, q]
        return seen if lo is None else seen & (k >= lo[b, q])

    return create_block_mask(visible, None if lo is hi is None else B, None, T, S, device=problem.q.device)


def flex(problem: Problem) -> Callable:
    compiled, mask = torch.compile(flex_attention, dynamic=False), block_mask(problem)
    _, _, _, H, G, _ = problem.sizes

    def function(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=G != H).transpose(1, 2)

    return function


def varlen(problem: Problem) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    B, T, S, H, G, _ = problem.sizes
    starts_q = starts_k = problem.starts
    longest_q, longest_k = (problem.longest or n for n in (T, S))
    options = {"enable_gqa": True} if G != H else {}
    if problem.shape["mask"] == "prefix":
        raise NotImplementedError("varlen_attn has no prefix-LM mask")
    if starts_q is None:
        starts_q, starts_k = (torch.arange(0, B * n + 1, n, dtype=torch.int32, device=problem.q.device) for n in (T, S))
    if problem.lengths is not None:
        options["seqused_k"] = problem.lengths

    def function(q, k, v):
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = varlen_attn(*flat, starts_q, starts_k, longest_q, longest_k, window_size=(-1, 0), **options)
        return out.unflatten(0, (B, T))

    return function


def flash_attn(problem: Problem) -> Callable:
    from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

    B, T, *_ = problem.sizes
    match problem.shape["mask"]:
        case "causal":
            return partial(flash_attn_func, causal=True)
        case "decode":
            return lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_seqlens=problem.lengths, causal=True)
        case "packed":

            def function(q, k, v):
                flat, n = (x.flatten(0, 1) for x in (q, k, v)), problem.longest
                out = flash_attn_varlen_func(*flat, problem.starts, problem.starts, n, n, causal=True)
                return out.unflatten(0, (B, T))

            return function
    raise NotImplementedError("flash-attn has no prefix-LM mask")


FLEX = "FlexAttention"
RIVALS = (
    Rival("SDPA flash", "torch", partial(sdpa, SDPBackend.FLASH_ATTENTION)),
    Rival("SDPA cuDNN", "torch", partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    Rival("SDPA efficient", "torch", partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    Rival(FLEX, "torch", flex),
    Rival("varlen_attn", "torch", varlen),
    Rival("flash-attn", "flash-attn", flash_attn),
)


def main(quick: bool = False) -> None:
    """Attention, forward and backward, beside its rivals.

    Args:
        quick: Fewer shapes and samples, in less than two minutes.
    """
    bench = Bench("attention", quick)
    for shape in shapes(bench.device.type, quick):
        bench.attempt(measure, shape)
    bench.write()
    bench.show(
        lambda row: f"{row['shape']['mask']}, {row['what']}: ms, and how many times ours",
        lambda row: f"{number(row['p50_ms'])} {row['ratio']:5.2f}",
        first={
            "ours": lambda row: number(row["p50_ms"]),
            "TFLOP/s": lambda row: number(row["tflops"]),
            "GB/s": lambda row: number(row["gbps"]),
            "% of peak": lambda row: number(row["percent_of_peak"]),
        },
        last={"Flex's mask": lambda rows: number(rows.get(FLEX, {}).get("block_mask_ms"))},
        hidden=("mask",),
    )
    bench.finish()


def measure(bench: Bench, shape: Shape) -> None:
    problem = make(shape, bench.device, bench.dtype)
    expected = truth(problem)
    functions = {OURS: kernels.Attend(problem.lo, problem.hi)}
    functions |= bench.functions(RIVALS, problem, shape)
    candidates = {name: passes(function, problem.inputs, problem.upstream) for name, function in functions.items()}
    lo, hi = problem.bounds()
    _, _, _, H, G, D = problem.sizes
    flops = 4 * D * H * (hi - lo).sum().item()
    if problem.lengths is not None:
        read = 2 * problem.lengths.sum().item() * G * D * problem.k.itemsize
        works = {"forward": {"read_bytes": read}}
    else:
        works = {"forward": {"flops": flops}, "forward+backward": {"flops": 3.5 * flops}}
    for what, work in works.items():
        calls = {name: candidate[what] for name, candidate in candidates.items()}
        for row in bench.compete(what, shape, calls, expected, **work):
            if row["name"] == FLEX:
                row["block_mask_ms"] = 1e3 * median(bench.sample(lambda: block_mask(problem), 1) for _ in range(3))
