"""SQuAD 1.1: the answer is a span of the context [Rajpurkar et al. 2016]."""

from nanopause.tasks.metrics import exact_match, f1
from nanopause.tasks.task import Example, Row, Task, answered, text, texts


def examples(row: Row) -> list[Example]:
    prefix = f"{text(row, 'context')}\nQuestion: {text(row, 'question')}\nAnswer:"
    return answered(prefix, texts(row, "answers", "text"))


SQUAD = Task(
    name="squad",
    hub="rajpurkar/squad",
    splits={"train": "train", "test": "validation"},
    examples=examples,
    metrics={"exact_match": exact_match, "f1": f1},
    document="context",
    max_new_tokens=48,
)
