"""GPT against transformers' models with the same weights, and against itself with a cache, packing and compilation."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanopause import kernels
from nanopause.errors import UserError
from nanopause.model import GPT, GPTConfig
from nanopause.pauses import IGNORE

V, N = 61, 24
SHAPE = dict(vocab_size=V, block_size=N, n_layer=2, n_head=6, n_embd=48, zero_init=False)
GPT2 = dict(norm="layer", qk_norm=False, position="learned", mlp="gelu", tied=True, bias=True)
LLAMA = dict(n_kv_head=2, n_mlp=72, qk_norm=False, mlp="swiglu")


def randomised(model):
    """The model with noise added to every parameter, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens_of(B, T, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# transformers as the oracle


def gpt2():
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=N, n_embd=48, n_layer=2, n_head=6))
    state = randomised(theirs).state_dict()
    rename = {"attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
              "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}  # fmt: skip
    weights = {
        "token_embedding.weight": state["transformer.wte.weight"],
        "position_embedding.weight": state["transformer.wpe.weight"],
        "norm.weight": state["transformer.ln_f.weight"],
        "norm.bias": state["transformer.ln_f.bias"],
        "head.weight": state["lm_head.weight"],
    }
    for i in range(2):
        for ours, name in rename.items():
            weight = state[f"transformer.h.{i}.{name}.weight"]
            # transformers keeps GPT-2's projections as [in, out].
            weights[f"blocks.{i}.{ours}.weight"] = weight.T if weight.ndim == 2 else weight
            weights[f"blocks.{i}.{ours}.bias"] = state[f"transformer.h.{i}.{name}.bias"]
    return theirs, GPTConfig(**SHAPE, **GPT2), weights


def llama(tied, qk_norm=False):
    shape = dict(vocab_size=V, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=N, rms_norm_eps=1e-5,
                 tie_word_embeddings=tied)  # fmt: skip
    theirs = Qwen3ForCausalLM(Qwen3Config(**shape)) if qk_norm else LlamaForCausalLM(LlamaConfig(**shape))
    state = randomised(theirs).state_dict()
    weights = {
        "token_embedding.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for i in range(2):
        layer = {name.removeprefix(f"model.layers.{i}."): weight for name, weight in state.items()}
        weights |= {
            f"blocks.{i}.attention_norm.weight": layer["input_layernorm.weight"],
            f"blocks.{i}.attention.qkv.weight": torch.cat([layer[f"self_attn.{x}_proj.weight"] for x in "qkv"]),
            f"blocks.{i}.attention.out.weight": layer["self_attn.o_proj.weight"],
            f"blocks.{i}.mlp_norm.weight": layer["post_attention_layernorm.weight"],
            f"blocks.{i}.mlp.up.weight": torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]),
            f"blocks.{i}.mlp.down.weight": layer["mlp.down_proj.weight"],
        }
        if qk_norm:
            weights |= {f"blocks.{i}.attention.{x}_norm.weight": layer[f"self_attn.{x}_norm.weight"] for x in "qk"}
    return theirs, GPTConfig(**SHAPE, **LLAMA | {"tied": tied, "qk_norm": qk_norm}), weights


ORACLES = {
    "gpt2": gpt2,
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "qwen3": lambda: llama(tied=False, qk_norm=True),
}


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request):
    """One of transformers' models, and ours with its weights."""
    theirs, config, weights = ORACLES[request.param]()
    ours = GPT(config).eval()
    ours.load_state_dict(weights)
    return theirs, ours


def additive(lo, hi):
    """The interval mask in transformers' form: [B, 1, T, T], 0 where a query attends to a key, else the minimum."""
    s = torch.arange(lo.shape[1])
    visible = (lo[..., None] <= s) & (s < hi[..., None])
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


@torch.no_grad()
def test_logits_equal_transformers(oracle):
    theirs, ours = oracle
    tokens = tokens_of(3, N)
    logits = theirs(tokens).logits
    assert logits.std() > 0.3, "logits are too uniform to distinguish models"
    close(ours(tokens), logits)


@torch.no_grad()
def test_prefix_lm_equals_transformers(oracle):
    theirs, ours = oracle
    tokens, T = tokens_of(3, N), torch.arange(N)
    lo, hi = torch.zeros(3, N, dtype=torch.int32), (T + 1).maximum(torch.tensor([[1], [7], [N]])).int()
    logits = theirs(tokens, attention_mask=additive(lo, hi)).logits
    close(ours(tokens, lo=lo, hi=hi), logits)
    assert not torch.allclose(ours(tokens)[1:, 0], logits[1:, 0], atol=1e-3), "the mask has no effect"


@torch.no_grad()
def test_packed_documents_equal_transformers(oracle):
    theirs, ours = oracle
    tokens, positions, lo, hi = packed([5, 1, 11, 7])
    logits = theirs(tokens, attention_mask=additive(lo, hi), position_ids=positions).logits
    close(ours(tokens, positions=positions, lo=lo), logits)


# Packing, cache, loss and compilation


@pytest.fixture(scope="module", params=["gpt2", "llama", "default"])
def model(request):
    settings = {"gpt2": GPT2, "llama": LLAMA, "default": {}}[request.param]
    return randomised(GPT(GPTConfig(**SHAPE, **settings)))


def packed(lengths):
    """tokens, positions, lo, hi [1, ΣT] of documents in one row."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    here = torch.arange(sum(lengths))[None]
    return tokens_of(1, sum(lengths)), positions, (here - positions).int(), (here + 1).int()


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model):
    lengths = [5, 1, 11, 7]
    tokens, positions, lo, _ = packed(lengths)
    separate = torch.cat([model(document) for document in tokens.split(lengths, dim=1)], dim=1)
    close(model(tokens, positions=positions, lo=lo), separate)


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * N, [9, 1, 1, 7, 6], [N - 1, 1], [N]], ids=["tokens", "chunks", "last", "once"])
def test_cache_equals_one_forward(model, steps):
    """For any split into steps. The cache may be longer than the sequence."""
    tokens, positions = tokens_of(2, N), torch.arange(N).expand(2, N)
    cache = model.new_cache(2, N + 3).fill_(99.0)
    parts = [
        model(t, positions=p, cache=cache) for t, p in zip(tokens.split(steps, dim=1), positions.split(steps, dim=1))
    ]
    close(torch.cat(parts, dim=1), model(tokens))


@torch.no_grad()
def test_cache_of_sequences_of_different_lengths(model):
    """Prompts are padded on the right. No query attends to the padding's keys, which later tokens overwrite."""
    lengths, new, longest = torch.tensor([9, 4, 1]), 5, 9
    sequences = tokens_of(3, longest + new)
    cache = model.new_cache(3, longest + new)
    prompts = torch.where(torch.arange(longest) < lengths[:, None], sequences[:, :longest], V - 1)
    model(prompts, positions=torch.arange(longest).expand(3, -1), cache=cache)
    positions = lengths[:, None] + torch.arange(new)
    logits = model(sequences.gather(1, positions), positions=positions, cache=cache)
    for b, n in enumerate(lengths):
        close(logits[b], model(sequences[b : b + 1, : n + new])[0, n:])


@torch.no_grad()
def test_cache_of_a_prefix_lm(model):
    """A bidirectional prefix in one step, then a causal target."""
    tokens, prefix, here = tokens_of(2, N), 10, torch.arange(N).expand(2, N)
    hi = (here + 1).clamp(min=prefix).int()
    cache = model.new_cache(2, N)
    parts = [
        model(tokens[:, :prefix], positions=here[:, :prefix], hi=hi[:, :prefix], cache=cache),
        model(tokens[:, prefix:], positions=here[:, prefix:], cache=cache),
    ]
    close(torch.cat(parts, dim=1), model(tokens, hi=hi))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_cross_entropy_of_the_logits(model, reduction):
    tokens, targets = tokens_of(3, N), tokens_of(3, N, seed=1)
    targets[torch.rand(3, N, generator=torch.Generator().manual_seed(2)) < 0.4] = IGNORE
    loss = model(tokens, targets, reduction=reduction)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)
    close(loss, expected)
    parameters = list(model.parameters())
    for got, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_training_step_is_one_graph(model, impl, monkeypatch):
    """For packed documents with masked targets, compiled and eager, with both implementations."""
    tokens, positions, lo, _ = packed([5, 1, 11, 7])
    targets = tokens.roll(-1)
    targets[0, 4::3] = IGNORE

    def results(forward):
        loss = forward(tokens, targets, positions=positions, lo=lo)
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    expected = results(model)
    monkeypatch.setattr(kernels, "choose", lambda *_: impl)
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for got, wanted in zip(results(forward), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_cache_in_triton(model, monkeypatch):
    tokens, here, cache = tokens_of(2, N), torch.arange(N).expand(2, N), model.new_cache(2, 3 * N)
    expected = model(tokens)
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    steps = [9, 1, 2, N - 12]
    parts = [model(t, positions=p, cache=cache) for t, p in zip(tokens.split(steps, dim=1), here.split(steps, dim=1))]
    close(torch.cat(parts, dim=1), expected)


# Weights


@pytest.mark.parametrize("zero_init", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_initialisation(zero_init, tied):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, n_layer=8, norm="layer", position="learned", bias=True, tied=tied,
                          zero_init=zero_init))  # fmt: skip
    residual = 0.0 if zero_init else 0.02 / math.sqrt(2 * 8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            std, mean = 0, 0
        elif "norm" in name:
            std, mean = 0, 1
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            std, mean = residual, 0
        else:
            std, mean = 0.0 if name == "head.weight" and zero_init else 0.02, 0
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert parameter.mean().item() == pytest.approx(mean, abs=0.1 * std), name


def n_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def gpt2_shaped(**shape):
    return GPTConfig(**GPT2, **shape)


def test_gpt2_has_124_million_parameters():
    """With and without pauses: the pause, id 50257, uses one of the padding rows."""
    config = gpt2_shaped(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    assert n_parameters(config) == 124_475_904
    assert 50257 < config.vocab_size


@pytest.mark.parametrize("heads, h, layers, total", [(12, 768, 12, 136_237_056), (32, 2048, 24, 1_345_085_440)])
def test_papers_parameters(heads, h, layers, total):
    """[Goyal et al. 2023, table 5]. GPT-2's block with an MLP of 4h has 12h² + 13h parameters. The published totals
    leave 66,642 rows for the embeddings of both models. The table's MLP width of the 1B model, 8092, must be a typo for
    8192, as otherwise the remainder is not a whole number of rows.
    """
    rows = 66_642
    assert layers * (12 * h**2 + 13 * h) + 2 * h + rows * h == total
    shape = dict(n_layer=layers, n_head=heads, n_embd=h, vocab_size=rows - 2048, block_size=2048)
    assert n_parameters(gpt2_shaped(**shape)) == total
    if h == 2048:
        assert gpt2_shaped(**shape).n_mlp == 8192
        left_over = total - n_parameters(gpt2_shaped(**shape, n_mlp=8092))
        assert left_over > 0 and left_over % h


@pytest.mark.parametrize(
    "shape, sentence",
    [
        (dict(n_embd=100, n_head=3), "n_embd=100 must be a multiple of n_head=3"),
        (dict(n_head=4, n_kv_head=3), "n_head=4 must be a multiple of n_kv_head=3"),
        (dict(n_head=2, n_kv_head=4), "n_head=2 must be a multiple of n_kv_head=4"),
        (dict(n_embd=20, n_head=4), "position=rope needs an even head width, and it is 5"),
    ],
)
def test_impossible_shapes_are_refused(shape, sentence):
    with pytest.raises(UserError, match=sentence):
        GPTConfig(**shape)


def test_odd_head_width_works_without_rope():
    GPT(GPTConfig(n_embd=20, n_head=4, position="learned"))(torch.zeros(1, 3, dtype=torch.int64))


def test_intervals_are_analysed_once_per_forward(monkeypatch):
    calls, parts_of = [], kernels.plain.parts_of
    monkeypatch.setattr(kernels.plain, "parts_of", lambda *args: calls.append(args) or parts_of(*args))
    model = GPT(GPTConfig(n_layer=3, n_embd=32)).eval()
    for _ in range(2):
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert len(calls) == 2
