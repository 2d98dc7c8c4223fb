"""WebQuestions, closed book [Berant et al. 2013]."""

from nanopause.tasks.metrics import exact_match
from nanopause.tasks.task import Example, Row, Task, answered, text, texts


def examples(row: Row) -> list[Example]:
    answers = texts(row, "answers" if "answers" in row else "answer")
    return answered(f"Question: {text(row, 'question')}\nAnswer:", answers)


WEBQ = Task(
    name="webq",
    hub="stanfordnlp/web_questions",
    splits={"train": "train", "test": "test"},
    examples=examples,
    metrics={"exact_match": exact_match},
    max_new_tokens=64,
)
