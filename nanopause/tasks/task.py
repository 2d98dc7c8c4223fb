"""Definition of a task: how rows become examples, how answers are parsed, and how they are scored."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from reprlib import repr as short

from nanopause import sandbox
from nanopause.errors import UserError

Row = dict[str, object]
# Function of a prefix's text and a number of pauses. Returns the target, one token of text or None, of each prefix
# token and of each pause.
Hints = Callable[[str, int], tuple[Sequence[str | None], Sequence[str | None]]]


@dataclass(frozen=True)
class Example:
    """A prefix (prompt) and the target to generate after it.

    White space between them belongs to the target, so that both are tokenized as in the joined text. references: all
    accepted answers, in the form that `Task.read` returns. choices: candidate targets of a task scored by likelihood,
    `target` is choices[label]; None if the answer is generated. tests: a test program that a generated program must
    pass; None if answers are text.
    """

    prefix: str
    target: str
    references: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    label: int | None = None
    tests: str | None = None


def first_line(text: str) -> str:
    """The first line that is not blank, stripped."""
    return text.strip().partition("\n")[0].strip()


@dataclass(frozen=True)
class Task:
    """One task. To add one, write a file like gsm8k.py and list it in nanopause/tasks/__init__.py."""

    name: str
    hub: str
    """Id of the dataset on the hub. Empty: the rows come from `generate`."""
    splits: dict[str, str]
    """"train" and "test" (and "validation", unless it is taken from the training split), and their names on the hub.
    "test" is the split that papers report."""
    examples: Callable[[Row], list[Example]]
    """Converts a row of the hub or of a local file to examples. Raises BadRow."""
    metrics: dict[str, Callable[..., float]]
    """Functions of (answer, references), (log-likelihoods, choices, label) or (program, tests), by name; the primary
    metric first."""
    generate: Callable[[str], Iterable[Row]] | None = None
    """The rows of a split, for tasks with generated data."""
    hints: dict[str, Hints] = field(default_factory=dict)
    """Intermediate results that training can use as targets of the prefix or its pauses, by name (--hints)."""
    document: str = "question"
    """The field that is hashed to assign a row to a part if one split is divided into two."""
    config: str | None = None
    """Configuration of the dataset on the hub."""
    stem: str = ""
    """Prefix of local file names; empty: the task's name."""
    read: Callable[[str], str] = first_line
    """Extracts the answer from generated text."""
    max_new_tokens: int = 0
    """Enough for any answer in GPT-2 tokens; 0: nothing is generated, choices are scored."""
    cut_test: bool = False
    """Without a training split, train on 80 % of the test split and test on the rest."""
    split_of: Callable[[Row], str] | None = None
    """The split of a row, for local files that contain all splits. Raises BadRow."""
    executes_code: bool = False
    """Scoring runs answers as programs; see `permitted`."""
    code_allowed: bool = False

    def permitted(self, allow_code_execution: bool) -> "Task":
        """The task with permission to run model-written code. Raises UserError if the task needs permission and
        allow_code_execution is False, or if programs cannot be isolated."""
        if not self.executes_code:
            return self
        if not allow_code_execution:
            raise UserError(f"{self.name} runs code that a model wrote: allow it by --allow_code_execution")
        sandbox.check()
        return replace(self, code_allowed=True)

    def score(self, answer: str | Sequence[float], example: Example) -> dict[str, float]:
        """All metrics, 0 to 1, the primary one first. answer: the result of `read`, or the log-likelihood of each
        choice in nats. Raises UserError if scoring would run code without permission."""
        if self.executes_code and not self.code_allowed:
            self.permitted(False)
        if example.tests is not None:
            expected = (example.tests,)
        else:
            expected = (example.references,) if example.choices is None else (example.choices, example.label)
        return {name: metric(answer, *expected) for name, metric in self.metrics.items()}


class BadRow(UserError):
    """An invalid row. The text describes the error; `rows.load` adds the location."""


def _field(row: Row, key: str) -> object:
    if row.get(key) is None:
        raise BadRow(f"the field {key!r} is missing")
    return row[key]


def text(row: Row, key: str, *, blank: bool = False) -> str:
    """A field's text, stripped. Raises BadRow if it is missing, not text, or blank (unless allowed by `blank`)."""
    value = _field(row, key)
    if not isinstance(value, str):
        raise BadRow(f"the field {key!r} must be text and is {short(value)}")
    if not (blank or value.strip()):
        raise BadRow(f"the field {key!r} is empty")
    return value.strip()


def texts(row: Row, key: str, subkey: str = "", *, blank: bool = False) -> list[str]:
    """A field's list of texts, stripped. subkey: key of the texts in a list of dictionaries or a dictionary of lists.

    Raises BadRow if it is missing, not a list of texts, empty, or has a blank text (unless allowed by `blank`).
    """
    value = _field(row, key)
    if isinstance(value, dict):
        value = value.get(subkey)
    elif isinstance(value, list):
        value = [item.get(subkey) if isinstance(item, dict) else item for item in value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRow(f"the field {key!r} must be a list of texts and is {short(row[key])}")
    if not value or not (blank or all(item.strip() for item in value)):
        raise BadRow(f"the field {key!r} has {'an empty text' if value else 'no text'}")
    return [item.strip() for item in value]


def index(row: Row, key: str, n: int) -> int:
    """A field's index of a choice, an integer or its digits. Raises BadRow if it is missing or not 0 to n − 1."""
    value = _field(row, key)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
        raise BadRow(f"the field {key!r} must be 0 to {n - 1} and is {short(value)}")
    return value


def answered(prefix: str, references: Sequence[str]) -> list[Example]:
    """One example with a generated answer; the first reference is the target."""
    return [Example(prefix, f" {references[0]}", tuple(references))]


def chosen(prefix: str, choices: Sequence[str], label: int) -> list[Example]:
    """One example with choices scored by likelihood."""
    targets = tuple(f" {choice}" for choice in choices)
    return [Example(prefix, targets[label], (choices[label],), targets, label)]
