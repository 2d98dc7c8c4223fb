"""CoQA: a conversation about a story, an example a turn [Reddy et al. 2019]."""

from reprlib import repr as short

from nanopause.tasks.metrics import coqa_exact_match, coqa_f1
from nanopause.tasks.task import BadRow, Example, Row, Task, answered, text, texts


def turns(row: Row) -> list[tuple[str, list[str]]]:
    """(question, accepted answers) of each turn, of a local row or one of the hub."""
    if "turns" in row:
        if not isinstance(row["turns"], list) or not all(isinstance(turn, dict) for turn in row["turns"]):
            raise BadRow(f"the field 'turns' must be a list of turns and is {short(row['turns'])}")
        return [(text(turn, "question"), texts(turn, "answers")) for turn in row["turns"]]
    people, others = [texts(row, "answers", "input_text")], row.get("additional_answers") or {}
    if not isinstance(others, dict):
        raise BadRow(f"the field 'additional_answers' must name the people and is {short(others)}")
    for person in others:
        answers = texts(others, person, "input_text", blank=True)
        if any(answers):  # the training split, which one person answered, has a blank in the place of the others
            people.append(answers)
    questions = texts(row, "questions", "input_text")
    if {len(answers) for answers in people} != {len(questions)}:
        raise BadRow(f"the {len(questions)} questions have not as many answers")
    return [(question, answers) for question, *answers in zip(questions, *people)]


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
