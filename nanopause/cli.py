"""Command lines: `--key=value` of a dataclass's fields, as nanoGPT writes them."""

from dataclasses import fields
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(settings: type[T], args: list[str], prog: str, description: str | None = None) -> T:
    """The dataclass `settings` from --key=value; a boolean key alone means True.

    A wrong argument ends the program with exit code 2, its name and the nearest one that exists."""
    booleans = {f"--{field.name}" for field in fields(settings) if field.type in (bool, bool | None)}
    args = [f"{arg}=True" if arg in booleans else arg for arg in args]
    return tyro.cli(settings, prog=prog, args=args, description=description, config=(tyro.conf.FlagConversionOff,),
                    use_underscores=True)  # fmt: skip
