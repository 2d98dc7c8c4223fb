"""MBPP: short Python programs from a one-sentence description and three tests [Austin et al. 2021]."""

from nanopause.tasks.metrics import passes
from nanopause.tasks.task import BadRow, Example, Row, Task, text, texts

TEST, VALIDATION = range(11, 511), range(511, 601)  # task_id [Austin et al., section 2.1]; 1 to 10 are prompts


def lines(code: str) -> str:
    """The code with Unix line ends and without trailing white space."""
    return "\n".join(line.rstrip() for line in code.splitlines())


def examples(row: Row) -> list[Example]:
    tests, code = texts(row, "test_list"), lines(text(row, "code"))
    prefix = (
        f"You are an expert Python programmer, and here is your task: {text(row, 'text')} "
        f"Your code should pass these tests:\n\n" + "\n".join(tests) + "\n[BEGIN]"
    )
    setup = lines(text(row, "test_setup_code", blank=True))  # runs after the program, as it uses its definitions
    return [Example(prefix, f"\n{code}", (code,), tests="\n".join([setup, *tests]))]


def program(generated: str) -> str:
    """The generated text before [DONE], which ends a program in the paper's prompt."""
    return generated.partition("[DONE]")[0].strip()


def split_of(row: Row) -> str:
    """The split of a row by its task_id, or "prompt" for the paper's prompt examples. Raises BadRow."""
    number = row.get("task_id")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise BadRow(f"the field 'task_id' must be a number from 1 and is {number!r}")
    if number <= 10:
        return "prompt"
    return "test" if number in TEST else "validation" if number in VALIDATION else "train"


MBPP = Task(
    name="mbpp",
    hub="google-research-datasets/mbpp",
    config="full",
    splits={"train": "train", "validation": "validation", "test": "test"},
    examples=examples,
    metrics={"pass@1": passes},
    document="text",
    read=program,
    max_new_tokens=800,
    split_of=split_of,
    executes_code=True,
)
