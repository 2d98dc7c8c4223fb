"""Scores of one answer, 0 to 1, as the tasks' own evaluation scripts define them."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from math import comb

from nanopause import sandbox
from nanopause.errors import UserError

TextMetric = Callable[[str, tuple[str, ...]], float]
NUMBER = re.compile(r"#### (-?[0-9.,]+)")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces [Rajpurkar et al. 2016]."""
    text = text.lower().translate(WITHOUT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, references: tuple[str, ...]) -> float:
    """1 if a normalised reference equals the normalised answer: SQuAD, WebQuestions."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def composed_exact_match(answer: str, references: tuple[str, ...]) -> float:
    """exact_match of texts in Unicode's form NFD: Natural Questions, open [Lee et al. 2019]."""
    answer, *some = (unicodedata.normalize("NFD", text) for text in (answer, *references))
    return exact_match(answer, tuple(some))


def _overlap(answer: str, reference: str) -> float:
    ours, theirs = normalise(answer).split(), normalise(reference).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def f1(answer: str, references: tuple[str, ...]) -> float:
    """SQuAD 1.1's F1 of the normalised words, the best over the references."""
    return max(_overlap(answer, reference) for reference in references)


def _coqa_overlap(answer: str, references: tuple[str, ...]) -> float:
    """F1 in which two answers without a word agree, as "A" and "the" do: SQuAD 2's and CoQA's rule."""
    return max(f1(answer, references), exact_match(answer, references))


def _leave_one_out(metric: TextMetric, answer: str, references: tuple[str, ...]) -> float:
    """CoQA's mean over all ways to leave one reference out, which puts people and models on a level; copies count."""
    if len(references) == 1:
        return metric(answer, references)
    kept = [references[:i] + references[i + 1 :] for i in range(len(references))]
    return sum(metric(answer, some) for some in kept) / len(kept)


def coqa_f1(answer: str, references: tuple[str, ...]) -> float:
    """CoQA's F1 of a turn [Reddy et al. 2019]; with one reference the plain one."""
    return _leave_one_out(_coqa_overlap, answer, references)


def coqa_exact_match(answer: str, references: tuple[str, ...]) -> float:
    """CoQA's exact match of a turn."""
    return _leave_one_out(exact_match, answer, references)


def number(text: str) -> str | None:
    """What stands after the first `#### ` of digits, points and commas, without the commas; None: nothing does."""
    found = NUMBER.search(text)
    return found[1].replace(",", "") if found else None


def same_number(answer: str, references: tuple[str, ...]) -> float:
    """GSM8K's accuracy: 1 if the answer has the number of a reference, digit by digit [Cobbe et al. 2021]."""
    value = number(answer)
    return float(value is not None and value in [number(reference) for reference in references])


@cache
def _rouge():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("ROUGE-1 needs rouge-score: pip install -e '.[eval]'") from error
    return RougeScorer(["rouge1"])


def rouge1(answer: str, references: tuple[str, ...]) -> float:
    """ROUGE-1's F-measure without stemming, the best over the references."""
    return _rouge().score_multi(references, answer)["rouge1"].fmeasure


def bare_word(text: str) -> str:
    """The first word without the punctuation around it."""
    return (text.split() or [""])[0].strip(string.punctuation + "“”‘’…—–«»")


def same_word(answer: str, references: tuple[str, ...]) -> float:
    """LAMBADA's: 1 if the answer is the reference, letter for letter, but for punctuation around it."""
    return float(bare_word(answer) in map(bare_word, references))


def choice(log_likelihoods: Sequence[float], choices: tuple[str, ...], label: int) -> float:
    """1 if the right choice is the likeliest."""
    return float(max(range(len(choices)), key=log_likelihoods.__getitem__) == label)


def choice_per_character(log_likelihoods: Sequence[float], choices: tuple[str, ...], label: int) -> float:
    """1 if the right choice is the likeliest per character: `acc_norm` of lm-evaluation-harness."""
    # The space that joins a choice to the prefix does not count.
    return choice([value / len(text[1:]) for value, text in zip(log_likelihoods, choices)], choices, label)


def same_letter(answer: str, references: tuple[str, ...]) -> float:
    """1 if the letter of a choice is the reference's; no letter is wrong."""
    return float(answer in references)


def passes(program: str, tests: str) -> float:
    """1 if a program runs through and its tests do after it, in nanopause.sandbox."""
    return float(sandbox.run(program, tests).ok)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k programs passes, of which n were sampled and c passed: 1 − C(n−c, k) / C(n, k), which is
    unbiased [Chen et al. 2021, section 2.1]. Raises ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, and n={n}, c={c}, k={k}")
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))
