"""kernels.attention beside SDPA's backends and FlexAttention.

Causal, packed documents and prefix-LM, forward and backward, on 16k tokens with H·D = 2048 as in FlashAttention's
benchmark. FLOPs are those of the visible pairs of query and key: 4·D per pair and head forward, 3.5 times as many
forward and backward. Baselines build their masks before the timing; FlexAttention's mask is timed separately.
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
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.harness import OURS, Baseline, Bench, Shape, forward_and_backward
from nanopause import kernels
from nanopause.scripts.data.pydocs import documents
from nanopause.tokenizer import load_tokenizer


def shapes(device_type: str, quick: bool) -> Iterator[Shape]:
    """mask; B sequences of T tokens; H heads of width D."""
    cpu = device_type == "cpu"
    n_tokens, heads = (2048, [{"H": 4, "D": 64}]) if cpu else (16384, [{"H": 32, "D": 64}, {"H": 16, "D": 128}])
    lengths = (512, 1024, 2048) if cpu else (1024, 2048, 4096, 8192, 16384)
    for mask in ("causal", "packed") if quick else ("causal", "packed", "prefix"):
        for T in lengths[:1] if quick else lengths:
            for each in heads:
                yield {"mask": mask, "B": n_tokens // T, "T": T} | each


@dataclass
class Problem:
    """The tensors of a shape: q, k, v, upstream [B,T,H,D]; lo, hi int32 [B,T] as in kernels.attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    lo: Tensor | None = None
    hi: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v}

    def bounds(self) -> tuple[Tensor, Tensor]:
        """lo and hi [B, T], with the defaults filled in."""
        B, T = self.q.shape[:2]
        causal = torch.arange(1, T + 1, device=self.q.device).expand(B, T)
        lo = torch.zeros_like(causal) if self.lo is None else self.lo
        return lo, causal if self.hi is None else self.hi

    def dense_mask(self) -> Tensor:
        """[B, 1, T, T], added to the scores: 0 where a query attends to a key, -inf elsewhere."""
        lo, hi = self.bounds()
        s = torch.arange(self.k.shape[1], device=self.q.device)
        hidden = (s < lo[..., None]) | (s >= hi[..., None])
        return torch.zeros_like(hidden, dtype=self.q.dtype).masked_fill_(hidden, -torch.inf)[:, None]


@cache
def document_lengths() -> np.ndarray:
    """Lengths of the default corpus's documents in GPT-2 tokens, with the end of text, in a random order."""
    tokenizer = load_tokenizer("gpt2")
    return np.random.default_rng(0).permutation([len(tokenizer.encode(text)) + 1 for text in documents()])


def make_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    """The problem of a shape, with the same random numbers in every run."""
    B, T, H, D = (shape[name] for name in "BTHD")
    generator = torch.Generator(device).manual_seed(0)
    tensors = (torch.randn(B, T, H, D, generator=generator, device=device).to(dtype) for _ in range(4))
    problem = Problem(*tensors)
    if shape["mask"] == "packed":
        # Concatenated documents, as a loader packs them: the end of a sequence cuts the document there.
        lengths = document_lengths()
        ends = np.cumsum(np.tile(lengths, -(-B * T // lengths.sum())))
        starts = np.union1d(np.arange(0, B * T, T), ends[ends < B * T])
        document = np.searchsorted(starts, np.arange(B * T), side="right") - 1
        problem.lo = torch.tensor(starts[document].reshape(B, T) % T, dtype=torch.int32, device=device)
    elif shape["mask"] == "prefix":
        prefix = np.random.default_rng(0).integers(T // 4, 3 * T // 4 + 1, size=(B, 1))
        problem.hi = torch.tensor(np.maximum(np.arange(1, T + 1), prefix), dtype=torch.int32, device=device)
    return problem


def compute_truth(problem: Problem) -> dict[str, Tensor]:
    """out, dq, dk, dv by the reference, one head at a time, because the reference stores all scores."""
    wide = torch.float64 if problem.q.dtype == torch.float32 else torch.float32
    results = []
    for h in range(problem.q.shape[2]):
        q, k, v, upstream = (x[:, :, h : h + 1].to(wide) for x in (*problem.inputs.values(), problem.upstream))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = kernels.attention(*inputs, problem.lo, problem.hi, impl="reference")
        results.append((out.detach(), *torch.autograd.grad(out, inputs, upstream)))
    return {name: torch.cat(parts, dim=2) for name, parts in zip(("out", "dq", "dk", "dv"), zip(*results))}


# Baselines: problem → function of q, k, v.


def sdpa(problem: Problem, backend: SDPBackend) -> Callable:
    causal = problem.lo is problem.hi is None
    mask = None if causal else problem.dense_mask()

    def function(q, k, v):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)

    return function


def block_mask(problem: Problem):
    B, T = problem.q.shape[:2]
    lo, hi = problem.lo, problem.hi

    def visible(b, h, q, k):
        below = k <= q if hi is None else k < hi[b, q]
        return below if lo is None else below & (k >= lo[b, q])

    return create_block_mask(visible, None if lo is hi is None else B, None, T, T, device=problem.q.device)


def flex(problem: Problem) -> Callable:
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = block_mask(problem)
    return lambda *inputs: compiled(*(x.transpose(1, 2) for x in inputs), block_mask=mask).transpose(1, 2)


FLEX = "FlexAttention"
BASELINES = (
    Baseline("SDPA flash", "torch", partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)),
    Baseline("SDPA cuDNN", "torch", partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
    Baseline("SDPA efficient", "torch", partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION)),
    Baseline(FLEX, "torch", flex),
)


def measure(bench: Bench, shape: Shape) -> None:
    problem = make_problem(shape, bench.device, bench.dtype)
    truth = compute_truth(problem)
    functions = {OURS: kernels.Attend(problem.lo, problem.hi)} | bench.make_baselines(BASELINES, problem, shape)
    candidates = {name: forward_and_backward(f, problem.inputs, problem.upstream) for name, f in functions.items()}
    lo, hi = problem.bounds()
    flops = 4 * shape["D"] * shape["H"] * (hi - lo).sum().item()
    for what, factor in {"forward": 1, "forward+backward": 3.5}.items():
        calls = {name: candidate[what] for name, candidate in candidates.items()}
        for row in bench.compare(what, shape, calls, truth, factor * flops):
            if row["name"] == FLEX:
                row["block_mask_ms"] = 1e3 * median(bench.timer(lambda: block_mask(problem), 1) for _ in range(3))
