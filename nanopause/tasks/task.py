"""What a task is: how a row becomes prefix and target, how an answer is read, how it is scored."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from reprlib import repr as short

from nanopause import sandbox
from nanopause.errors import UserError

Row = dict[str, object]
# Of a prefix's text and a number of pauses: one token of text, or None, as the target of each prefix token, then of
# each pause.
Hints = Callable[[str, int], tuple[Sequence[str | None], Sequence[str | None]]]


@dataclass(frozen=True)
class Example:
    """A prefix to read and the target to write after it.

    The prefix does not end in white space and the target begins with it, so that their tokens are those of the joined
    text. references: every accepted answer, as `Task.read` gives it. choices: the candidate targets of a task that is
    scored by their likelihood, `target` being choices[label]; None where the answer is generated. tests: a program that
    an answer that is one must pass; None where answers are text.
    """

    prefix: str
    target: str
    references: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    label: int | None = None
    tests: str | None = None


def first_line(text: str) -> str:
    """The first line that is not blank, without the spaces around it."""
    return text.strip().partition("\n")[0].strip()


@dataclass(frozen=True)
class Task:
    """One task. Adding another is a file like gsm8k.py and its name in nanopause/tasks/__init__.py."""

    name: str
    hub: str
    """Id of the dataset on the hub; config is its configuration there. Empty: `generate` makes the rows."""
    splits: dict[str, str]
    """"train" and "test" (and "validation", where it is not cut from the training split), and what the hub calls them.
    "test" is the split that papers report."""
    examples: Callable[[Row], list[Example]]
    """A row of the hub or of a local file to its examples. Raises BadRow."""
    metrics: dict[str, Callable[..., float]]
    """Name to function of (answer, references), of (log-likelihoods, choices, label) or of (program, tests); the
    primary one first."""
    generate: Callable[[str], Iterable[Row]] | None = None
    """The rows of a split, of a task that is computed and needs no data."""
    hints: dict[str, Hints] = field(default_factory=dict)
    """Intermediate results that training can give as targets to the prefix or to its pauses, by name (--hints)."""
    document: str = "question"
    """The field whose text decides, by a hash, the part that a row falls into where one split is cut into two."""
    config: str | None = None
    stem: str = ""
    """What the names of local files begin with; empty: the task's name."""
    read: Callable[[str], str] = first_line
    """Generated text to the answer."""
    max_new_tokens: int = 0
    """Enough for the answer in tokens of GPT-2; 0: nothing is generated, choices are scored."""
    cut_test: bool = False
    """Train on 80 % of the test split where there is no training split, and test on the rest."""
    split_of: Callable[[Row], str] | None = None
    """The split of a row, where one local file without a split in its name has them all. Raises BadRow."""
    executes_code: bool = False
    """Scoring runs answers as programs; see `permitted`."""
    code_allowed: bool = False

    def permitted(self, allow_code_execution: bool) -> "Task":
        """The task, with the user's leave to run what a model wrote. Raises UserError where it needs that and has none,
        or where programs cannot be isolated."""
        if not self.executes_code:
            return self
        if not allow_code_execution:
            raise UserError(f"{self.name} runs code that a model wrote: allow it by --allow_code_execution")
        sandbox.check()
        return replace(self, code_allowed=True)

    def score(self, answer: str | Sequence[float], example: Example) -> dict[str, float]:
        """Every metric, 0 to 1, the primary one first. answer: what `read` gave, or each choice's log-likelihood.
        Raises UserError where that would run code and the task is not `permitted` to."""
        if self.executes_code and not self.code_allowed:
            self.permitted(False)
        if example.tests is not None:
            truth = (example.tests,)
        else:
            truth = (example.references,) if example.choices is None else (example.choices, example.label)
        return {name: metric(answer, *truth) for name, metric in self.metrics.items()}


class BadRow(UserError):
    """What is wrong with a row; who reads the file adds where."""


def _field(row: Row, key: str) -> object:
    if row.get(key) is None:
        raise BadRow(f"the field {key!r} is missing")
    return row[key]


def text(row: Row, key: str, *, blank: bool = False) -> str:
    """A field's text without the white space around it. Raises BadRow: not there, not text, or blank."""
    value = _field(row, key)
    if not isinstance(value, str):
        raise BadRow(f"the field {key!r} must be text and is {short(value)}")
    if not (blank or value.strip()):
        raise BadRow(f"the field {key!r} is empty")
    return value.strip()


def texts(row: Row, key: str, inside: str = "", *, blank: bool = False) -> list[str]:
    """A field's list of texts, stripped. inside: their name where they are dictionaries, or lists in a dictionary.

    Raises BadRow: not there, not such a list, without a text, or with a blank one.
    """
    value = _field(row, key)
    if isinstance(value, dict):
        value = value.get(inside)
    elif isinstance(value, list):
        value = [item.get(inside) if isinstance(item, dict) else item for item in value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRow(f"the field {key!r} must be a list of texts and is {short(row[key])}")
    if not value or not (blank or all(item.strip() for item in value)):
        raise BadRow(f"the field {key!r} has {'an empty text' if value else 'no text'}")
    return [item.strip() for item in value]


def index(row: Row, key: str, n: int) -> int:
    """A field's number of a choice, an integer or its digits. Raises BadRow: not there, or not 0 to n − 1."""
    value = _field(row, key)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
        raise BadRow(f"the field {key!r} must be 0 to {n - 1} and is {short(value)}")
    return value


def answered(prefix: str, references: Sequence[str]) -> list[Example]:
    """The example of a generated answer; the first reference is the target."""
    return [Example(prefix, f" {references[0]}", tuple(references))]


def chosen(prefix: str, choices: Sequence[str], label: int) -> list[Example]:
    """The example of a choice by likelihood."""
    targets = tuple(f" {choice}" for choice in choices)
    return [Example(prefix, targets[label], (choices[label],), targets, label)]
