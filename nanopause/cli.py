"""Command lines in nanoGPT's form: `--key=value` for each field of a dataclass."""

import re
from dataclasses import fields
from typing import TypeVar

import tyro

T = TypeVar("T")
LIST = re.compile(r"[^\[\]=, ]+")  # matches the key and each value of --key=1,2 or --key=[1, 2]


def parse(settings: type[T], args: list[str], prog: str, description: str | None = None) -> T:
    """Parse --key=value arguments into the dataclass `settings`. A boolean key without a value is True; list values are
    separated by commas.

    An invalid argument exits with code 2 and prints its name and the nearest valid one."""
    booleans = {f"--{field.name}" for field in fields(settings) if field.type in (bool, bool | None)}
    args = [f"{arg}=True" if arg in booleans else arg for arg in args]
    lists = tuple(f"--{field.name}=" for field in fields(settings) if str(field.type).startswith("list["))
    args = [part for arg in args for part in (LIST.findall(arg) if arg.startswith(lists) else [arg])]
    return tyro.cli(settings, prog=prog, args=args, description=description, config=(tyro.conf.FlagConversionOff,),
                    use_underscores=True)  # fmt: skip
