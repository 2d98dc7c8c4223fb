"""Natural Questions, open domain, closed book [Kwiatkowski et al. 2019; Lee et al. 2019]."""

import re

from nanopause.tasks.metrics import composed_exact_match
from nanopause.tasks.task import Example, Row, Task, answered, text, texts


def unprinted(answers: str) -> list[str]:
    """The items of a list in printed form with missing quotes, as in the dataset: `['Ted Cruz', Beto O'Rourke]`."""
    items = re.split(r"',\s|,\s(?=')", answers.removeprefix("[").removesuffix("]"))
    return [item.strip(" '`") for item in items]


def examples(row: Row) -> list[Example]:
    if isinstance(row.get("answer"), str):
        row = {**row, "answer": unprinted(text(row, "answer"))}
    return answered(f"Question: {text(row, 'question')}\nAnswer:", texts(row, "answer"))


NQ = Task(
    name="nq",
    hub="google-research-datasets/nq_open",
    stem="nq_open",
    splits={"train": "train", "test": "validation"},
    examples=examples,
    metrics={"exact_match": composed_exact_match},
    max_new_tokens=32,
)
