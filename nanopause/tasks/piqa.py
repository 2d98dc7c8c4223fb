"""PIQA: choose the solution that works, of two [Bisk et al. 2020]."""

from nanopause.tasks.metrics import choice, choice_per_character
from nanopause.tasks.task import Example, Row, Task, chosen, index, text


def examples(row: Row) -> list[Example]:
    solutions = [text(row, "sol1"), text(row, "sol2")]
    return chosen(f"Question: {text(row, 'goal')}\nAnswer:", solutions, index(row, "label", 2))


PIQA = Task(
    name="piqa",
    hub="baber/piqa",
    splits={"train": "train", "test": "validation"},
    examples=examples,
    metrics={"accuracy": choice, "accuracy_per_character": choice_per_character},
    document="goal",
)
