"""HellaSwag: choose the ending of a passage [Zellers et al. 2019]. Text is cleaned as in lm-evaluation-harness."""

import re

from nanopause.tasks.metrics import choice, choice_per_character
from nanopause.tasks.task import BadRow, Example, Row, Task, chosen, index, text, texts


def clean(raw: str) -> str:
    """Remove WikiHow's tags: " [title]" becomes ". ", other tags are deleted; then two spaces become one."""
    return re.sub(r"\[.*?\]", "", raw.replace(" [title]", ". ")).replace("  ", " ")


def examples(row: Row) -> list[Example]:
    if "activity_label" in row:
        second = text(row, "ctx_b", blank=True).capitalize()
        context = f"{text(row, 'activity_label')}: {text(row, 'ctx_a')} {second}"
    else:
        context = text(row, "ctx")
    context, *endings = map(clean, [context, *texts(row, "endings")])
    if not (context.strip() and all(map(str.strip, endings))):
        raise BadRow("the context or an ending consists of tags only")
    return chosen(context.rstrip(), endings, index(row, "label", len(endings)))


HELLASWAG = Task(
    name="hellaswag",
    hub="Rowan/hellaswag",
    splits={"train": "train", "test": "validation"},
    examples=examples,
    metrics={"accuracy": choice, "accuracy_per_character": choice_per_character},
    document="ctx",
)
