"""What a person did wrong or a machine ran out of, told in one sentence."""

import importlib
import os
import sys
from collections.abc import Callable
from numbers import Integral
from types import ModuleType


class UserError(Exception):
    """Bad input. Its text is one sentence: what is wrong, where, and how to mend it."""


def check(name: str, value: float, low: float, high: float) -> None:
    """Raises UserError unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise UserError(f"{name}={value} must be {low} to {high}")


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Raises UserError unless it is a whole number, low ≤ value ≤ high."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name}={value!r} must be a whole number")
    check(name, value, low, high)


def needs(package: str, extra: str) -> ModuleType:
    """A package that an extra of ours brings. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is not installed: pip install -e '.[{extra}]'") from None


def run(main: Callable[[], None]) -> None:
    """Run a script's main: bad input and failing disks end in one sentence on stderr and exit code 1."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {os.strerror(error.errno) if error.errno else error}{where}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
