"""Command lines in nanoGPT's form: `--key=value` for each field of a dataclass."""

import ast
import inspect
import re
import shutil
import textwrap
from dataclasses import field, fields, make_dataclass
from functools import lru_cache
from itertools import groupby
from typing import Annotated, TypeVar

import tyro

T = TypeVar("T")
LIST = re.compile(r"[^\[\]=, ]+")  # matches the key and each value of --key=1,2 or --key=[1, 2]
CONFIG = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)


def parse(settings: type[T], args: list[str], prog: str, description: str | None = None) -> T:
    """Parse --key=value arguments into the dataclass `settings`. A boolean key without a value is True; list values are
    separated by commas. --help prints the description, then the keys with their docstrings. A class variable `GROUPS`
    of the dataclass, {title: first key}, divides them into groups, shown in the order of GROUPS.

    An invalid argument exits with code 2 and prints its name, and a similar valid one if tyro finds any."""
    if {"-h", "--help"} & {*args}:
        print(filled(inspect.cleandoc(description or settings.__doc__), shutil.get_terminal_size().columns) + "\n")
    booleans = {f"--{each.name}" for each in fields(settings) if each.type in (bool, bool | None)}
    args = [f"{arg}=True" if arg in booleans else arg for arg in args]
    lists = tuple(f"--{each.name}=" for each in fields(settings) if str(each.type).startswith("list["))
    args = [part for arg in args for part in (LIST.findall(arg) if arg.startswith(lists) else [arg])]
    parsed = tyro.cli(_grouped(settings), prog=prog, args=args, description="", config=CONFIG, use_underscores=True)
    groups = [getattr(parsed, title) for title in getattr(settings, "GROUPS", ())] or [parsed]
    return settings(**{key: value for group in groups for key, value in vars(group).items()})


def filled(text: str, width: int) -> str:
    """Text with its paragraphs filled to the width. Indented lines, such as examples, stay as they are."""
    parts = []
    for is_kept, lines in groupby(text.splitlines(), lambda line: not line or line[0].isspace()):
        if is_kept:
            parts += lines
        else:
            parts.append(textwrap.fill(" ".join(lines), width, break_long_words=False, break_on_hyphens=False))
    return "\n".join(parts)


@lru_cache
def _grouped(settings: type) -> type:
    """A dataclass with the fields of `settings`, or with one dataclass per group, for tyro, which has a group for every
    nested dataclass. Help texts are joined to one line, which tyro breaks at the width of the terminal."""
    docs, group_titles = _docstrings(settings), getattr(settings, "GROUPS", {})
    title_of = {first: title for title, first in group_titles.items()}
    groups = {title: [] for title in group_titles}
    title = ""
    for each in fields(settings):
        title = title_of.get(each.name, title)
        kind = Annotated[each.type, tyro.conf.arg(help=docs.get(each.name, ""))]
        default = field(default=each.default, default_factory=each.default_factory)
        groups.setdefault(title, []).append((each.name, kind, default))
    no_text = {"__doc__": ""}
    parts = {title: make_dataclass(title or "options", members, namespace=no_text) for title, members in groups.items()}
    return make_dataclass("Groups", parts.items(), namespace=no_text) if group_titles else parts[""]


def _docstrings(settings: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of the classes that it extends, as one line."""
    docs = {}
    for kind in (kind for kind in reversed(settings.__mro__) if "__dataclass_fields__" in vars(kind)):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        for assignment, text in zip(body, body[1:]):
            if isinstance(assignment, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[assignment.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docs
