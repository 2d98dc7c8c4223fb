"""LAMBADA: predict the last word of a passage [Paperno et al. 2016], in OpenAI's version."""

import re

from nanopause.tasks.metrics import bare_word, same_word
from nanopause.tasks.task import BadRow, Example, Row, Task, text


def examples(row: Row) -> list[Example]:
    parts = re.fullmatch(r"(.*\S)(\s+\S+)", text(row, "text"), re.DOTALL)
    if not parts:
        raise BadRow("the field 'text' has only one word")
    prefix, target = parts.groups()
    if not bare_word(target):
        raise BadRow(f"the field 'text' ends in {target.strip()!r}, which is not a word")
    return [Example(prefix, target, (bare_word(target),))]


LAMBADA = Task(
    name="lambada",
    hub="EleutherAI/lambada_openai",
    config="default",
    splits={"test": "test"},
    examples=examples,
    metrics={"exact_match": same_word},
    document="text",
    read=bare_word,
    max_new_tokens=8,
    cut_test=True,
)
