"""Generation on the cache says what the model says without one."""

import pytest
import torch

from nanopause.engine import sample, stream
from nanopause.errors import UserError
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
GPT2_STYLE = dict(position="learned", norm="layer", qk_norm=False, mlp="gelu", tied=True, bias=True)
LLAMA_STYLE = dict(position="rope", norm="rms", qk_norm=False, mlp="swiglu", n_kv_head=2)


def model_of(style, block_size=48):
    torch.manual_seed(0)
    shape = dict(vocab_size=BYTES.vocab_size, block_size=block_size, n_layer=2, n_head=4, n_embd=32, zero_init=False)
    model = GPT(GPTConfig(**shape, **style)).eval()
    for parameter in model.parameters():  # untrained logits are too flat to tell tokens apart
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def greedy_without_cache(model, tokens, n):
    """n tokens by whole forward passes, with the ids from the pause on banned."""
    for _ in range(n):
        logits = model(torch.tensor([tokens]))[0, -1]
        tokens = [*tokens, logits[: BYTES.pause_id].argmax().item()]
    return tokens[-n:]


@pytest.mark.parametrize("style", [GPT2_STYLE, LLAMA_STYLE, {}], ids=["gpt2", "llama", "modern"])
@pytest.mark.parametrize("pauses", [0, 1, 10])
def test_prompt_and_pauses_are_one_pass_with_the_result_of_many(style, pauses):
    model = model_of(style)
    expected = greedy_without_cache(model, BYTES.encode("a prompt") + [BYTES.pause_id] * pauses, 12)
    passes = []
    hook = model.token_embedding.register_forward_hook(lambda module, args, out: passes.append(args[0].shape[1]))
    made = list(stream(model, BYTES, "a prompt", pauses=pauses, max_new_tokens=12, temperature=0))
    hook.remove()
    assert made == (expected[: expected.index(BYTES.eot_id)] if BYTES.eot_id in expected else expected)
    assert passes[0] == 8 + pauses and set(passes[1:]) <= {1}


def test_pause_and_padding_are_never_sampled():
    model = model_of({})
    with torch.no_grad():
        model.head.weight[BYTES.pause_id :] = 100 * model.head.weight.abs().max()
    for seed in range(20):
        assert all(i < BYTES.pause_id for i in stream(model, BYTES, "x", temperature=5.0, seed=seed, max_new_tokens=20))


def test_the_seed_decides_the_text():
    model = model_of({})
    once, again, other = (list(stream(model, BYTES, "x", seed=seed, max_new_tokens=20)) for seed in (1, 1, 2))
    assert once == again != other


def test_the_context_is_the_limit():
    model = model_of({}, block_size=16)
    with torch.no_grad():
        model.head.weight[BYTES.eot_id] = 0  # a logit of 0 is not the largest
    count = lambda prompt, **keys: len(list(stream(model, BYTES, prompt, temperature=0, **keys)))  # noqa: E731
    assert count("x" * 10, pauses=2, max_new_tokens=100) == 16 - 12 + 1
    assert count("x" * 16, max_new_tokens=100) == 1
    assert count("x" * 10, max_new_tokens=3) == 3
    with pytest.raises(UserError, match="17 tokens, and the model reads 16 at most"):
        next(stream(model, BYTES, "x" * 10, pauses=7))
    assert list(stream(model, BYTES, "", max_new_tokens=0)) == []


@pytest.mark.parametrize("key, value", [("pauses", -1), ("max_new_tokens", -1), ("temperature", -1.0), ("top_p", 2.0),
                                        ("temperature", float("nan")), ("top_k", -1), ("seed", 10**20)])  # fmt: skip
def test_a_number_out_of_its_range_is_named_before_the_first_token(key, value):
    with pytest.raises(UserError, match=f"{key}={value}".replace("+", "[+]")):
        stream(model_of({}), BYTES, "x", **{key: value})


def test_top_k_and_top_p_restrict():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = lambda k, p: {sample(logits, 1.0, k, p, torch.Generator().manual_seed(i)).item() for i in range(200)}  # noqa: E731
    assert drawn(0, 1.0) == {0, 1, 2, 3}
    assert drawn(2, 1.0) == {0, 1}
    assert drawn(0, 0.5) == {0}
    assert drawn(0, 0.79) == {0, 1}
    assert drawn(0, 0.81) == {0, 1, 2}
    assert drawn(0, 0.0) == {0}
    assert sample(logits, 0.0, 0, 1.0, torch.Generator()).item() == 0
    assert sample(logits, 1e-40, 0, 1.0, torch.Generator()).item() == 0
