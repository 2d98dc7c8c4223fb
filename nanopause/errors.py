"""User errors and system errors, reported in one sentence without a traceback."""

import importlib
import os
import sys
from collections.abc import Callable
from numbers import Integral, Real
from types import ModuleType


class UserError(Exception):
    """Invalid input. The text is one sentence: what is wrong, where, and how to fix it."""


def check(name: str, value: float, low: float, high: float) -> None:
    """Raises UserError unless value is a number and low ≤ value ≤ high."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}={value!r} must be a number")
    if not low <= value <= high:
        raise UserError(f"{name}={value} must be {low} to {high}")


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Raises UserError unless value is a whole number and low ≤ value ≤ high."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name}={value!r} must be a whole number")
    check(name, value, low, high)


def needs(package: str, extra: str) -> ModuleType:
    """Import a package that is installed with the named extra of nanopause. Raises UserError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is not installed: pip install -e '.[{extra}]'") from None


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], None]) -> None:
    """Run a script's main. UserError and OSError print one sentence to stderr and exit with code 1;
    KeyboardInterrupt with 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of stdout has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {os.strerror(error.errno) if error.errno else error}{where}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        sys.exit(130)
