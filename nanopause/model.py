"""The transformer: one block, configurable from GPT-2's decoder to Llama's.

Shapes: B sequences, T tokens, C width, H query heads, G key-value heads, D head width, S cache length, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopause import kernels
from nanopause.errors import UserError


@dataclass
class GPTConfig:
    """Architecture of a model. The defaults are the small model that `train.py` pretrains in minutes."""

    vocab_size: int = 258
    """Rows of the embedding table, including the pause's and any padding."""
    block_size: int = 256
    """Longest sequence, in tokens, pauses included."""
    n_layer: int = 3
    """Transformer blocks."""
    n_head: int = 4
    """Query heads per block."""
    n_kv_head: int | None = None
    """Key-value heads per block; divides n_head. None: n_head."""
    n_embd: int = 128
    """Width of the residual stream; a multiple of n_head unless head_dim is given."""
    head_dim: int | None = None
    """Width of a head. None: n_embd/n_head."""
    n_mlp: int | None = None
    """Hidden width of the MLP. None: 4·n_embd."""
    norm: Literal["layer", "rms"] = "rms"
    """Normalisation before every sublayer and at the end."""
    norm_eps: float = 1e-5
    """Epsilon added to the variance in every normalisation."""
    qk_norm: bool = True
    """RMS-normalise queries and keys of each head."""
    position: Literal["learned", "rope"] = "rope"
    """Learned position embeddings, or rotary positions (RoPE) on queries and keys."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths, in tokens."""
    rope_scaling: list[float] | None = None
    """Scaling of rotary wavelengths: [factor] multiplies all; Llama 3.1's [factor, low, high, n] multiplies those above
    n/low tokens, keeps those below n/high, and interpolates in between."""
    mlp: Literal["gelu", "swiglu", "relu2"] = "relu2"
    """GELU (tanh approximation), SwiGLU, or the square of ReLU."""
    tied: bool = False
    """Share one matrix between head and token embedding."""
    bias: bool = False
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values. None: same as bias."""
    zero_init: bool = True
    """Initialise residual projections and an untied head to zero, instead of GPT-2's scaled normal."""

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.n_mlp = 4 * self.n_embd if self.n_mlp is None else self.n_mlp
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        scaling = self.rope_scaling or [1.0]
        increasing = sorted(set(scaling[1:3])) == scaling[1:3]
        if len(scaling) not in (1, 4) or not increasing or not all(0 < x < math.inf for x in scaling):
            raise UserError(f"rope_scaling={','.join(map(str, scaling))} must be a factor, or a factor, low, high and "
                            f"a number of tokens, all above 0 and low below high")  # fmt: skip
        if self.position == "rope" and self.head_width % 2:
            raise UserError(f"position=rope needs an even head width, and it is {self.head_width}: change --head_dim, "
                            f"or --n_embd or --n_head")  # fmt: skip

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim


def norm(config: GPTConfig, width: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, eps=config.norm_eps)


def rope_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position for `rotate`, float32 [block_size, D] each; the first half of sin is negated.
    Angles are float32 products, as in the training of published models."""
    D = config.head_width
    frequency = 1 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)  # radians per token
    if config.rope_scaling:
        factor, *rest = config.rope_scaling
        unscaled = torch.zeros_like(frequency)  # weight of the original frequency, 0 to 1
        if rest:
            low, high, n = rest
            unscaled = ((n * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (unscaled + (1 - unscaled) / factor)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions [Su et al. 2021] with Llama's split into halves. x: [B, T, H, D]; cos, sin: [B or 1, T, 1, D].

    Entry i < D/2 is paired with i + D/2: roll swaps the halves, and sin is negated in the first. Each product is
    rounded before the addition, as in transformers, so that the logits are bit-identical to transformers'."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        D = config.head_width
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * D, bias=qkv_bias)
        self.out = nn.Linear(config.n_head * D, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None for _ in "qk")

    def forward(self, x, rope, attend, cache, write_at):
        qkv = self.qkv(x).unflatten(2, (self.n_head + 2 * self.n_kv_head, -1))
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            keys, values = cache
            k, v = keys.index_put_(write_at, k.to(keys.dtype)), values.index_put_(write_at, v.to(values.dtype))
        return self.out(attend(q, k, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.mlp
        # SwiGLU's gate and value are computed by one matrix product.
        self.up = nn.Linear(config.n_embd, config.n_mlp * (2 if config.mlp == "swiglu" else 1), bias=config.bias)
        self.down = nn.Linear(config.n_mlp, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.up(x)
        if self.activation == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.activation == "relu2":
            x = F.relu(x).square()
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.down(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm, self.attention = norm(config, config.n_embd), Attention(config)
        self.mlp_norm, self.mlp = norm(config, config.n_embd), MLP(config)

    def forward(self, x, rope, attend, cache, write_at):
        x = x + self.attention(self.attention_norm(x), rope, attend, cache, write_at)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        else:
            for name, table in zip(("rope_cos", "rope_sin"), rope_tables(config)):
                self.register_buffer(name, table, persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = norm(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """GPT-2's initialisation: normal, std 0.02; residual projections 0.02/√(2·n_layer), or zero with zero_init."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
            for projection in (module.attention.out, module.mlp.down):
                nn.init.normal_(projection.weight, std=std)
        if module is self and self.config.zero_init and not self.config.tied:
            nn.init.zeros_(self.head.weight)

    def extend(self, block_size: int) -> None:
        """Accept longer sequences than in pretraining: compute the rotary tables of their positions."""
        self.config = replace(self.config, block_size=block_size)
        self.rope_cos, self.rope_sin = (table.to(self.rope_cos) for table in rope_tables(self.config))

    def hidden(self, tokens, *, positions=None, lo=None, hi=None, cache=None, write_at=None) -> Tensor:
        """Hidden states after the final norm, [B, T, C], of tokens [B, T].

        positions: int [B, T]; default 0, 1, 2, … In packed documents each document starts at 0.
        lo, hi: int32 [B, T], the interval of keys that each query attends to (kernels.attention); default causal.
        cache: from new_cache. write_at: int [B, T], where the tokens' keys and values are written in it; default:
        positions, which are then required. hi defaults to write_at + 1.
        Raises UserError for more than block_size tokens without positions.
        """
        if write_at is None:
            write_at = positions
        if cache is not None and hi is None:
            hi = (write_at + 1).int()
        if positions is None:
            if tokens.shape[1] > self.config.block_size:
                raise UserError(f"{tokens.shape[1]} tokens are more than block_size={self.config.block_size}: shorten "
                                f"the text")  # fmt: skip
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if cache is not None:
            write_at = torch.arange(len(tokens), device=tokens.device)[:, None], write_at
        x, rope, attend = self.token_embedding(tokens), None, kernels.Attend(lo, hi)
        if self.config.position == "learned":
            x = x + self.position_embedding(positions)
        else:
            rope = self.rope_cos[positions][:, :, None], self.rope_sin[positions][:, :, None]
        layers = [None] * len(self.blocks) if cache is None else zip(*cache.unbind(1))
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rope, attend, layer, write_at)
        return self.norm(x)

    def forward(
        self, tokens, targets=None, *, reduction="mean", positions=None, lo=None, hi=None, cache=None, write_at=None
    ) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]. With targets, int64 [B, T], IGNORE at masked positions: their
        cross-entropy in nats, a scalar, computed without storing the logits. Other arguments as in `hidden`."""
        x = self.hidden(tokens, positions=positions, lo=lo, hi=hi, cache=cache, write_at=write_at)
        if targets is None:
            return self.head(x)
        return kernels.linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), reduction=reduction)

    def new_cache(self, batch_size: int, length: int) -> Tensor:
        """KV cache of `length` positions for `batch_size` sequences, zeros [n_layer, 2, B, S, G, D].

        The memory layout is [n_layer, 2, G, B, S, D]: the keys of one head, which a query reads in order, are
        contiguous."""
        config = self.config
        shape = config.n_layer, 2, config.n_kv_head, batch_size, length, config.head_width
        return self.token_embedding.weight.new_zeros(shape).permute(0, 1, 3, 4, 2, 5)
