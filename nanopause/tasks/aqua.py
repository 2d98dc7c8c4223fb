"""AQuA-RAT: multiple-choice algebra [Ling et al. 2017]. The model generates the rationale, then the letter."""

import re
import string

from nanopause.tasks.metrics import same_letter
from nanopause.tasks.task import BadRow, Example, Row, Task, text, texts

ANSWER = re.compile(r"The answer is \(([A-Z])\)")  # the form of Wei et al. 2022


def examples(row: Row) -> list[Example]:
    options = texts(row, "options", blank=True)
    letters = string.ascii_uppercase[: len(options)]
    correct = text(row, "correct")
    if len(correct) != 1 or correct not in letters:
        raise BadRow(f"the field 'correct' must be one of {', '.join(letters)} and is {correct!r}")
    choices = [f"({letter}) {re.sub(rf'^{letter} *[)] *', '', option)}" for letter, option in zip(letters, options)]
    prefix = "\n".join([f"Question: {text(row, 'question')}", *choices, "Answer:"])
    rationale = text(row, "rationale", blank=True)
    target = f" {rationale}\nThe answer is ({correct})." if rationale else f" The answer is ({correct})."
    return [Example(prefix, target, (correct,))]


def letter(generated: str) -> str:
    """The letter of the last "The answer is (X)", or ""."""
    return (ANSWER.findall(generated) or [""])[-1]


AQUA = Task(
    name="aqua",
    hub="deepmind/aqua_rat",
    config="raw",
    splits={"train": "train", "validation": "validation", "test": "test"},
    examples=examples,
    metrics={"accuracy": same_letter},
    read=letter,
    max_new_tokens=512,
)
