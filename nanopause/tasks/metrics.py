"""Metrics of one answer, 0 to 1, as defined by the tasks' own evaluation scripts."""

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
    """exact_match of texts in Unicode normal form NFD: Natural Questions, open [Lee et al. 2019]."""
    answer, *references = (unicodedata.normalize("NFD", text) for text in (answer, *references))
    return exact_match(answer, tuple(references))


def _overlap(answer: str, reference: str) -> float:
    """F1 of the normalised words."""
    answer_words = normalise(answer).split()
    reference_words = normalise(reference).split()
    n_common = sum((Counter(answer_words) & Counter(reference_words)).values())
    return 2 * n_common / (len(answer_words) + len(reference_words)) if n_common else 0.0


def f1(answer: str, references: tuple[str, ...]) -> float:
    """SQuAD 1.1's F1 of the normalised words, maximum over the references."""
    return max(_overlap(answer, reference) for reference in references)


def _coqa_overlap(answer: str, references: tuple[str, ...]) -> float:
    """F1 that is 1 for two answers without words, such as "A" and "the": the rule of SQuAD 2 and CoQA."""
    return max(f1(answer, references), exact_match(answer, references))


def _leave_one_out(metric: TextMetric, answer: str, references: tuple[str, ...]) -> float:
    """CoQA's mean over all ways to leave out one reference, which makes human and model scores comparable. Duplicate
    references are not merged."""
    if len(references) == 1:
        return metric(answer, references)
    subsets = [references[:i] + references[i + 1 :] for i in range(len(references))]
    return sum(metric(answer, subset) for subset in subsets) / len(subsets)


def coqa_f1(answer: str, references: tuple[str, ...]) -> float:
    """CoQA's F1 of a turn [Reddy et al. 2019]; with a single reference nothing is left out."""
    return _leave_one_out(_coqa_overlap, answer, references)


def coqa_exact_match(answer: str, references: tuple[str, ...]) -> float:
    """CoQA's exact match of a turn."""
    return _leave_one_out(exact_match, answer, references)


def number(text: str) -> str | None:
    """The number after the first `#### `, without commas; None if there is none."""
    found = NUMBER.search(text)
    return found[1].replace(",", "") if found else None


def same_number(answer: str, references: tuple[str, ...]) -> float:
    """GSM8K's accuracy: 1 if the answer's number equals a reference's as text [Cobbe et al. 2021]."""
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
    """ROUGE-1 F-measure without stemming, maximum over the references. Raises UserError without rouge-score."""
    return _rouge().score_multi(references, answer)["rouge1"].fmeasure


def bare_word(text: str) -> str:
    """The first word, without punctuation around it; "" if there is none."""
    return (text.split() or [""])[0].strip(string.punctuation + "“”‘’…—–«»")


def same_word(answer: str, references: tuple[str, ...]) -> float:
    """LAMBADA's accuracy: 1 if the answer's first word equals a reference, apart from punctuation around it."""
    return float(bare_word(answer) in map(bare_word, references))


def choice(log_likelihoods: Sequence[float], choices: tuple[str, ...], label: int) -> float:
    """1 if the correct choice is the likeliest."""
    return float(max(range(len(choices)), key=log_likelihoods.__getitem__) == label)


def choice_per_character(log_likelihoods: Sequence[float], choices: tuple[str, ...], label: int) -> float:
    """1 if the correct choice is the likeliest per character: `acc_norm` of lm-evaluation-harness."""
    # The leading space, which joins a choice to the prefix, is not counted.
    return choice([value / len(text[1:]) for value, text in zip(log_likelihoods, choices)], choices, label)


def same_letter(answer: str, references: tuple[str, ...]) -> float:
    """1 if the letter of a choice is the reference's; an empty answer is wrong."""
    return float(answer in references)


def passes(program: str, tests: str) -> float:
    """1 if a program and then its tests run to their end in nanopause.sandbox."""
    return float(sandbox.run(program, tests).ok)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k sampled programs passes, if c of n passed:
    1 − C(n−c, k) / C(n, k) [Chen et al. 2021, section 2.1]. Raises ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, and n={n}, c={c}, k={k}")
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))
