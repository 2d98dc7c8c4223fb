"""CoQA: a conversation about a story, one example per turn [Reddy et al. 2019]."""

from reprlib import repr as short

from nanopause.tasks.metrics import coqa_exact_match, coqa_f1
from nanopause.tasks.task import BadRow, Example, Row, Task, answered, text, texts


def turns(row: Row) -> list[tuple[str, list[str]]]:
    """(question, accepted answers) of each turn, from a local row or a row of the hub's dataset."""
    if "turns" in row:
        if not isinstance(row["turns"], list) or not all(isinstance(turn, dict) for turn in row["turns"]):
            raise BadRow(f"the field 'turns' must be a list of turns and is {short(row['turns'])}")
        return [(text(turn, "question"), texts(turn, "answers")) for turn in row["turns"]]
    by_annotator = [texts(row, "answers", "input_text")]
    additional = row.get("additional_answers") or {}
    if not isinstance(additional, dict):
        raise BadRow(f"the field 'additional_answers' must map annotators to answers and is {short(additional)}")
    for annotator in additional:
        answers = texts(additional, annotator, "input_text", blank=True)
        if any(answers):  # the training split has one annotator; the additional answers are blank
            by_annotator.append(answers)
    questions = texts(row, "questions", "input_text")
    if {len(answers) for answers in by_annotator} != {len(questions)}:
        raise BadRow(f"the number of answers differs from the number of questions, {len(questions)}")
    return [(question, answers) for question, *answers in zip(questions, *by_annotator)]


def examples(row: Row) -> list[Example]:
    prefix, found = text(row, "story") + "\n", []
    for question, answers in turns(row):
        prefix += f"\nQ: {question}\nA:"
        found += answered(prefix, answers)
        prefix += f" {answers[0]}"
    return found


COQA = Task(
    name="coqa",
    hub="EleutherAI/coqa",
    splits={"train": "train", "test": "validation"},
    examples=examples,
    metrics={"f1": coqa_f1, "exact_match": coqa_exact_match},
    document="story",
    max_new_tokens=64,
    cut_test=True,
)
