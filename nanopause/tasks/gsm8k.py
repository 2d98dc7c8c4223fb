"""GSM8K: grade-school math word problems [Cobbe et al. 2021]."""

from nanopause.tasks.metrics import number, rouge1, same_number
from nanopause.tasks.task import BadRow, Example, Row, Task, answered, text


def examples(row: Row) -> list[Example]:
    solution = text(row, "answer")
    if number(solution) is None:
        raise BadRow("the field 'answer' has no number after ####")
    return answered(f"Question: {text(row, 'question')}\nAnswer:", [solution])


GSM8K = Task(
    name="gsm8k",
    hub="openai/gsm8k",
    config="main",
    splits={"train": "train", "test": "test"},
    examples=examples,
    metrics={"accuracy": same_number, "rouge1": rouge1},
    read=str.strip,
    max_new_tokens=384,
)
