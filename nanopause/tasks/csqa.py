"""CommonsenseQA [Talmor et al. 2019]; the model generates the text of the answer [Goyal et al. 2023]."""

from nanopause.tasks.metrics import exact_match
from nanopause.tasks.task import BadRow, Example, Row, Task, answered, index, text, texts


def examples(row: Row) -> list[Example]:
    choices = texts(row, "choices", "text")
    if "answerKey" in row:
        letters = texts(row, "choices", "label")[: len(choices)]
        if row["answerKey"] not in letters:
            raise BadRow(f"the field 'answerKey' must be one of {', '.join(letters)} and is {row['answerKey']!r}")
        label = letters.index(row["answerKey"])
    else:
        label = index(row, "label", len(choices))
    prefix = f"Question: {text(row, 'question')}\nChoices: {', '.join(choices)}\nAnswer:"
    return answered(prefix, [choices[label]])


CSQA = Task(
    name="csqa",
    hub="tau/commonsense_qa",
    splits={"train": "train", "test": "validation"},
    examples=examples,
    metrics={"exact_match": exact_match},
    max_new_tokens=16,
)
