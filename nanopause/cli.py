"""Command lines: `--key=value` of a dataclass's fields, as nanoGPT writes them."""

import re
from dataclasses import fields
from typing import TypeVar

import tyro

T = TypeVar("T")
LIST = re.compile(r"[^\[\]=, ]+")  # of --key=1,2 or --key=[1, 2]: the key and the values


def parse(settings: type[T], args: list[str], prog: str, description: str | None = None) -> T:
    """The dataclass `settings` from --key=value; a boolean key alone means True, a list has commas.

    A wrong argument ends the program with exit code 2, its name and the nearest one that exists."""
    booleans = {f"--{field.name}" for field in fields(settings) if field.type in (bool, bool | None)}
    args = [f"{arg}=True" if arg in booleans else arg for arg in args]
    lists = tuple(f"--{field.name}=" for field in fields(settings) if str(field.type).startswith("list["))
    args = [part for arg in args for part in (LIST.findall(arg) if arg.startswith(lists) else [arg])]
    return tyro.cli(settings, prog=prog, args=args, description=description, config=(tyro.conf.FlagConversionOff,),
                    use_underscores=True)  # fmt: skip
