"""Generation with the cache equals full forward passes, in any batch and under any schedule."""

import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.generation import runner
from nanopause.generation.sampling import Sampling, gumbel, sample
from nanopause.generation.scheduler import Scheduler
from nanopause.generation.sequence import Sequence
from nanopause.model import GPT, GPTConfig
from nanopause.policy import AfterPrompt, BelowConfidence, Never, OnRequest, StopWhenUseless
from nanopause.tokenizer import load_tokenizer
from nanopause.trace import page
from tests.conftest import ROOT

BYTES = load_tokenizer("bytes")
PAUSE, EOT = BYTES.pause_id, BYTES.eot_id
STYLES = {
    "gpt2": dict(position="learned", norm="layer", qk_norm=False, mlp="gelu", tied=True, bias=True),
    "llama": dict(position="rope", norm="rms", qk_norm=False, mlp="swiglu", n_kv_head=2),
    "modern": {},
}
PROMPTS = ["a prompt", "another, longer prompt", "x", "", "seven", "the last of six"]


def model_of(style="modern", block_size=64, std=0.3, sharpness=8.0):
    torch.manual_seed(0)
    shape = dict(vocab_size=BYTES.vocab_size, block_size=block_size, n_layer=2, n_head=4, n_embd=32, zero_init=False)
    model = GPT(GPTConfig(**shape, **STYLES[style])).eval()
    for parameter in model.parameters():  # untrained logits are too uniform to distinguish tokens
        torch.nn.init.normal_(parameter, std=std)
    with torch.no_grad():
        model.norm.weight *= sharpness
    return model


def engine_of(model, ahead=False, **options):
    """ahead: padded sizes and two steps scheduled ahead, as on a GPU."""
    engine = Engine(model, BYTES, **{"max_batch": 3, "chunk": 7} | options)
    engine.n_ahead, engine.runner.pads = 2 * ahead, ahead
    return engine


@torch.no_grad()
def make_end_and_pause_likely(model, attention="causal"):
    """Set head rows so that greedy decoding generates ends of text and pauses: the end of text becomes likelier than a
    frequent last token, a pause likelier than the most frequent token."""
    made = engine_of(model).generate(PROMPTS, temperature=0, max_new_tokens=12, attention=attention)
    generated = Counter(i for one in made for i in one.ids)
    [(favourite, _)] = generated.most_common(1)
    last, _ = Counter(one.ids[-1] for one in made if one.ids[-1] != favourite).most_common(1)[0]
    model.head.weight[EOT] = 1.02 * model.head.weight[last]
    model.head.weight[PAUSE] = 1.02 * model.head.weight[favourite]


@torch.no_grad()
def logprobs_without_cache(model, tokens, prefix=0, n_ids=PAUSE):
    """Log-probabilities of the next token by a full forward. The first `prefix` tokens attend to each other."""
    hi = torch.arange(1, len(tokens) + 1).clamp(min=prefix)[None].int()
    return model(torch.tensor([tokens]), lo=torch.zeros_like(hi), hi=hi)[0, -1, :n_ids].log_softmax(0)


def generate_without_cache(model, prompt, n, policy=None, prefix=False):
    """Greedy ids and the number of pauses before each, expected from Engine, by one full forward per token."""
    policy = policy or Never()
    tokens = BYTES.encode(prompt) or [EOT]
    ids, pauses, budget, n_prefix = [], [], policy.budget, len(tokens)
    while len(ids) < n:
        first = not ids
        logprobs = logprobs_without_cache(model, tokens, n_prefix if prefix else 0)
        m = policy.at_prompt if first else policy.per_token
        if prefix and first and not policy.certain:
            m = 0
        asks = logprobs_without_cache(model, tokens, n_prefix if prefix else 0, PAUSE + 1).argmax()[None] == PAUSE
        if not (
            m and m <= budget and len(tokens) + m <= model.config.block_size and policy.wants(logprobs[None], asks)
        ):
            m = 0
        tokens, budget = tokens + [PAUSE] * m, budget - m
        n_prefix += m if first else 0
        generated = logprobs_without_cache(model, tokens, n_prefix if prefix else 0).argmax().item()
        ids, pauses = [*ids, generated], [*pauses, m]
        if generated == EOT or len(tokens) == model.config.block_size:
            break
        tokens = [*tokens, generated]
    return ids, pauses


POLICIES = [Never(), AfterPrompt(10), BelowConfidence(0.7, 3), BelowConfidence(1.0, 2, budget=7),
            BelowConfidence(1.0, 5, budget=3), OnRequest(4, budget=20)]  # fmt: skip


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("prefix", [False, True], ids=["causal", "prefix-LM"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("style", STYLES)
def test_batched_generation_equals_full_forwards(style, policy, prefix, ahead):
    """More prompts than slots, prompts longer than a chunk, every policy."""
    model, attention = model_of(style), "prefix" if prefix else "causal"
    make_end_and_pause_likely(model, attention)
    made = engine_of(model, ahead).generate(PROMPTS, policy, temperature=0, max_new_tokens=12, attention=attention)
    expected = [generate_without_cache(model, prompt, 12, policy, prefix) for prompt in PROMPTS]
    assert [([token.id for token in one.tokens], [token.pauses for token in one.tokens]) for one in made] == expected
    if policy == Never():
        assert {one.end for one in made} == {"eot", "length"}
    assert (sum(one.pauses for one in made) > 0) == (policy.budget >= max(policy.at_prompt, 1))


@pytest.mark.parametrize("ahead", [False, True])
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    pauses=st.integers(0, 6),
    chunk=st.integers(1, 9),
    max_batch=st.integers(1, 4),
    n=st.integers(1, 6),
)
def test_output_does_not_depend_on_the_schedule(ahead, lengths, pauses, chunk, max_batch, n):
    model = model_of("llama", std=0.15, sharpness=1.0)
    prompts = ["".join(chr(97 + (i + j) % 26) for j in range(length)) for i, length in enumerate(lengths)]
    options = dict(temperature=0, max_new_tokens=n)
    made = engine_of(model, ahead, chunk=chunk, max_batch=max_batch).generate(prompts, pauses, **options)
    for prompt, one in zip(prompts, made):
        (alone,) = engine_of(model, chunk=64).generate([prompt], pauses, **options)
        assert [token[1:3] for token in one.tokens] == [token[1:3] for token in alone.tokens]
        expected = [token.logprob for token in alone.tokens]
        assert [token.logprob for token in one.tokens] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=30, deadline=None)
@given(
    schedule=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_ragged_appends_equal_one_forward(style, schedule, seed):
    """append with any number of tokens per sequence; logits equal those without a cache to 1e-5."""
    model = model_of(style, std=0.15, sharpness=1.0)
    engine = engine_of(model)
    generator = torch.Generator().manual_seed(seed)
    sequences, got = [[], [], []], [[], [], []]
    for counts in schedule:
        new = torch.randint(BYTES.vocab_size, (3, max(counts) + 1), generator=generator)
        x = model.head(engine.runner.append(new, torch.tensor(counts)))
        for b, count in enumerate(counts):
            sequences[b] += new[b, :count].tolist()
            got[b].append(x[b, :count])
    assert engine.runner.slots.length[:3].tolist() == [len(tokens) for tokens in sequences]
    for tokens, logits in zip(sequences, got):
        if tokens:
            with torch.no_grad():
                torch.testing.assert_close(torch.cat(logits), model(torch.tensor([tokens]))[0], atol=1e-5, rtol=0)


def test_prompt_and_pauses_are_one_forward():
    model, passes = model_of(), []
    hook = model.token_embedding.register_forward_hook(lambda module, args, out: passes.append(args[0].shape[1]))
    engine_of(model, chunk=64).generate(["a prompt"], 10, max_new_tokens=4, temperature=0)
    assert passes == [18, 1, 1, 1]
    del passes[:]
    engine_of(model, chunk=64).generate(["a prompt", "b"], 10, max_new_tokens=2, temperature=0)
    assert passes == [18 + 11, 1]
    del passes[:]
    engine = engine_of(model, ahead=True, max_batch=1)
    (made,) = engine.generate(["a"], BelowConfidence(1.0, 3), max_new_tokens=3, temperature=0)
    hook.remove()
    assert [token.pauses for token in made.tokens] == [3, 3, 3]
    assert passes == [4] * 3  # a token and its three pauses are one step


def test_pauses_in_one_step_equal_pauses_one_by_one():
    model = model_of("llama", std=0.15, sharpness=1.0)
    at_once, one_by_one = engine_of(model), engine_of(model)
    prompt = torch.tensor([BYTES.encode("a prompt")])
    pauses = torch.full((1, 10), PAUSE)
    together = at_once.runner.append(torch.cat((prompt, pauses), 1), torch.tensor([18]))[:, -1]
    one_by_one.runner.append(prompt, torch.tensor([8]))
    for _ in range(10):
        last = one_by_one.runner.append(pauses[:, :1], torch.tensor([1]))[:, -1]
    torch.testing.assert_close(model.head(together), model.head(last), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ahead", [False, True])
def test_sampled_text_does_not_depend_on_the_batch(ahead):
    model = model_of(std=0.1, sharpness=1.0)
    options = dict(pauses=2, temperature=1.0, top_p=0.95, top_k=200, max_new_tokens=20)
    together = engine_of(model, ahead, max_batch=4).generate(PROMPTS, seed=7, **options)
    alone = [engine_of(model).generate([prompt], seed=7 + i, **options)[0] for i, prompt in enumerate(PROMPTS)]
    other = engine_of(model, ahead, max_batch=4).generate(PROMPTS, seed=70, **options)
    assert [one.ids for one in together] == [one.ids for one in alone] != [one.ids for one in other]
    assert len({tuple(one.ids) for one in engine_of(model).generate(["x"] * 5, **options)}) == 5


def test_sampled_text_equals_a_loop_with_the_same_noise():
    model = model_of(std=0.1, sharpness=1.0)
    (made,) = engine_of(model).generate(["a prompt"], 3, temperature=0.9, max_new_tokens=20, seed=5)
    tokens = BYTES.encode("a prompt") + [PAUSE] * 3
    for place, token in enumerate(made.tokens):
        logprobs = logprobs_without_cache(model, tokens)[None]
        assert token.id == sample(logprobs, Sampling(0.9), torch.tensor([5]), torch.tensor([place])).item()
        tokens.append(token.id)


def test_token_after_a_requested_pause_is_unbiased():
    """Two tokens and a pause are equally likely, and after the pause the two tokens are. The token after the pause must
    be sampled with other noise than the request."""
    model = GPT(GPTConfig(vocab_size=BYTES.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.token_embedding.weight.abs_()
        model.head.weight.fill_(-10.0)
        model.head.weight[[97, PAUSE]] = 10.0
        model.head.weight[98] = 9.9
    made = engine_of(model, max_batch=8).generate(
        ["x"] * 1500, OnRequest(1), temperature=1000.0, top_k=3, max_new_tokens=1
    )
    generated = [token.id for one in made for token in one.tokens if token.pauses]
    assert len(generated) > 300
    assert abs(generated.count(97) - generated.count(98)) < 5 * math.sqrt(len(generated))


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_chunked_prefill_equals_whole_prompts(chunk):
    model = model_of()
    expected = [generate_without_cache(model, prompt, 8, AfterPrompt(6))[0] for prompt in PROMPTS]
    for ahead in (False, True):
        made = engine_of(model, ahead, chunk=chunk).generate(PROMPTS, 6, temperature=0, max_new_tokens=8)
        assert [[token.id for token in one.tokens] for one in made] == expected


@pytest.mark.parametrize("ahead, chunk, max_batch", [(False, 64, 1), (False, 3, 3), (True, 64, 3), (True, 5, 3)])
@pytest.mark.parametrize("prefix", [False, True], ids=["causal", "prefix-LM"])
@pytest.mark.parametrize("style", STYLES)
def test_logits_equal_full_forwards(style, prefix, ahead, chunk, max_batch, monkeypatch):
    """Log-probabilities of every token to 1e-5: prompts whole and in chunks, alone and in a batch."""
    model, policy = model_of(style, std=0.15, sharpness=1.0), AfterPrompt(6)
    monkeypatch.setattr(runner, "N_TOP", PAUSE)  # the trace then has all log-probabilities
    engine = engine_of(model, ahead, chunk=chunk, max_batch=max_batch)
    options = dict(temperature=0, max_new_tokens=6, attention="prefix" if prefix else "causal", trace=True)
    for prompt, generation in zip(PROMPTS, engine.generate(PROMPTS, policy, **options)):
        assert generation.pauses == 6
        tokens = (BYTES.encode(prompt) or [EOT]) + [PAUSE] * 6
        n_prefix = len(tokens) if prefix else 0
        for token in generation.tokens:
            truth = logprobs_without_cache(model, tokens, n_prefix)
            torch.testing.assert_close(torch.tensor([x for _, x in sorted(token.top)]), truth, atol=1e-5, rtol=0)
            tokens.append(token.id)


def test_prefill_is_first_come_first_served():
    """The third prompt, in the slot that the first one freed, waits for the second."""
    first = []
    for token in engine_of(model_of(), max_batch=2).stream(["a", 8 * "b", 20 * "c"], max_new_tokens=2):
        first += [token.sequence] * (token.sequence not in first)
    assert first == [0, 1, 2]


@pytest.mark.parametrize("ahead", [False, True])
def test_pauses_of_other_sequences_do_not_change_a_prefill(ahead):
    """13 tokens of the third prompt are prefilled into the slot where the first held 6, in the step of the last token
    and pauses of the second."""
    model, policy, prompts = model_of(std=0.15, sharpness=1.0), BelowConfidence(1.0, 2), ["a", 14 * "b", 40 * "c"]
    engine = engine_of(model, ahead, max_batch=2, chunk=16)
    *_, third = engine.generate(prompts, policy, temperature=0, max_new_tokens=2)
    (alone,) = engine.generate(prompts[2:], policy, temperature=0, max_new_tokens=2)
    assert third.ids == alone.ids
    for name in ("logprob", "logprob_without"):
        values = ([getattr(token, name) for token in one.tokens] for one in (third, alone))
        assert next(values) == pytest.approx(next(values), abs=1e-5)


def test_long_prefill_does_not_block_decoding():
    model = model_of()
    order = [token.sequence for token in engine_of(model, chunk=4).stream(["x", "y" * 40], max_new_tokens=12)]
    assert order.index(1) >= 8  # ten chunks, each step with a token of the first prompt


@pytest.mark.parametrize("ahead", [False, True])
def test_new_prompts_do_not_block_decoding(ahead):
    """The other sequences end at their first token, so that new prompts keep coming."""
    model = model_of()
    (first,) = engine_of(model).generate(["a prompt"], max_new_tokens=1, temperature=0)
    engine = engine_of(model, ahead, chunk=8)
    stream = engine.stream(["x", *12 * ["a prompt"]], max_new_tokens=4, temperature=0, until=[first.text])
    order = [token.sequence for token in stream]
    assert order.count(0) == 4 and order.index(0, 1) <= 4 and sorted(set(order)) == [*range(13)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_no_step_is_scheduled_beyond_the_last_token(ahead, n, monkeypatch):
    """Also if the host schedules steps ahead."""
    engine, steps, decode = engine_of(model_of(), ahead), [], runner.Runner.decode
    monkeypatch.setattr(runner.Runner, "decode", lambda self, *case: steps.append(case) or decode(self, *case))
    made = engine.generate(["x", "yy"], max_new_tokens=n, temperature=0)
    assert [len(one.tokens) for one in made] == [n, n] and len(steps) == n - 1


def test_token_trace_equals_full_forwards():
    model = model_of()
    policy = BelowConfidence(0.5, 3)
    (made,) = engine_of(model).generate(["a prompt"], policy, temperature=0, max_new_tokens=12, trace=True)
    tokens = BYTES.encode("a prompt")
    for token in made.tokens:
        without = logprobs_without_cache(model, tokens)
        tokens += [PAUSE] * token.pauses
        after = logprobs_without_cache(model, tokens)
        tokens += [token.id]
        assert (token.pauses > 0) == (without.max().exp() < 0.5).item()
        assert token.logprob == pytest.approx(after[token.id].item(), abs=1e-4)
        assert token.logprob_without == pytest.approx(without[token.id].item(), abs=1e-4)
        for top, truth in ((token.top, after), (token.top_without, without)):
            assert [i for i, _ in top] == truth.topk(5).indices.tolist()
            assert [x for _, x in top] == pytest.approx(truth.topk(5).values.tolist(), abs=1e-4)
    assert {token.pauses for token in made.tokens} == {0, 3}


def test_prefix_lm_has_no_logprobs_without_prompt_pauses():
    """Its prompt attends to the pauses."""
    for ahead in (False, True):
        for options in ({"attention": "prefix"}, {}):
            engine = engine_of(model_of(), ahead)
            (made,) = engine.generate(["a prompt"], 3, max_new_tokens=2, trace=True, **options)
            first, second = made.tokens
            assert math.isnan(first.logprob_without) == (not first.top_without) == bool(options)
            assert second.logprob_without == second.logprob and second.top_without == second.top
            text = page("", ["a prompt"], [made], BYTES)
            assert "after the pauses" in text and ("before the pauses" in text) == (not options)


@pytest.mark.parametrize("ahead, steps", [(False, 2), (True, 4)])
def test_no_pauses_are_fused_without_budget(ahead, steps):
    """The budget is for the prompt and two steps. The host knows that it is used up at once, or two steps later if it
    schedules ahead."""
    engine = engine_of(model_of(), ahead)
    (made,) = engine.generate(["ab"], BelowConfidence(1.0, 2, budget=7), max_new_tokens=9)
    assert [token.pauses for token in made.tokens] == [2] * 3 + [0] * 6
    assert engine.n_paused_decodes == steps


def test_scheduler_states_of_three_requests_in_two_slots():
    """Without a model."""
    sequences = [Sequence(i, [1] * length, seed=0) for i, length in enumerate((3, 9, 2))]
    scheduler = Scheduler(sequences, AfterPrompt(2), max_batch=2, max_length=64, chunk=8, max_new_tokens=2,
                          is_prefix_lm=False)  # fmt: skip
    states, steps = [], []
    while scheduler.waiting or scheduler.running:
        step = scheduler.schedule()
        steps.append([(chunk.sequence.index, chunk.start, chunk.stop, chunk.n_pauses) for chunk in step.prefill])
        states.append([sequence.state for sequence in sequences])
        for sequence in [sequence for sequence in scheduler.running if sequence.n_scheduled == 2]:
            scheduler.finish(sequence)
    assert steps == [[(0, 0, 3, 2), (1, 0, 3, 0)], [(1, 3, 9, 2)], [(2, 0, 2, 2)]]
    assert states == [["decode", "prefill", "waiting"], ["finished", "decode", "prefill"],
                      ["finished", "finished", "decode"]]  # fmt: skip


def test_step_runs_one_step():
    engine = engine_of(model_of(), chunk=64)
    engine.submit(["a", "b"], 3, max_new_tokens=3, temperature=0)
    tokens = []
    while not engine.is_finished:
        tokens.append([token.sequence for token in engine.step()])
    assert tokens == [[0, 1, 0, 1], [0, 1]] and engine.step() == []
    assert engine.n_paused_prompts == 2


# Ends of text and invalid input


def test_pause_and_padding_ids_are_never_generated():
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=64)
    model = GPT(GPTConfig(vocab_size=BYTES.vocab_size + 40, **shape)).eval()  # 40 padding ids
    with torch.no_grad():
        model.head.weight[PAUSE:] = 100.0
        model.norm.weight.abs_()
        model.token_embedding.weight.abs_()  # makes the logits of pause and padding large
        assert model(torch.tensor([[120]])).argmax() >= PAUSE
    for policy in (0, BelowConfidence(1.0, 1), OnRequest(1, budget=3)):
        for ahead in (False, True):
            made = engine_of(model, ahead).generate(["x"] * 6, policy, temperature=5.0, max_new_tokens=20)
            assert all(token.id < PAUSE for one in made for token in one.tokens)


def test_length_is_limited_by_the_context():
    model = model_of(block_size=16)
    with torch.no_grad():
        model.head.weight[EOT] = 0  # a logit of 0 is not the largest

    def count(prompt, pauses=0, **options):
        (made,) = engine_of(model).generate([prompt], pauses, temperature=0, **{"max_new_tokens": 100} | options)
        return len(made.tokens), made.pauses, made.end

    assert count("x" * 10, pauses=2) == (16 - 12 + 1, 2, "context")  # the last token is not an input
    assert count("x" * 16) == (1, 0, "context")
    assert count("x" * 10, max_new_tokens=3) == (3, 0, "length")
    assert count("x" * 10, max_new_tokens=0) == (0, 0, "length")
    assert count("", pauses=15) == (1, 15, "context")
    assert count("x" * 13, pauses=BelowConfidence(1.0, 2)) == (2, 2, "context")  # no room for two more
    assert count("x" * 15, pauses=BelowConfidence(1.0, 2)) == (2, 0, "context")
    assert count("x" * 10, max_new_tokens=2, pauses=OnRequest(7)) == (2, 0, "length")
    with pytest.raises(UserError, match=r"prompt 1 and its pauses are 10 \+ 7 tokens, and max_length is 16"):
        engine_of(model).stream(["x", "x" * 10], 7)
    with pytest.raises(UserError, match=r"prompt 0 and its pauses are 17 \+ 0 tokens"):
        engine_of(model).stream(["x" * 17], BelowConfidence(0.5, 1))
    assert engine_of(model, max_length=8).generate(["x" * 8], max_new_tokens=9)[0].end == "context"
    assert engine_of(model).generate([]) == []


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", [0, BelowConfidence(0.7, 3)], ids=repr)
def test_generation_ends_at_the_first_stop_text(policy, ahead):
    """Stop texts may span several tokens (here bytes) and characters."""
    model, options = model_of(), dict(temperature=2.0, max_new_tokens=30)
    with torch.no_grad():
        model.head.weight[128:EOT] *= 0.1  # mostly ASCII
        generated = Counter(i for one in engine_of(model).generate(PROMPTS, **options) for i in one.ids)
        model.head.weight[EOT] = 0.9 * model.head.weight[generated.most_common(1)[0][0]]
    whole = [one.ids for one in engine_of(model, ahead).generate(PROMPTS * 2, policy, **options)]
    stops = ["nowhere", "<|endoftext|>", *(BYTES.decode(ids[2 + i : 3 + i + i % 3]) for i, ids in enumerate(whole[:9]))]
    stops = [stop for stop in stops if stop and "\ufffd" not in stop]  # an incomplete character is not a text
    made = engine_of(model, ahead).generate(PROMPTS * 2, policy, until=stops, **options)
    for one, ids in zip(made, whole):
        ends = [n for n in range(len(ids) + 1) if any(stop.encode() in BYTES.decode_bytes(ids[:n]) for stop in stops)]
        assert one.ids == ids[: ends[0] if ends else None]
        assert (one.end == "until") == bool(ends)
    assert {"eot", "until"} <= {one.end for one in made}
    assert len({len(one.ids) for one in made if one.end == "until"}) > 2
    with pytest.raises(UserError, match="until takes a list of texts"):
        engine_of(model).stream(["x"], until="x")


@pytest.mark.parametrize("key, value", [("pauses", -1), ("max_new_tokens", -1), ("temperature", -1.0), ("top_p", 2.0),
                                        ("temperature", float("nan")), ("top_k", -1), ("seed", 10**20), ("pauses", 2.5),
                                        ("max_new_tokens", 3.0), ("seed", 0.5), ("pauses", True), ("seed", "1"),
                                        ("temperature", "hot"), ("temperature", None), ("top_p", [1]), ("top_k", "5"),
                                        ("pauses", "3"), ("max_new_tokens", None), ("until", ["", "zzz"]),
                                        ("until", [b"x"]), ("trace", "yes"), ("attention", ["causal"])])  # fmt: skip
def test_options_are_checked_before_the_first_token(key, value):
    with pytest.raises(UserError, match=re.escape(f"{key}={value!r}")):
        engine_of(model_of()).stream(["x"], **{key: value})


@pytest.mark.parametrize("make, text", [
    (lambda: BelowConfidence(1.5, 1), "threshold=1.5 must be 0 to 1"),
    (lambda: BelowConfidence(0.5, 0), "pauses=0 must be 1 to"),
    (lambda: OnRequest(1, budget=-1), "budget=-1 must be 0 to"),
    (lambda: OnRequest(1, budget=1.5), "budget=1.5 must be a whole number"),
    (lambda: engine_of(model_of()).stream([[1], [2.5]]), "prompt 1 is neither a text nor a list of token ids: .2.5."),
    (lambda: engine_of(model_of()).stream([None]), "prompt 0 is neither a text nor a list of token ids: None"),
    (lambda: engine_of(model_of()).stream(["x", "y"], seed=[1]), "1 seeds for 2 prompts: give one, or one per prompt"),
    (lambda: StopWhenUseless(Never(), min_count=1), "min_count=1 must be 2 to"),
    (lambda: StopWhenUseless(3), "policy=3 must be a policy"),
    (lambda: BelowConfidence("0.5", 1), "threshold='0.5' must be a number"),
    (lambda: engine_of(model_of()).generate(None), "generation takes a list of prompts, and it is None"),
    (lambda: engine_of(model_of()).stream(["x"], until=5), "until takes a list of texts, and it is 5"),
    (lambda: Engine(model_of(), BYTES, max_length=65), "max_length=65 must be 1 to 64"),
    (lambda: engine_of(model_of()).runner.append(torch.zeros(4, 1).long(), torch.ones(4).long()),
     "sequences=4 must be 1 to"),
    (lambda: engine_of(model_of()).stream(["x"], attention="both"), "attention='both' is neither"),
    (lambda: engine_of(model_of()).stream(["x"], StopWhenUseless(AfterPrompt(2)), attention="prefix"), "rolled back"),
])  # fmt: skip
def test_invalid_input_is_one_sentence(make, text):
    with pytest.raises(UserError, match=text):
        make()


@pytest.mark.parametrize("ahead", [False, True])
def test_new_stream_replaces_the_old_one(ahead):
    """The old one raises, and the new one is what it is alone. A refused one changes nothing."""
    engine, model = engine_of(model_of(), ahead), model_of()
    options = dict(temperature=0, max_new_tokens=5)
    first_alone, *second_alone = (
        [token.id for token in engine_of(model).generate([prompt], pauses, **options)[0].tokens]
        for prompt, pauses in (("a prompt", 5), ("b", BelowConfidence(1.0, 2)), ("cde", BelowConfidence(1.0, 2)))
    )
    first = engine.stream(["a prompt"], 5, **options)
    made = [next(first).id]
    for refused in (dict(until=[""]), dict(top_p=2), dict(prompts=["x" * 65]), dict(prompts=["x", 5])):
        with pytest.raises(UserError):
            engine.stream(**dict(prompts=["x"]) | refused)
    assert [*made, next(first).id] == first_alone[:2]
    second = engine.stream(["b", "cde"], BelowConfidence(1.0, 2), **options)
    tokens = [next(second)]
    with pytest.raises(UserError, match="one at a time"):
        next(first)
    tokens += second
    assert [[token.id for token in tokens if token.sequence == i] for i in range(2)] == second_alone
    with pytest.raises(UserError, match="a list of prompts"):
        engine.generate("hello")
    with pytest.raises(UserError, match="prompt 1 has a token id that is not 0 to 257"):
        engine.generate([[1], [258]])


def test_engine_is_usable_after_an_abandoned_stream():
    model = model_of()
    engine = engine_of(model)
    next(engine.stream(PROMPTS, max_new_tokens=50))
    again = engine.generate(PROMPTS, temperature=0, max_new_tokens=9)
    assert [one.ids for one in again] == [
        one.ids for one in engine_of(model).generate(PROMPTS, temperature=0, max_new_tokens=9)
    ]


ABANDONS = """
from nanopause.engine import Engine
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

model = GPT(GPTConfig(vocab_size=258, block_size=16, n_layer=1, n_head=2, n_embd=8))
stream = Engine(model, load_tokenizer("bytes")).stream(["a"])
next(stream)
"""


def test_program_may_exit_during_a_stream():
    """Python then closes the stream after PyTorch is unloaded."""
    ended = subprocess.run([sys.executable, "-c", ABANDONS], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "Exception" not in ended.stderr


# Sampling


def test_noise_is_finite():
    """A uniform number with more than 24 bits would round to 1, whose noise is infinite."""
    noise = gumbel(torch.arange(400), torch.zeros(400, dtype=torch.int64), 50_304)
    assert noise.isfinite().all() and noise.max() > 15


def test_top_k_and_top_p_restrict():
    logprobs = torch.tensor([[0.3, 0.5, 0.05, 0.15]]).log()

    def drawn(temperature, top_k, top_p):
        seeds, places = torch.arange(200), torch.zeros(200, dtype=torch.int64)
        return set(sample(logprobs.expand(200, 4), Sampling(temperature, top_k, top_p), seeds, places).tolist())

    assert drawn(1.0, 0, 1.0) == {0, 1, 2, 3}
    assert drawn(1.0, 2, 1.0) == {0, 1}
    assert drawn(1.0, 9, 1.0) == {0, 1, 2, 3}
    assert drawn(1.0, 0, 0.49) == {1}
    assert drawn(1.0, 0, 0.79) == {0, 1}
    assert drawn(1.0, 0, 0.81) == {0, 1, 3}
    assert drawn(1.0, 0, 0.0) == {1}
    assert drawn(0.0, 0, 1.0) == {1}
    assert drawn(1e-40, 0, 1.0) == {1}


def test_samples_are_unbiased_and_independent():
    """χ² within 5 standard deviations, over seeds, over positions, and over pairs of neighbouring ones."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    numbers, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    by_seed, by_place = (
        sample(p.log().expand(n, 4), Sampling(1.0), *noise) for noise in ((numbers, zeros), (zeros, numbers))
    )
    pairs = torch.outer(p, p).flatten()
    for drawn, probability in (
        (by_seed, p), (by_place, p), (4 * by_seed + by_place, pairs), (4 * by_seed[1:] + by_seed[:-1], pairs),
        (4 * by_place[1:] + by_place[:-1], pairs),
    ):  # fmt: skip
        counts, expected = drawn.bincount(minlength=len(probability)), len(drawn) * probability
        chi2, free = ((counts - expected) ** 2 / expected).sum(), len(probability) - 1
        assert abs(chi2 - free) < 5 * math.sqrt(2 * free)


# Turning pauses off


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("inner", [AfterPrompt(4), BelowConfidence(1.0, 2), OnRequest(2)], ids=repr)
def test_stop_when_useless_measures_and_stops(inner, ahead):
    model = model_of()
    make_end_and_pause_likely(model)
    policy = StopWhenUseless(inner, min_change=1e6, min_count=6)
    made = engine_of(model, ahead).generate([*PROMPTS, *PROMPTS], policy, temperature=0, max_new_tokens=12)
    gains = [abs(token.logprob - token.logprob_without) for one in made for token in one.tokens if token.pauses]
    # Several sequences of a step may reach the count together.
    assert 6 <= len(gains) <= 8
    mean, deviation = sum(gains) / len(gains), torch.tensor(gains).double().std().item()
    got_mean, got_bound = (x.item() for x in policy._mean_and_bound())
    assert got_mean == pytest.approx(mean, abs=1e-4)
    assert got_bound == pytest.approx(3 * deviation / math.sqrt(len(gains)), abs=1e-4)
    assert f"pausing turned off after {len(gains)} times" in policy.report()
    later = engine_of(model, ahead).generate(PROMPTS, policy, temperature=0, max_new_tokens=12)
    never = engine_of(model, ahead).generate(PROMPTS, 0, temperature=0, max_new_tokens=12)
    assert [one.ids for one in later] == [one.ids for one in never]


def test_stop_when_useless_forwards_measurements_to_its_policy():
    class Counts(BelowConfidence):
        seen = 0

        def observe(self, gain, paused):
            self.seen += int(paused.sum())

        def is_off(self):
            return torch.tensor(self.seen >= 5)

    policy = Counts(1.0, 2)
    (made,) = engine_of(model_of()).generate(["a prompt"], StopWhenUseless(policy), max_new_tokens=9)
    assert policy.seen == 5 and [token.pauses for token in made.tokens] == [2] * 5 + [0] * 4


def test_useful_pauses_are_kept():
    model = model_of()
    policy = StopWhenUseless(BelowConfidence(1.0, 2), min_change=0.01, min_count=6)
    made = engine_of(model).generate(PROMPTS, policy, temperature=0, max_new_tokens=12)
    assert Counter(token.pauses for one in made for token in one.tokens) == {2: sum(len(one.tokens) for one in made)}
    assert "left on" in policy.report()
    assert "not measured" in StopWhenUseless(Never()).report()


# On a GPU

GPU_OPTIONS = [{}, {"attention": "prefix"}, {"temperature": 0.9, "top_k": 100, "top_p": 0.9}, {"trace": True}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and synchronisation need a GPU")
@pytest.mark.parametrize("options", GPU_OPTIONS, ids=repr)
@pytest.mark.parametrize("policy", [*POLICIES, StopWhenUseless(BelowConfidence(1.0, 2), min_change=1e6)], ids=repr)
def test_gpu_replays_graphs_without_synchronisation(policy, options):
    model, options = model_of(), {"temperature": 0, "max_new_tokens": 12} | options
    expected = engine_of(model).generate(PROMPTS, replace(policy), **options)
    engine = Engine(model.cuda(), BYTES, max_batch=3, chunk=7)
    for replayed in (False, True):
        torch.cuda.set_sync_debug_mode("error" if replayed and not isinstance(policy, StopWhenUseless) else "default")
        try:
            made = engine.generate(PROMPTS, policy, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not isinstance(policy, StopWhenUseless):  # in the second run it is off from the start
            assert [one.ids for one in made] == [one.ids for one in expected]
