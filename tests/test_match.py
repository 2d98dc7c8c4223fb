"""3SUM and 2SUM: labels against all triples and pairs, chains of thought against slow loops, forms of the text."""

from itertools import combinations

import pytest

from experiments import match as matching
from nanopause.finetune import encode, pack
from nanopause.pauses import IGNORE
from nanopause.tasks import get_task, load
from nanopause.tasks.match import Match
from nanopause.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
SIZES = [(3, 6, 1), (3, 5, 2), (2, 8, 1), (2, 4, 2)]
NAMES = ["match3_6", "match3_5_d2", "match2_8", "match2_4_d2"]


def numbers_of(problem, prefix):
    """The numbers of a prefix after their shift: tuples of digits."""
    digits = [ord(letter) - ord("a") for letter in prefix[: problem.n * problem.d]]
    numbers = [digits[i : i + problem.d] for i in range(0, len(digits), problem.d)]
    if problem.size == 2:
        shift = problem.shifts()[int(prefix[-1])].tolist()
        numbers = [[(a + b) % problem.modulus for a, b in zip(*both)] for both in zip(numbers, shift)]
    return numbers


def is_zero(problem, *numbers):
    return all(sum(digits) % problem.modulus == 0 for digits in zip(*numbers))


@pytest.mark.parametrize("size, name", list(zip(SIZES, NAMES)), ids=NAMES)
def test_answers_and_thoughts(size, name):
    problem = Match(*size)
    examples, _ = load(get_task(name), "train", limit=400)
    answers = []
    for example in examples:
        numbers = numbers_of(problem, example.prefix)
        solved = any(is_zero(problem, *some) for some in combinations(numbers, problem.size))
        answers.append(solved)
        assert example.references == ("T" if solved else "F",) and example.target == f" {example.references[0]}"
        thought = ""
        if problem.size == 3:
            for i, j in combinations(range(problem.n), 2):
                done = any(is_zero(problem, numbers[i], numbers[j], numbers[k]) for k in range(j + 1, problem.n))
                total = [(a + b) % problem.modulus for a, b in zip(numbers[i], numbers[j])]
                thought += "!" * problem.d if done else "".join(chr(ord("a") + digit) for digit in total)
        else:
            for j in range(problem.n):
                done = any(is_zero(problem, numbers[i], numbers[j]) for i in range(j))
                thought += "!" * problem.d if done else "".join(chr(ord("a") + digit) for digit in numbers[j])
        assert problem.spelled_thought(example.prefix) == thought
        assert len(thought) == problem.n_thoughts
        assert ("!" in thought) == solved
    assert 0.45 < sum(answers) / len(answers) < 0.55


def test_forms():
    plain, dots, mix = (load(get_task(f"match3_6{form}"), "train", limit=100)[0] for form in ("", "_dots", "_mix"))
    assert [one.prefix + " " + "." * 15 for one in plain] == [one.prefix for one in dots]
    thinking = [one for one in mix if "." not in one.prefix]
    assert 30 < len(thinking) < 70
    for one in thinking:
        assert one.target == f" {Match(3, 6).spelled_thought(one.prefix)} {one.references[0]}"
    for split in ("validation", "test"):
        assert all("." * 15 in one.prefix for one in load(get_task("match3_6_mix"), split)[0])


def test_splits_share_no_text():
    train, test = ({one.prefix for one in load(get_task("match3_6"), split)[0]} for split in ("train", "test"))
    assert len(test) > 1900 and not train & test


@pytest.mark.parametrize("pauses, n_hints", [(0, 0), (1, 0), (5, 4), (16, 15), (20, 15)])
def test_hints(pauses, n_hints):
    (example,) = load(get_task("match3_6"), "train", limit=1)[0]
    pair = encode(example, BYTES, 64, pauses, hints=get_task("match3_6").hints["thought"])
    targets = pack([pair], BYTES.pause_id, "causal").targets[0].tolist()
    hints = [chr(target) for target in targets[6 : 6 + max(0, pauses - 1)] if target != IGNORE]
    assert "".join(hints) == Match(3, 6).spelled_thought(example.prefix)[:n_hints]
    assert bytes(targets[-3:-1]).decode() == example.target and targets[-1] == BYTES.eot_id
    assert sum(target != IGNORE for target in targets) == n_hints + 3


def test_the_experiment(experiment, monkeypatch):
    monkeypatch.setattr("nanopause.tasks.match.N_ROWS", {"train": 200, "validation": 20, "test": 50})
    text, found = experiment(matching, "--tasks=match3_3", "--max_steps=5")
    assert "chain of thought as hints" in text and "chance is 0.5" in text
    *found, counts = found
    assert counts["name"] == "counts" and 0.5 < counts["accuracy"]["mean"] < 1
    assert [arm["name"] for arm in found] == [arm.name for arm in matching.ARMS]
    assert len({(arm["parameters"], arm["steps"], arm["batch_size"]) for arm in found}) == 1
    assert all(0 <= arm["accuracy"]["mean"] <= 1 for arm in found)
