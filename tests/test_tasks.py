"""Tasks: files and hub rows, prompts, extracted answers and metrics."""

import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanopause.errors import UserError
from nanopause.prepare import hash_of
from nanopause.tasks import TASKS, Example, get_task, load
from nanopause.tasks.metrics import (
    bare_word,
    choice,
    choice_per_character,
    coqa_exact_match,
    coqa_f1,
    exact_match,
    f1,
    normalise,
    number,
    rouge1,
    same_letter,
    same_number,
    same_word,
)
from nanopause.tasks.task import BadRow
from nanopause.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("NANOPAUSE_DATA", ROOT.parent / "shared/data")) / "tasks"


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Cat's\thouse.", "cats house"),
        ("a.n. another", "another"),  # punctuation is removed before articles
        ("an-other the-me", "another theme"),
        ("A theatre and an aunt", "theatre and aunt"),
        ("U.S.A.", "usa"),
        ("“Naïve” — Ünïcode", "“naïve” — ünïcode"),  # only ASCII punctuation is removed
        ("$1,000.50", "100050"),
        (" the ", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


def test_exact_match_takes_the_best_reference():
    assert exact_match("the Broncos!", ("Denver Broncos", "Broncos")) == 1
    assert exact_match("Denver", ("Denver Broncos", "Broncos")) == 0
    assert exact_match("naive", ("naïve",)) == 0
    assert exact_match("", ("the",)) == 1


def test_f1():
    assert f1("the cat sat down", ("cat sat",)) == pytest.approx(0.8)  # precision 2/3, recall 2/2
    assert f1("cat cat", ("cat",)) == pytest.approx(2 / 3)  # counts are clipped to the reference's
    assert f1("cat", ("dog", "a black cat")) == pytest.approx(2 / 3)
    assert f1("dog", ("cat",)) == 0
    assert f1("", ("cat",)) == 0
    assert f1("the", ("a",)) == 0  # as in SQuAD 1.1: empty after normalisation


def test_coqa_leaves_one_reference_out():
    assert coqa_f1("white", ("white",)) == 1
    # Each reference is left out once: 0 and 1.
    assert coqa_f1("white", ("white", "black")) == coqa_exact_match("white", ("white", "black")) == 0.5
    # Duplicates stay: after leaving out any one, a "white" remains.
    assert coqa_f1("white", ("white", "white", "black")) == 1
    # [b, c] 2/3 and 0; [a, c] 1 and 0; [a, b] 1 and 2/3.
    assert coqa_f1("red hat", ("red hat", "hat", "shoe")) == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert coqa_exact_match("red hat", ("red hat", "hat", "shoe")) == pytest.approx(2 / 3)
    assert coqa_f1("the", ("A",)) == 1  # both are empty after normalisation
    assert coqa_f1("the", ("cat",)) == 0


@pytest.mark.parametrize(
    "text, value",
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### -1,000.50", "-1000.50"),
        ("#### .5", ".5"),
        ("#### 18 dollars", "18"),
        ("#### 3, then", "3"),
        ("#### 1 #### 2", "1"),
    ],
)
def test_number_after_hash_marks(text, value):
    assert same_number(text, (f"#### {value}",)) == 1
    assert same_number(text, (f"#### {value}1",)) == 0


def test_answer_without_number_is_wrong():
    for text in ("72", "### 72", "#### seventy", "####", "", "####72", "#### $72", "####\n72", "#### +72", "#### −72"):
        assert number(text) is None and same_number(text, ("#### 72",)) == 0
    assert same_number("no", ("no",)) == 0
    for text in ("#### 72.0", "#### 72.", "#### 072"):  # compared as text, as in the task's own script
        assert same_number(text, ("#### 72",)) == 0


def test_rouge1():
    assert rouge1("the cat", ("the cat sat on the mat",)) == pytest.approx(0.5)  # precision 1, recall 2/6
    assert rouge1("cats", ("cat",)) == 0  # no stemming
    assert rouge1("cat", ("dog", "a cat")) == pytest.approx(2 / 3)
    assert rouge1("", ("cat",)) == 0


def test_rouge1_names_its_missing_package(monkeypatch):
    from nanopause.tasks import metrics

    metrics._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
        rouge1("a", ("b",))


def test_last_word():
    assert bare_word(" “Nadia,” she said") == "Nadia" and bare_word("  ") == ""
    assert bare_word("don't.") == "don't"
    assert same_word("signs", ("signs",)) == same_word('"signs."', ("signs",)) == 1
    assert same_word("Signs", ("signs",)) == same_word("sign", ("signs",)) == 0


def test_choices():
    assert choice([-3.0, -2.0], (" yes", " certainly"), 1) == 1
    assert choice([-3.0, -2.0], (" yes", " certainly"), 0) == 0
    # Per character: -3/3 = -1 and -2/9 = -0.22; -2.4/2 = -1.2 and -3.6/4 = -0.9.
    assert choice_per_character([-3.0, -2.0], (" yes", " certainly"), 1) == 1
    assert choice([-2.4, -3.6], (" no", " sure"), 0) == choice_per_character([-2.4, -3.6], (" no", " sure"), 1) == 1


def coqa_hub(additional):
    return {
        "id": "x",
        "source": "mctest",
        "story": "Cotton was white. \n\nShe lived in a barn.\n",
        "questions": {"input_text": ["What colour?", "Where?"], "turn_id": [1, 2]},
        "answers": {"input_text": ["white", "in a barn"], "span_text": ["was white", "in a barn"]},
        "additional_answers": additional,
    }


OTHERS = {"0": {"input_text": ["White.", ""]}, "1": {"input_text": ["It was white", "a barn"]}}
NOBODY = {person: {"input_text": [""], "turn_id": [-1]} for person in "012"}
STORY = "Cotton was white. \n\nShe lived in a barn.\n\nQ: What colour?\nA:"
NEXT = STORY + " white\nQ: Where?\nA:"
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "[header] How to bake [title] Mix.",
    "ctx_b": "the cook",
    "ctx": "[header] How to bake [title] Mix. the cook",
    "endings": ["rests. [step] Then  eats.", ", and runs.", "c", "d"],
    "label": "1",
}
BAKED = " rests. Then eats.", " , and runs.", " c", " d"
SOLUTIONS = " Pour it", " Drop it"
ANSWERS = {"text": ["Paris", "in Paris"], "answer_start": [3, 0]}
CHOICES = {"label": ["A", "B"], "text": ["bank", "new york"]}


AQUA = {"question": "Half of 10? ", "options": ["A)4", "B) 5", "C)A) or B)", "D)", "E)6"],
        "rationale": "10/2 = 5\nAnswer : B ", "correct": "B"}  # fmt: skip
HALF = "Question: Half of 10?\n(A) 4\n(B) 5\n(C) A) or B)\n(D) \n(E) 6\nAnswer:"
MBPP = {"text": "Write a function to add.", "code": "def add(a, b):\r\n\treturn a + b ", "task_id": 11,
        "test_setup_code": "x = 1\r\n", "test_list": ["assert add(x, 2) == 3 ", "assert add(x, 0) == 1"],
        "challenge_test_list": []}  # fmt: skip
ADD = (
    "You are an expert Python programmer, and here is your task: Write a function to add. Your code should pass these "
    "tests:\n\nassert add(x, 2) == 3\nassert add(x, 0) == 1\n[BEGIN]"
)


@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("gsm8k", {"question": " 1 + 1? ", "answer": "1+1 = 2\n#### 2"},
         [Example("Question: 1 + 1?\nAnswer:", " 1+1 = 2\n#### 2", ("1+1 = 2\n#### 2",))]),
        ("squad", {"context": "It is Paris. ", "question": "Where?", "answers": ["Paris", "in Paris"]},
         [Example("It is Paris.\nQuestion: Where?\nAnswer:", " Paris", ("Paris", "in Paris"))]),
        ("squad", {"id": "1", "title": "x", "context": "It is Paris. ", "question": "Where?", "answers": ANSWERS},
         [Example("It is Paris.\nQuestion: Where?\nAnswer:", " Paris", ("Paris", "in Paris"))]),
        ("coqa", {"story": "Cotton was white. \n\nShe lived in a barn.\n",
                  "turns": [{"question": "What colour?", "answers": ["white", "White."]},
                            {"question": "Where?", "answers": ["in a barn"]}]},
         [Example(STORY, " white", ("white", "White.")), Example(NEXT, " in a barn", ("in a barn",))]),
        ("coqa", coqa_hub(OTHERS),
         [Example(STORY, " white", ("white", "White.", "It was white")),
          Example(NEXT, " in a barn", ("in a barn", "", "a barn"))]),
        ("coqa", coqa_hub(NOBODY), [Example(STORY, " white", ("white",)), Example(NEXT, " in a barn", ("in a barn",))]),
        ("coqa", {"story": "Cotton was white. \n\nShe lived in a barn.\n", "questions": ["What colour?"],
                  "answers": {"input_text": ["white"]}}, [Example(STORY, " white", ("white",))]),
        ("coqa", {"story": "Cotton was white. \n\nShe lived in a barn.\n",
                  "questions": [{"input_text": "What colour?"}], "answers": [{"input_text": "white"}]},
         [Example(STORY, " white", ("white",))]),
        ("csqa", {"question": "Where?", "choices": ["bank", "new york"], "label": 1},
         [Example("Question: Where?\nChoices: bank, new york\nAnswer:", " new york", ("new york",))]),
        ("csqa", {"question": "Where?", "question_concept": "x", "choices": CHOICES, "answerKey": "B"},
         [Example("Question: Where?\nChoices: bank, new york\nAnswer:", " new york", ("new york",))]),
        ("piqa", {"goal": "To empty it,", "sol1": "Pour it ", "sol2": "Drop it", "label": 1},
         [Example("Question: To empty it,\nAnswer:", " Drop it", ("Drop it",), SOLUTIONS, 1)]),
        ("hellaswag", HELLASWAG,
         [Example("Baking: How to bake. Mix. The cook", " , and runs.", (", and runs.",), BAKED, 1)]),
        ("hellaswag", {"ctx": "Baking: How to bake. Mix. The cook", "endings": [e.strip() for e in BAKED], "label": 1},
         [Example("Baking: How to bake. Mix. The cook", " , and runs.", (", and runs.",), BAKED, 1)]),
        ("lambada", {"text": "He said:\n\n\"I love\nthe “signs”"},
         [Example("He said:\n\n\"I love\nthe", " “signs”", ("signs",))]),
        ("lambada", {"text": "One. \n\nTwo"}, [Example("One.", " \n\nTwo", ("Two",))]),
        ("webq", {"question": "where?", "answer": ["Paris", "Rome"]},
         [Example("Question: where?\nAnswer:", " Paris", ("Paris", "Rome"))]),
        ("webq", {"url": "x", "question": "where?", "answers": ["Paris", "Rome"]},
         [Example("Question: where?\nAnswer:", " Paris", ("Paris", "Rome"))]),
        ("nq", {"question": "where", "answer": ["Paris", "Rome"]},
         [Example("Question: where\nAnswer:", " Paris", ("Paris", "Rome"))]),
        ("nq", {"question": "who", "answer": "['Ted Cruz', Beto O'Rourke]"},
         [Example("Question: who\nAnswer:", " Ted Cruz", ("Ted Cruz", "Beto O'Rourke"))]),
        ("nq", {"question": "who", "answer": "[Carroll O'Connor, 'Jean Stapleton']"},
         [Example("Question: who\nAnswer:", " Carroll O'Connor", ("Carroll O'Connor", "Jean Stapleton"))]),
        ("nq", {"question": "who", "answer": "[`` Uma Thurman '']"},
         [Example("Question: who\nAnswer:", " Uma Thurman", ("Uma Thurman",))]),
        ("aqua", AQUA, [Example(HALF, " 10/2 = 5\nAnswer : B\nThe answer is (B).", ("B",))]),
        ("aqua", {**AQUA, "rationale": " "}, [Example(HALF, " The answer is (B).", ("B",))]),
        ("mbpp", MBPP, [Example(ADD, "\ndef add(a, b):\n\treturn a + b", ("def add(a, b):\n\treturn a + b",),
                                tests="x = 1\nassert add(x, 2) == 3\nassert add(x, 0) == 1")]),
    ],
)  # fmt: skip
def test_prefix_and_target(name, row, expected):
    assert TASKS[name].examples(row) == expected


def test_extracted_answers_and_scores():
    assert TASKS["squad"].read("\n Paris \nQuestion: next?") == "Paris" and TASKS["squad"].read(" ") == ""
    assert TASKS["gsm8k"].read(" a\n#### 2\n") == "a\n#### 2"
    assert TASKS["lambada"].read(" signs.\nAnd") == "signs"
    squad = Example("", " Paris", ("Paris", "in Paris"))
    assert TASKS["squad"].score("Paris, France", squad) == {"exact_match": 0, "f1": pytest.approx(2 / 3)}
    piqa = Example("", " b", ("b",), (" a", " b"), 1)
    assert TASKS["piqa"].score([-2.0, -1.0], piqa) == {"accuracy": 1, "accuracy_per_character": 1}
    primary = {name: next(iter(task.metrics)) for name, task in TASKS.items()}
    assert primary == {"gsm8k": "accuracy", "squad": "exact_match", "coqa": "f1", "csqa": "exact_match",
                       "piqa": "accuracy", "hellaswag": "accuracy", "lambada": "exact_match", "webq": "exact_match",
                       "nq": "exact_match", "aqua": "accuracy", "mbpp": "pass@1"}  # fmt: skip


@pytest.mark.parametrize(
    "text, letter",
    [
        (" 10/2 = 5\nThe answer is (B).", "B"),
        ("The answer is (A). No, wait.\nThe answer is (B)", "B"),
        ("Answer: B", ""),
        ("The answer is B.", ""),  # without parentheses A could be an article
        ("The answer is (b).", ""),
        ("The answer is (", ""),
        ("", ""),
    ],
)
def test_letter_of_the_answer_sentence(text, letter):
    assert TASKS["aqua"].read(text) == letter
    assert same_letter(letter, ("B",)) == (letter == "B") and same_letter(letter, ("A",)) == 0


def test_program_ends_before_done():
    read = TASKS["mbpp"].read
    assert read("\ndef f():\n    pass\n[DONE]\nNext") == read("\ndef f():\n    pass\n") == "def f():\n    pass"


def test_mbpp_splits_of_one_file(tmp_path):
    """As published, by task_id: prompts 1–10, test 11–510, validation 511–600, training 601–974."""
    mbpp = TASKS["mbpp"]
    rows = [{**MBPP, "text": f"Problem {i}.", "task_id": i} for i in (1, 10, 11, 510, 511, 600, 601, 974)]
    write(tmp_path / "mbpp.jsonl.gz", rows)
    found = {split: keys(mbpp, split, tmp_path) for split in ("train", "validation", "test")}
    wanted = {"train": (601, 974), "validation": (511, 600), "test": (11, 510)}
    for split, ids in wanted.items():
        assert [re.search(r"Problem (\d+)", prefix)[1] for prefix in found[split]] == [str(i) for i in ids]
    assert len(load(mbpp, "test", tmp_path, limit=1)[0]) == 1
    with pytest.raises(UserError, match="mbpp.jsonl.gz, line 2: .* 'task_id' must be a number from 1 and is '2'"):
        write(tmp_path / "mbpp.jsonl.gz", [MBPP, {**MBPP, "task_id": "2"}])
        load(mbpp, "test", tmp_path)
    write(tmp_path / "mbpp_test.jsonl", [{**MBPP, "task_id": 900}])
    with pytest.raises(UserError, match="mbpp.jsonl.gz and mbpp_test.jsonl, which are both mbpp's test split"):
        load(mbpp, "test", tmp_path)
    (tmp_path / "mbpp.jsonl.gz").unlink()
    assert len(keys(mbpp, "test", tmp_path)) == 1  # a file named after a split ignores task_id
    write(tmp_path / "gsm8k.jsonl", sums(1))
    with pytest.raises(UserError, match="has no gsm8k_test.jsonl"):
        load(TASKS["gsm8k"], "test", tmp_path)


def test_unknown_task_suggests_the_nearest():
    assert get_task("gsm8k") is TASKS["gsm8k"]
    with pytest.raises(UserError, match="task 'GSM8' is not known: did you mean 'gsm8k'"):
        get_task("GSM8")
    with pytest.raises(UserError, match="choose one of gsm8k, squad"):
        get_task("qqqq")


def opener(name):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    return {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd.open}.get(Path(name).suffix, open)


def write(file, rows, encoding="utf-8-sig"):
    with opener(file)(file, "wt", encoding=encoding) as stream:  # by default with a byte order mark
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sums(n):
    return [{"question": f"Was ist {i} + 1, naïve?", "answer": f"#### {i + 1}"} for i in range(n)]


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_compressions(tmp_path, ending):
    file = tmp_path / f"gsm8k_test.jsonl{ending}"
    write(file, sums(50))
    examples, description = load(TASKS["gsm8k"], "test", tmp_path)
    assert [example.target for example in examples] == [f" #### {i + 1}" for i in range(50)]
    assert examples[0].prefix == "Question: Was ist 0 + 1, naïve?\nAnswer:"
    assert description == f"gsm8k, test: 50 examples of {file}"
    if ending:
        write(file, sums(5000))
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
        with pytest.raises(
            UserError, match=rf"gsm8k_test.jsonl{ending} cannot be read after line \d\d+ .*copy it again"
        ):
            load(TASKS["gsm8k"], "test", tmp_path)
        with open(file, "r+b") as stream:
            stream.write(b"nothing of that kind")
        with pytest.raises(UserError, match=rf"gsm8k_test.jsonl{ending} cannot be read after line 0 "):
            load(TASKS["gsm8k"], "test", tmp_path)


def test_zstd_file_with_two_frames(tmp_path):
    for i in range(2):
        write(tmp_path / f"{i}.zst", sums(10)[i::2], "utf-8")
    frames = [(tmp_path / f"{i}.zst").read_bytes() for i in range(2)]
    (tmp_path / "gsm8k_test.jsonl.zst").write_bytes(b"".join(frames))
    assert len(load(TASKS["gsm8k"], "test", tmp_path)[0]) == 10


def test_zstd_names_its_missing_package(tmp_path, monkeypatch):
    write(tmp_path / "gsm8k_test.jsonl.zst", sums(1))
    for module in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
        load(TASKS["gsm8k"], "test", tmp_path)


@pytest.mark.parametrize(
    "name, file, split",
    [
        ("squad", "squad_train_subset.jsonl", "train"),
        ("squad", "squad-train-v1.1.jsonl", "train"),
        ("squad", "squad_val1000.jsonl", "test"),
        ("squad", "squad_validation.jsonl", "test"),
        ("squad", "squad_valid.jsonl", "test"),
        ("nq", "nq_open_dev.jsonl.gz", "test"),
        ("nq", "nq_open_train8757.jsonl.gz", "train"),
        ("webq", "webq_test.jsonl.xz", "test"),
    ],
)
def test_file_names(tmp_path, name, file, split):
    rows = [{"context": f"C {i}", "question": "q", "answers": ["a"], "answer": ["a"]} for i in range(5)]
    if name != "squad":
        rows = [{"question": f"q {i}", "answer": ["a"]} for i in range(5)]
    write(tmp_path / file, rows)
    (tmp_path / "squad_v2_train.jsonl").write_text("of another task")
    (tmp_path / "squad_trainer.jsonl").write_text("ignored")
    (tmp_path / "squad_train.txt").write_text("ignored")
    examples, description = load(TASKS[name], split, tmp_path)
    assert file in description and examples


def keys(task, split, folder):
    return [example.prefix for example in load(task, split, folder)[0]]


def test_validation_is_cut_from_training(tmp_path):
    rows = sums(2000)
    write(tmp_path / "gsm8k_train.jsonl", rows)
    train, validation = (keys(TASKS["gsm8k"], split, tmp_path) for split in ("train", "validation"))
    assert set(train).isdisjoint(validation) and len(train) + len(validation) == 2000
    assert 60 < len(validation) < 140
    expected = [row["question"] for row in rows if hash_of(row["question"]) < 0.05 * 2**64]
    assert validation == [f"Question: {question}\nAnswer:" for question in expected]
    write(tmp_path / "gsm8k_train.jsonl", rows[::-1])  # the split does not depend on the order of the rows
    assert keys(TASKS["gsm8k"], "validation", tmp_path) == validation[::-1]
    description = load(TASKS["gsm8k"], "validation", tmp_path)[1]
    assert description.endswith("from the 5% of its documents that a hash assigns to validation")
    with pytest.raises(UserError, match=r"has no gsm8k_test.jsonl \(or .jsonl.gz.*\), .* only gsm8k_train.jsonl"):
        load(TASKS["gsm8k"], "test", tmp_path)
    write(tmp_path / "gsm8k_test.jsonl", sums(30))
    assert len(keys(TASKS["gsm8k"], "test", tmp_path)) == 30


def test_without_a_training_split_the_test_split_is_cut(tmp_path):
    turns = [{"question": "Q?", "answers": ["a"]}] * 3
    write(tmp_path / "coqa_val.jsonl", [{"story": f"Story {i}.", "turns": turns} for i in range(1000)])
    parts = {split: keys(TASKS["coqa"], split, tmp_path) for split in ("train", "validation", "test")}
    stories = {split: {prefix.partition("\n")[0] for prefix in prefixes} for split, prefixes in parts.items()}
    assert sum(map(len, parts.values())) == 3000 and sum(map(len, stories.values())) == 1000
    assert len(set.union(*stories.values())) == 1000  # no story is in two splits
    assert 150 < len(stories["test"]) < 250 and 20 < len(stories["validation"]) < 60
    description = load(TASKS["coqa"], "test", tmp_path)[1]
    assert "the 20% of its documents" in description and "scores are not those of papers" in description

    write(tmp_path / "coqa_train.jsonl", [{"story": f"Train {i}.", "turns": turns} for i in range(100)])
    assert len(keys(TASKS["coqa"], "test", tmp_path)) == 3000
    assert all(prefix.startswith("Train") for prefix in keys(TASKS["coqa"], "train", tmp_path))
    assert "scores are not" not in load(TASKS["coqa"], "test", tmp_path)[1]


def test_test_split_is_not_used_for_training(tmp_path):
    write(tmp_path / "gsm8k_test.jsonl", sums(100))
    assert len(keys(TASKS["gsm8k"], "test", tmp_path)) == 100
    with pytest.raises(UserError, match="has no gsm8k_train.jsonl.*which train needs, only gsm8k_test.jsonl"):
        load(TASKS["gsm8k"], "train", tmp_path)


def test_limit_takes_the_first_examples(tmp_path):
    write(tmp_path / "gsm8k_test.jsonl", sums(10))
    with open(tmp_path / "gsm8k_test.jsonl", "a") as file:
        file.write("broken\n")  # not reached
    examples, description = load(TASKS["gsm8k"], "test", tmp_path, limit=3)
    assert [example.target for example in examples] == [" #### 1", " #### 2", " #### 3"] and "3 examples" in description
    with pytest.raises(UserError, match="limit=0 must be at least 1"):
        load(TASKS["gsm8k"], "test", tmp_path, limit=0)


GOOD = {
    "gsm8k": sums(1)[0],
    "squad": {"context": "c", "question": "q", "answers": ["a"]},
    "coqa": {"story": "s", "turns": [{"question": "q", "answers": ["a"]}]},
    "csqa": {"question": "q", "choices": ["a", "b"], "label": 0},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "hellaswag": {"ctx": "c", "endings": ["a", "b"], "label": "0"},
    "lambada": {"text": "two words"},
    "webq": {"question": "q", "answer": ["a"]},
    "nq": {"question": "q", "answer": ["a"]},
    "aqua": AQUA,
    "mbpp": MBPP,
}


@pytest.mark.parametrize(
    "name, change, message",
    [
        *((name, {task.document: None}, f"the field '{task.document}' is missing") for name, task in TASKS.items()),
        *((name, {task.document: 7}, f"'{task.document}' must be text and is 7") for name, task in TASKS.items()),
        *((name, {task.document: " "}, f"the field '{task.document}' is empty") for name, task in TASKS.items()),
        ("gsm8k", {"answer": "no number"}, "has no number after ####"),
        ("squad", {"answers": []}, "the field 'answers' has no text"),
        ("squad", {"answers": ["a", " "]}, "the field 'answers' has an empty text"),
        ("squad", {"answers": "a"}, "'answers' must be a list of texts and is 'a'"),
        ("squad", {"answers": {"txt": ["a"]}}, "'answers' must be a list of texts"),
        ("squad", {"answers": ["a", None]}, "'answers' must be a list of texts"),
        ("coqa", {"turns": ["q"]}, "'turns' must be a list of turns"),
        ("coqa", {"turns": None}, "'turns' must be a list of turns"),
        ("coqa", {"turns": [{"question": "q"}]}, "the field 'answers' is missing"),
        ("csqa", {"label": 2}, "'label' must be 0 to 1 and is 2"),
        ("csqa", {"answerKey": "F", "choices": CHOICES}, "'answerKey' must be one of A, B and is 'F'"),
        ("piqa", {"label": -1}, "'label' must be 0 to 1 and is -1"),
        ("piqa", {"label": True}, "'label' must be 0 to 1 and is True"),
        ("piqa", {"sol2": ""}, "the field 'sol2' is empty"),
        ("hellaswag", {"label": ""}, "'label' must be 0 to 1 and is ''"),
        ("hellaswag", {"endings": ["a", "[step]"]}, "the context or an ending consists of tags only"),
        ("hellaswag", {"ctx": "[header]"}, "the context or an ending consists of tags only"),
        ("lambada", {"text": "alone"}, "the field 'text' has only one word"),
        ("lambada", {"text": "he said ..."}, "ends in '...', which is not a word"),
        ("nq", {"answer": "[]"}, "the field 'answer' has an empty text"),
        ("aqua", {"correct": "F"}, "'correct' must be one of A, B, C, D, E and is 'F'"),
        ("aqua", {"correct": "AB"}, "'correct' must be one of A, B, C, D, E and is 'AB'"),
        ("aqua", {"options": []}, "the field 'options' has no text"),
        ("aqua", {"rationale": None}, "the field 'rationale' is missing"),
        ("mbpp", {"code": " "}, "the field 'code' is empty"),
        ("mbpp", {"test_list": []}, "the field 'test_list' has no text"),
        ("mbpp", {"test_setup_code": None}, "the field 'test_setup_code' is missing"),
    ],
)  # fmt: skip
def test_invalid_rows_are_reported_with_their_line(tmp_path, name, change, message):
    task = TASKS[name]
    file = tmp_path / f"{task.stem or name}_{task.splits['test']}.jsonl"
    write(file, [GOOD[name], {**GOOD[name], **change}])
    pattern = f"{re.escape(str(file))}, line 2: .*{re.escape(message)}.*; fix or delete"
    with pytest.raises(UserError, match=pattern) as error:
        load(task, "test", tmp_path)
    assert "\n" not in str(error.value)


def damaged(value):
    """Copies of a row, each with one part, at any depth, replaced by an invalid value."""
    yield from (None, 7, -1, True, "", "junk", [], {}, [None], [[]], ["a"], {"text": 7}, {"0": []})
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in damaged(part):
            copy = value.copy()
            copy[key] = other
            yield copy


@pytest.mark.parametrize("name", TASKS)
def test_damaged_rows_raise_bad_row(name):
    csqa = {"question": "q", "choices": {"label": ["A", "B", "C"], "text": ["a", "b"]}, "answerKey": "C"}
    hub = {
        "coqa": coqa_hub(OTHERS),
        "csqa": csqa,
        "squad": {**GOOD["squad"], "answers": ANSWERS},
        "hellaswag": HELLASWAG,
    }
    refused = 0
    for row in (GOOD[name], hub.get(name, {})):
        for bad in damaged(row):
            try:
                assert not isinstance(bad, dict) or all(isinstance(x, Example) for x in TASKS[name].examples(bad))
            except BadRow:
                refused += 1
    assert refused > 10


@pytest.mark.parametrize("line, message", [('{"question": ', "line 3: not JSON"), ("[1]", "line 3: not a JSON object")])
def test_lines_that_are_not_json_objects(tmp_path, line, message):
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(GOOD["gsm8k"]) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        load(TASKS["gsm8k"], "test", tmp_path)


def test_invalid_folders(tmp_path):
    gsm8k = TASKS["gsm8k"]
    with pytest.raises(UserError, match="missing is not a folder"):
        load(gsm8k, "test", tmp_path / "missing")
    with pytest.raises(UserError, match="only nothing"):
        load(gsm8k, "test", tmp_path)
    with pytest.raises(UserError, match="split 'dev' is not known: choose train, validation, test"):
        load(gsm8k, "dev", tmp_path)
    (tmp_path / "gsm8k_test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no example for test"):
        load(gsm8k, "test", tmp_path)
    write(tmp_path / "gsm8k_test.jsonl.gz", sums(1))
    with pytest.raises(UserError, match="gsm8k_test.jsonl and gsm8k_test.jsonl.gz, which are both gsm8k's test split"):
        load(gsm8k, "test", tmp_path)
    (tmp_path / "gsm8k_test.jsonl.gz").unlink()
    (tmp_path / "gsm8k_test.jsonl").write_bytes('{"question": "naïve"}'.encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read after line 0"):
        load(gsm8k, "test", tmp_path)


@pytest.mark.parametrize(
    "name, row, call",
    [
        ("gsm8k", GOOD["gsm8k"], ("openai/gsm8k", "main", "test")),
        ("squad", {"context": "c", "question": "q", "answers": ANSWERS}, ("rajpurkar/squad", None, "validation")),
        ("coqa", coqa_hub(OTHERS), ("EleutherAI/coqa", None, "validation")),
        ("csqa", {"question": "q", "choices": CHOICES, "answerKey": "B"}, ("tau/commonsense_qa", None, "validation")),
        ("piqa", GOOD["piqa"], ("baber/piqa", None, "validation")),
        ("hellaswag", HELLASWAG, ("Rowan/hellaswag", None, "validation")),
        ("lambada", {"text": "two words"}, ("EleutherAI/lambada_openai", "default", "test")),
        ("webq", {"question": "q", "answers": ["a"]}, ("stanfordnlp/web_questions", None, "test")),
        ("nq", GOOD["nq"], ("google-research-datasets/nq_open", None, "validation")),
        ("aqua", AQUA, ("deepmind/aqua_rat", "raw", "test")),
        ("mbpp", MBPP, ("google-research-datasets/mbpp", "full", "test")),
    ],
)
def test_hub_datasets(monkeypatch, name, row, call):
    """Arguments of load_dataset and rows of a Dataset, without network access."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, config=None, *, split):
        calls.append((path, config, split))
        return datasets.Dataset.from_list([row] * 3 + [{}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    if name == "lambada":  # the test split is split by hash; this text stays in it
        row = {"text": next(f"two words{i}" for i in range(99) if hash_of(f"two words{i}") < 0.2 * 2**64)}
    task = TASKS[name]
    examples, description = load(task, "test", limit=2)
    assert examples == (task.examples(row) * 2)[:2] and calls == [call]
    assert f"of {call[0]}, split {call[2]}" in description
    with pytest.raises(UserError, match=f"{call[0]}, split {call[2]}, row 3: the field .* is missing"):
        load(task, "test")


def test_unreachable_hub_is_one_sentence_without_a_wait(tmp_path):
    code = """
import time
import datasets
from nanopause.errors import run
from nanopause.tasks import get_task, load
begin = time.monotonic()
try:
    run(lambda: load(get_task("piqa"), "test"))
finally:
    print(time.monotonic() - begin)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and float(ended.stdout) < 10
    assert re.search(r"^error: cannot load baber/piqa \(.*\): name a folder of .* by --data_dir$", ended.stderr, re.M)


def test_hub_without_datasets_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
        load(TASKS["gsm8k"], "test")


SIZES = {  # of train and validation, and of test; coqa and lambada have one file
    "gsm8k": (7473, 1319), "squad": (8152, 1000), "coqa": (6347, 1636), "csqa": (9741, 1221), "piqa": (16113, 1838),
    "hellaswag": (39905, 10042), "lambada": (4115, 1038), "webq": (3778, 2032), "nq": (8757, 3610),
    "aqua": (254, 254), "mbpp": (374 + 90, 500),
}  # fmt: skip


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}; NANOPAUSE_DATA names another folder")
@pytest.mark.parametrize("name", TASKS)
def test_real_files(name):
    """Every row parses, and the correct answer scores 1. Programs are executed in test_sandbox.py."""
    task, tokenizer = TASKS[name], load_tokenizer("gpt2")
    splits = ("validation", "test") if name == "aqua" else ("train", "validation", "test")
    *train, validation, test = (load(task, split, REAL)[0] for split in splits)
    train = [example for part in train for example in part]
    assert (len(train) + len(validation), len(test)) == SIZES[name]
    if "validation" not in task.splits:
        assert len(validation) == pytest.approx(0.05 * SIZES[name][0], rel=0.25)
    for i, example in enumerate(train + validation + test):
        assert example.prefix == example.prefix.rstrip() and example.target[0].isspace() and example.target.strip()
        if example.choices is None:
            answer = task.read(example.target)
            assert answer == example.references[0]
        else:
            answer = [float(j == example.label) for j in range(len(example.choices))]
            assert example.target == example.choices[example.label]
        if name not in ("coqa", "mbpp"):  # coqa's references disagree
            assert next(iter(task.score(answer, example).values())) == 1
        if i % 50 == 0:
            joined = tokenizer.encode(example.prefix + example.target)
            assert tokenizer.encode(example.prefix) + tokenizer.encode(example.target) == joined
        if task.max_new_tokens and i % 10 == 0:
            assert len(tokenizer.encode(example.target)) <= task.max_new_tokens
