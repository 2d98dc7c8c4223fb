"""evaluate.py and nanopause/evaluation.py: answers, scores, costs, resumption, lm-evaluation-harness."""

import functools
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanopause import checkpoint, evaluation
from nanopause.config import load_config
from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.evaluation import (
    Cell,
    Decoding,
    add_row,
    claim,
    new_tokens,
    read_rows,
)
from nanopause.finetune import encode, pack
from nanopause.intervals import mcnemar, wilson
from nanopause.model import GPT, GPTConfig
from nanopause.policy import BelowConfidence
from nanopause.results import format_figure, paired_difference
from nanopause.scoring import choice_flops, generation_flops
from nanopause.scripts import evaluate
from nanopause.tasks import TASKS, Example, load
from nanopause.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.test_engine import model_of
from tests.test_train import TORCHRUN

BYTES = load_tokenizer("bytes")
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=96"]
ANSWERS = ["Oslo", "the Nile", "red", "Mars", "seven", "iron", "a whale", "Lima"]
ROWS = [{"question": f"{i}{i}?", "answer": [answer]} for i, answer in enumerate(ANSWERS)]
HARNESS = [{"prompt": f"Question: {i}{i}?\nAnswer:", "answer": answer} for i, answer in enumerate(ANSWERS)]
CHOICES = [{"goal": f"{i}{i}?", "sol1": ANSWERS[i], "sol2": "nothing", "label": i % 2} for i in range(6)]


def in_order(answers):
    return sorted(answers, key=lambda answer: answer["index"])


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that has memorised the answers of ROWS without pauses after the question; and the tasks."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = load_config(SHAPE)
    torch.manual_seed(0)
    model = GPT(config.gpt(BYTES.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    texts = [[*BYTES.encode(f"Question: {row['question']}\nAnswer: {row['answer'][0]}"), BYTES.eot_id] for row in ROWS]
    width = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    targets = tokens[:, 1:].clone()
    for row, text in zip(targets, texts):
        row[len(text) - 1 :] = -100
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 150)  # converged: independent of rounding
        loss = model(tokens[:, :-1], targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1  # nearly all of it from the questions' numbers, which cannot be predicted
    checkpoint.save(folder / "run", 150, model, [optimizer], config)
    (folder / "data").mkdir()
    write(folder / "data" / "webq_test.jsonl", ROWS)
    write(folder / "data" / "piqa_val.jsonl", CHOICES)
    return folder


@pytest.fixture(scope="module")
def model(run_folder):
    return checkpoint.load(run_folder / "run", torch.device("cpu"))[0]


@pytest.fixture
def run(run_folder, monkeypatch, capsys):
    def run(results, *arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--out_dir={run_folder / 'run'}", f"--results={results}",
                                          f"--data_dir={run_folder / 'data'}", "--device=cpu", *arguments])  # fmt: skip
        evaluate.main()
        return capsys.readouterr().out

    return run


def test_results_of_two_tasks_and_three_numbers_of_pauses(run, run_folder, tmp_path):
    output = run(tmp_path, "--tasks=webq,piqa", "--pauses=10,0,3")
    rows = read_rows(tmp_path / "examples.jsonl")
    assert sorted((row["task"], row["pauses"], row["index"]) for row in rows) == sorted(
        (task, pauses, i) for task, n in (("webq", 8), ("piqa", 6)) for pauses in (0, 3, 10) for i in range(n)
    )
    first = next(row for row in rows if (row["task"], row["pauses"], row["index"]) == ("webq", 0, 1))
    prompt = "Question: 11?\nAnswer:"
    assert first["prompt"] == prompt and first["outputs"] == [" the Nile"] and first["answers"] == ["the Nile"]
    assert first["references"] == ["the Nile"] and first["scores"] == {"exact_match": 1.0} and first["ends"] == ["eot"]
    assert first["tokens"] == {"prompt": len(prompt), "cut": 0, "generated": len(" the Nile") + 1, "pauses": 0,
                               "limit": 48}  # fmt: skip
    assert first["seconds"] > 0

    written = json.loads((tmp_path / "results.json").read_text())
    results = {(row["task"], row["pauses"]): row for row in written["results"]}
    assert list(results) == [(task, pauses) for task in ("webq", "piqa") for pauses in (0, 3, 10)]
    low = pytest.approx(0.6756, abs=5e-5)
    assert results["webq", 0]["metrics"] == {"exact_match": {"value": 1.0, "low": low, "high": 1.0}}
    for (task, pauses), result in results.items():
        examples = [row for row in rows if (row["task"], row["pauses"]) == (task, pauses)]
        for metric, figure in result["metrics"].items():
            values = [row["scores"][metric] for row in examples]
            n, p = len(values), sum(values) / len(values)
            assert figure["value"] == pytest.approx(p)
            assert (figure["low"], figure["high"]) == wilson(round(n * p), n)  # every score is 0 or 1
        assert result["n"] == len(examples) and ("difference" in result) == (pauses > 0)
        assert result["flops_per_example"] == sum(row["flops"] for row in examples) / len(examples)
        seconds = sum(row["seconds"] for row in examples) / len(examples)
        assert result["seconds_per_example"] == pytest.approx(seconds)
    gain = results["webq", 10]["metrics"]["exact_match"]["value"] - 1
    assert results["webq", 10]["difference"]["value"] == pytest.approx(gain)
    assert results["webq", 10]["difference"]["p"] == mcnemar(0, round(-8 * gain))
    assert written["settings"]["step"] == 150 and written["settings"]["attention"] == "causal"
    assert written["checkpoint"]["model"]["n_embd"] == 64 and "torch" in written["versions"]
    assert (tmp_path / "pauses.png").read_bytes()[:4] == b"\x89PNG"
    assert "exact_match 1.0000 [0.6756, 1.0000]" in output and "batch size 8, cpu" in output
    for line in ("loading the model", "reading webq", "webq, 0 pauses: starts", "computing the intervals"):
        assert f"\n{line}" in f"\n{output}"  # whatever can take seconds is announced
    assert "brackets: 95% intervals: Wilson's where every score is 0 or 1" in output and "±" not in output

    # The same command evaluates nothing; more pauses add to the results.
    before = (tmp_path / "examples.jsonl").read_bytes()
    assert "42 of 42 examples are in" in run(tmp_path, "--tasks=webq,piqa", "--pauses=0,3,10")
    assert (tmp_path / "examples.jsonl").read_bytes() == before
    run(tmp_path, "--tasks=webq", "--pauses=1")
    added = (tmp_path / "examples.jsonl").read_bytes()
    assert added.startswith(before) and len(added.splitlines()) == 50
    grown = {
        (row["task"], row["pauses"]): row for row in json.loads((tmp_path / "results.json").read_text())["results"]
    }
    assert {key: grown[key] for key in results} == results and grown["webq", 1]["difference"]["value"] <= 0
    assert list(grown) == [("webq", m) for m in (0, 1, 3, 10)] + [("piqa", m) for m in (0, 3, 10)]


def test_results_of_examples_with_other_labels_are_refused(run, run_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write(data / "piqa_val.jsonl", CHOICES)
    arguments = ["--tasks=piqa", "--pauses=0", f"--data_dir={data}"]
    run(tmp_path / "results", *arguments)
    write(data / "piqa_val.jsonl", [{**row, "label": 1 - row["label"]} for row in CHOICES])
    with pytest.raises(UserError, match="has an example . of piqa that is not in this data"):
        run(tmp_path / "results", *arguments)


def test_answers_at_their_length_limit_are_counted(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "new_tokens", lambda *_: 2)
    assert "; 8 answers reached their limit of 2 tokens" in run(tmp_path, "--tasks=webq", "--pauses=0")


def test_torchrun_is_refused(run_folder, tmp_path):
    command = [*TORCHRUN, "evaluate.py", f"--out_dir={run_folder / 'run'}", "--tasks=webq", "--device=cpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode and "evaluate.py is one process, not 2: start it without torchrun" in ended.stderr


def test_answers_do_not_depend_on_the_batch_size(run_folder):
    """With a random model, as its answers differ with and without pauses."""
    model = model_of(block_size=128)
    examples = load(TASKS["webq"], "test", run_folder / "data")[0]
    for attention, pauses in (("causal", 0), ("causal", 4), ("prefix", 4)):
        by_batch_size = []
        for batch_size in (1, 5):
            cell = Cell(model, BYTES, TASKS["webq"], examples, pauses, attention, batch_size)
            engine = Engine(model, BYTES, batch_size, cell.max_length())
            by_batch_size.append(in_order(cell.answers(list(range(8)), engine)))
        assert by_batch_size[0] == by_batch_size[1]
        assert len({answer["outputs"][0] for answer in by_batch_size[0]}) == 8


class WithBos:
    """BYTES with a beginning-of-text token."""

    bos_id = BYTES.eot_id

    def __getattr__(self, name):
        return getattr(BYTES, name)


@pytest.mark.parametrize("tokenizer", [BYTES, WithBos()], ids=["bytes", "with BOS"])
@pytest.mark.parametrize("position", ["append", "prepend"])
@pytest.mark.parametrize("cut", ["left", "right"])
def test_prompts_are_encoded_as_in_finetuning(model, tokenizer, position, cut):
    """Prompts of generated answers and of choices, complete and cut."""
    long = {"question": "why " * 40, "answer": ["so"]}
    examples = TASKS["webq"].examples(ROWS[0]) + TASKS["webq"].examples(long)
    cell = Cell(model, tokenizer, TASKS["webq"], examples, 7, "causal", 4, position, cut)
    block_size = cell.room + len(" so") + 1
    for example in examples:
        trained = encode(Example(example.prefix, " so", ()), tokenizer, block_size, 7, position, cut)
        assert cell.prompt(example.prefix, cell.room) == (trained.prompt, trained.n_cut)
        assert (trained.n_cut > 0) == (example is examples[1])
    pauses = 7 * [BYTES.pause_id]
    n_bos = tokenizer.bos_id is not None
    assert trained.prompt[n_bos:][:7] == pauses if position == "prepend" else trained.prompt[-7:] == pauses
    assert trained.prompt[0] == BYTES.eot_id or not n_bos

    choices = TASKS["piqa"].examples({**CHOICES[0], "goal": "why " * 40})
    cell = Cell(model, tokenizer, TASKS["piqa"], choices, 7, "prefix", 4, position, cut)
    (answer,) = cell.answers([0], None)
    for choice, log_likelihood in zip(choices[0].choices, answer["log_likelihoods"]):
        pair = encode(Example(choices[0].prefix, choice, ()), tokenizer, 98, 7, position, cut)
        batch = pack([pair], BYTES.pause_id, "prefix")
        inputs, targets, *layout = (x[:, :-1] for x in (batch.inputs, batch.targets, *batch.layout.values()))
        loss = model(inputs, targets, reduction="sum", **dict(zip(batch.layout, layout)))  # without the end of text
        assert log_likelihood == pytest.approx(-loss.item(), abs=1e-4) and pair.n_cut > 0


def test_choices_have_the_likelihoods_of_the_harness(model, run_folder):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from nanopause.harness import Harness

    examples = load(TASKS["piqa"], "test", run_folder / "data")[0]
    pairs = [(example.prefix, choice) for example in examples for choice in example.choices]
    for pauses, attention in ((0, "causal"), (3, "prefix"), (70, "causal")):  # the last one cuts prompts
        cell = Cell(model, BYTES, TASKS["piqa"], examples, pauses, attention, 4)
        answers = in_order(cell.answers(list(range(len(examples))), None))
        lm = Harness(model, BYTES, pauses, 4, attention)
        expected = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        values = [value for answer in answers for value in answer["log_likelihoods"]]
        assert values == pytest.approx([value for value, _ in expected], abs=1e-5)
        row = cell.scored(answers[0])
        assert row["scores"]["accuracy"] == float((values[0] > values[1]) == (examples[0].label == 0))
        assert (lm.n_cut > 0) == (pauses == 70) == (answers[0]["tokens"]["cut"] > 0)


def test_killed_evaluation_continues(run, run_folder, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(run_folder / "data" / "nq_open_dev.jsonl", [ROWS[i % 8] for i in range(60)])
    arguments = ["--tasks=nq", "--pauses=0,2", "--batch_size=2"]
    command = [sys.executable, "evaluate.py", f"--out_dir={run_folder / 'run'}", f"--results={broken}",
               f"--data_dir={run_folder / 'data'}", "--device=cpu", *arguments]  # fmt: skip
    file = broken / "examples.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_before = file.read_bytes().count(b"\n")
    assert 5 <= n_before < 120
    with open(file, "a") as stream:
        stream.write('{"task": "nq", "index": 59, "pau')  # an incomplete line
    assert f"{n_before} of 120 examples are in" in run(broken, *arguments)
    run(whole, *arguments)

    def answers(folder):
        rows = read_rows(folder / "examples.jsonl")
        return sorted((row["pauses"], row["index"], row["outputs"]) for row in rows)

    assert answers(broken) == answers(whole) and len(answers(whole)) == 120


@pytest.mark.parametrize("change, sentence", [
    (["--limit=3"], "has results with limit=None, not limit=3: choose another --results"),
    (["--attention=prefix"], "attention=causal, not attention=prefix"),
    (["--batch_size=3"], "batch_size=8"),
    (["--split=validation"], "needs|split"),
    (["--tasks=webqq"], "task 'webqq' is not known: did you mean 'webq'"),
    (["--tasks="], "nothing to evaluate"),
    (["--pauses=0,ten"], "must be whole numbers with commas, such as 0,10,50, not 'ten'"),
    (["--pauses=-1"], "not '-1'"),
    (["--pauses=90"], "90 pauses leave no room for a prompt of webq, as block_size is 96 tokens and 48 of them are"),
    (["--data_dir=/nowhere"], "data_dir /nowhere is not a folder"),
    (["--limit=0"], "limit=0 must be 1 to"),
    (["--out_dir=nothing/here"], "'nothing/here' is not a folder and cannot be downloaded from the hub"),
])  # fmt: skip
def test_invalid_settings_are_one_sentence(run, tmp_path, change, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(tmp_path, "--tasks=webq")
    with pytest.raises(UserError, match=sentence) as error:
        run(tmp_path, "--tasks=webq", *change)
    assert "\n" not in str(error.value)


def test_results_with_other_data_or_weights_are_refused(run, run_folder, tmp_path):
    run(tmp_path / "a", "--tasks=webq")
    write(tmp_path / "webq_test.jsonl", ROWS[::-1])
    with pytest.raises(UserError, match="has an example . of webq that is not in this data"):
        run(tmp_path / "a", "--tasks=webq", f"--data_dir={tmp_path}")
    (tmp_path / "webq_test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no example for test"):
        run(tmp_path / "a", "--tasks=webq", f"--data_dir={tmp_path}")
    with pytest.raises(UserError, match="weights=1, not weights=2"):
        [claim(tmp_path / "b", {"weights": weights}) for weights in (1, 1, 2)]


def test_json_lines_survive_a_kill_at_every_byte(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    add_row(file, {"a": "line\u2028break\n"})
    add_row(file, {"a": 2})
    whole = file.read_bytes()
    for end in range(1, len(whole)):
        file.write_bytes(whole[:end])
        n = whole[:end].count(b"\n")
        assert len(read_rows(file)) == n and file.read_bytes().count(b"\n") == n
    file.write_bytes(b"{broken\n" + whole)
    with pytest.raises(UserError, match="line 1, is damaged"):
        read_rows(file)


def test_answer_is_the_first_line_that_is_not_blank(tmp_path):
    """The model generates two line feeds, letters and a line feed."""
    config = GPTConfig(vocab_size=258, block_size=64, n_layer=1, n_head=1, n_embd=8, position="learned", tied=False)
    model = GPT(config).eval()
    prefix = "Question: q\nAnswer:"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        for i, character in enumerate("\n\nok\n"):  # each position predicts one character
            model.position_embedding.weight[len(prefix) - 1 + i, i] = 1.0
            model.head.weight[ord(character), i] += 1.0
    examples = TASKS["webq"].examples({"question": "q", "answers": ["ok"]})
    cell = Cell(model, BYTES, TASKS["webq"], examples, 0)
    (answer,) = cell.answers([0], Engine(model, BYTES, 1, 64))
    assert answer["outputs"][0].startswith("\n\nok\n") and cell.scored(answer)["scores"] == {"exact_match": 1.0}


def test_policy_pauses_equal_the_engine(run, model, tmp_path):
    """Outputs and costs equal those of the engine; a policy that never pauses equals no policy."""
    output = run(tmp_path, "--tasks=webq", "--pauses=0,2", "--pause_when=below_confidence", "--threshold=1",
                 "--pause_budget=9", "--stop_when_useless")  # fmt: skip
    rows = {(row["pauses"], row["index"]): row for row in read_rows(tmp_path / "examples.jsonl")}
    prompts = [rows[0, i]["prompt"] for i in range(8)]
    for pauses, policy in ((0, 0), (2, BelowConfidence(1.0, 2, 9))):
        engine = Engine(model, BYTES, 8, 96)
        made = engine.generate(prompts, policy, temperature=0, max_new_tokens=48, until=["\n"])
        for i, one in enumerate(made):
            assert rows[pauses, i]["outputs"] == [one.text], (pauses, i)
            assert rows[pauses, i]["tokens"]["pauses"] == one.pauses == (0 if pauses == 0 else 8)
            flops = generation_flops(model.config, len(prompts[i]), [token.pauses for token in one.tokens])
            assert rows[pauses, i]["flops"] == flops
    assert "webq, 0 pauses: exact_match 1.0000 [0.6756, 1.0000]\n" in output
    assert "; 8 pauses per example; pausing " in output
    assert "in all" in output
    with pytest.raises(UserError, match="has results with policy="):
        run(tmp_path, "--tasks=webq", "--pauses=0", "--pause_when=below_confidence", "--pause_budget=8")
    run(tmp_path / "never", "--tasks=webq", "--pauses=2", "--pause_when=below_confidence", "--threshold=0",
        "--pause_budget=9")  # fmt: skip
    never = {row["index"]: row for row in read_rows(tmp_path / "never" / "examples.jsonl")}
    assert all(never[i]["outputs"] == rows[0, i]["outputs"] and not never[i]["tokens"]["pauses"] for i in range(8))


def test_samples_have_mean_scores_and_do_not_depend_on_the_batch(run, model, run_folder, tmp_path):
    arguments = ["--tasks=webq", "--pauses=3", "--samples=4", "--temperature=1.5"]
    run(tmp_path / "a", *arguments)
    rows = {row["index"]: row for row in read_rows(tmp_path / "a" / "examples.jsonl")}
    assert all(len(row["outputs"]) == len(row["answers"]) == len(row["ends"]) == 4 for row in rows.values())
    assert len({output for row in rows.values() for output in row["outputs"]}) > 16
    for i, row in rows.items():
        assert row["scores"]["exact_match"] == sum(a == ANSWERS[i] for a in row["answers"]) / 4
        assert row["tokens"]["pauses"] == 12
    lines = (tmp_path / "a" / "examples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "examples.jsonl").write_text("".join(lines[:3]))
    run(tmp_path / "a", *arguments)
    again = {row["index"]: row for row in read_rows(tmp_path / "a" / "examples.jsonl")}
    assert all(again[i]["outputs"] == rows[i]["outputs"] for i in range(8))
    run(tmp_path / "b", *arguments, "--seed=1")
    assert read_rows(tmp_path / "b" / "examples.jsonl")[0]["outputs"] not in [row["outputs"] for row in rows.values()]


def test_pass_at_k(model):
    """Programs are executed in the sandbox; one of three passes, then two of three."""
    row = {"task_id": 11, "text": "Add.", "code": "def f(a, b):\n    return a + b", "test_setup_code": "",
           "test_list": ["assert f(1, 2) == 3", "assert f(0, -1) == -1"]}  # fmt: skip
    programs = ["\ndef f(a, b):\n    return b + a", "def f(a, b): return 3", "\nf = lambda *x: sum(x)[DONE] why"]
    task = TASKS["mbpp"].permitted(True)
    decoding = Decoding(3, 0.8, pass_at=(1, 2, 3))
    cell = Cell(model, BYTES, task, task.examples(row), 0, decoding=decoding)
    answer = {"index": 0, "outputs": [*programs[:2], programs[2].replace("sum(x)", "sum(x[:1])")]}
    assert cell.scored(answer)["scores"] == {
        "pass@1": pytest.approx(1 / 3),
        "pass@2": pytest.approx(2 / 3),
        "pass@3": 1,
    }
    assert cell.scored({"index": 0, "outputs": programs})["scores"] == {
        "pass@1": pytest.approx(2 / 3),
        "pass@2": 1,
        "pass@3": 1,
    }


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--samples=3"], "--samples=3 would all be the same, greedy text: add --temperature=0.8, say"),
        (["--samples=0"], "samples=0 must be 1 to 10000"),
        (["--samples=2", "--temperature=1", "--pass_at=3"], "pass_at=3 must be 1 to 2"),
        (["--pass_at=1"], "--pass_at is for answers that are programs"),
        (["--top_p=2"], "top_p=2.0 must be 0 to 1"),
        (["--tasks=piqa", "--stop_when_useless"], "piqa is scored by likelihood, and nothing is generated"),
        (["--tasks=piqa", "--samples=2", "--temperature=1"], "piqa is scored by likelihood, and nothing is generated"),
        (["--tasks=piqa", "--temperature=1"], "piqa is scored by likelihood, and nothing is generated"),
        (["--harness=arc_easy", "--pause_when=on_request"], "are for --tasks: leave out --harness"),
        (["--harness=arc_easy", "--temperature=1"], "are for --tasks: leave out --harness"),
        (["--pause_position=prepend", "--pause_when=below_confidence"], "--pause_position is for pauses in prompts"),
        (["--pauses=", "--pause_when=below_confidence"], "need numbers of pauses: add --pauses=0,5, say"),
        (["--pauses=7", "--pause_when=on_request", "--pause_budget=6"], "pause_budget=6 is less than the 7 pauses"),
        (["--threshold=0.3"], "threshold=0.3 is of below_confidence: add --pause_when=below_confidence"),
        (["--stop_when_useless", "--attention=prefix"], "pauses after the prompt cannot be rolled back"),
        (["--pause_when=on_request"], "100 pauses leave no room for a prompt of webq, as block_size is 96 tokens"),
        (["--pause_when=below_confidence", "--threshold=2", "--pause_budget=4"], "threshold=2.0 must be 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(run, tmp_path, arguments, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        run(tmp_path / "results", "--tasks=webq", "--pauses=2", *arguments)
    assert not (tmp_path / "results").exists()


def test_flops_by_hand():
    config = GPTConfig(vocab_size=10, block_size=32, n_layer=1, n_head=1, n_embd=2, n_mlp=8, mlp="gelu")
    # Per token: projections 2·2·(2 + 2)·2, MLP 2·2·8·2. Per key attended to: 4·1·2. Logits per position: 2·2·10.
    token, key, logits = 32 + 64, 8, 40
    assert generation_flops(config, 5, [0]) == 5 * (token + 5 * key) + logits
    assert generation_flops(config, 5, 3 * [0]) == generation_flops(config, 5, [0]) + 2 * (token + logits) + 13 * key
    # 4 pauses after the prompt and 2 after the first token: two positions with logits each, and more keys later
    paused = generation_flops(config, 5, [4, 2, 0]) - generation_flops(config, 9, [0]) - logits
    assert paused == 3 * (token + 12 * key) + 2 * logits + (token + logits + 13 * key)
    assert choice_flops(config, 5, 3) == 7 * (token + 7 * key) + 3 * logits


def test_new_tokens_are_scaled_to_the_tokenizer():
    examples = TASKS["webq"].examples({"question": "who was it", "answers": ["Ada Lovelace"]})
    text = examples[0].prefix + examples[0].target
    gpt2 = load_tokenizer("gpt2")
    assert new_tokens(TASKS["webq"], examples, gpt2) == 64
    assert new_tokens(TASKS["webq"], examples, BYTES) == math.ceil(64 * len(text) / len(gpt2.encode(text)))
    assert new_tokens(TASKS["piqa"], examples, BYTES) == 0


def test_numbers_are_sorted_and_distinct():
    assert evaluation.numbers("pauses", "10, 0,3,3") == [0, 3, 10]


def test_long_prompts_are_cut_and_counted(run, tmp_path):
    write(tmp_path / "webq_test.jsonl", [{"question": "long " * 30, "answer": ["x"]}, ROWS[0]])
    output = run(tmp_path / "results", "--tasks=webq", f"--data_dir={tmp_path}")
    assert "1 of 2 prompts cut to fit" in output
    (row,) = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert row["n_cut"] == 1 and row["max_new_tokens"] == 48  # half of block_size
    rows = {row["index"]: row["tokens"] for row in read_rows(tmp_path / "results" / "examples.jsonl")}
    assert rows[0]["prompt"] == 48 and rows[0]["cut"] == len("Question: \nAnswer:") + 149 - 48 and rows[1]["cut"] == 0


def test_harness_tasks(run, model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from nanopause import harness

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"q": row["prompt"], "choices": [row["answer"], "zzz"], "label": i // 6} for i, row in enumerate(HARNESS)]
    write(tmp_path / "mine.jsonl", rows)
    task = {
        "task": "mine", "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
        "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}], "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "mine.jsonl")}, "cache_dir": str(tmp_path / "cache")},
    }  # fmt: skip
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "mine.yaml").write_text(json.dumps(task))
    arguments = ["--harness=mine", f"--harness_path={tmp_path / 'yaml'}", "--pauses=0,2", "--tasks=webq"]
    output = run(tmp_path / "results", *arguments)
    results = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert [(row["task"], row["by"], row["pauses"]) for row in results] == [
        ("webq", "nanopause", 0), ("webq", "nanopause", 2), ("mine", "harness", 0), ("mine", "harness", 2)
    ]  # fmt: skip
    low, high = wilson(6, 8)
    assert results[2]["metrics"]["acc"] == {"value": 0.75, "low": low, "high": high}
    (line, paused) = read_rows(tmp_path / "results" / "harness.jsonl")  # with the harness's own standard error
    stderr = pytest.approx(math.sqrt(0.75 * 0.25 / 7))
    scores = 6 * [1.0] + 2 * [0.0]
    assert line["results"][0]["metrics"]["acc"] == {"value": 0.75, "stderr": stderr, "scores": scores}
    difference = paired_difference(paused["results"][0]["metrics"]["acc"]["scores"], scores)
    assert results[3]["difference"] == difference and "difference" not in results[2]
    assert format_figure(difference, "+") in output.replace("\n", " ")
    for row in results[2:]:  # two choices of each example, with the pauses, after one prompt
        flops = [choice_flops(model.config, len(each["prompt"]) + row["pauses"], len(f" {text}"))
                 for each in HARNESS for text in (each["answer"], "zzz")]  # fmt: skip
        assert row["flops_per_example"] == sum(flops) / 8 and f"{row['flops_per_example'] / 1e9:.3g}" in output
    assert results[2]["n"] == 8 and "mine (harness)" in output
    with monkeypatch.context() as patch:
        patch.setattr(harness, "evaluate", None)  # all results are cached
        run(tmp_path / "results", *arguments)
    tasks = importlib.import_module("lm_eval.tasks")  # listing its own tasks takes ten seconds
    local = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: local(include_path=include_path))
    with pytest.raises(UserError, match="lm-evaluation-harness has no task 'minne': did you mean 'mine'"):
        run(tmp_path / "results", "--harness=minne", arguments[1])
    (tmp_path / "mine.jsonl").unlink()
    (tmp_path / "yaml" / "mine.yaml").write_text(json.dumps(task | {"dataset_path": "no_such_loader"}))
    with pytest.raises(UserError, match="lm-evaluation-harness cannot load 'mine' (.*): download its data where"):
        run(tmp_path / "results", "--harness=mine", arguments[1])
    with pytest.raises(UserError, match="--harness_path=.*nowhere is not a folder"):
        run(tmp_path / "results", "--harness=mine", "--harness_path=/nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm_eval is not installed: pip install -e '.\[harness\]'"):
        run(tmp_path / "results", "--harness=mine")
