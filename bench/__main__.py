import importlib
import inspect
import pkgutil
import sys

import tyro

import bench
from nanopause.errors import UserError, run

NAMES = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if module.name[0] != "_")
NAMES.remove("harness")


def main() -> None:
    name, *options = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(f"{bench.__doc__}\nBenches: {', '.join(NAMES)}. `python -m bench NAME --help` has the options of one.")
        return
    if name not in (*NAMES, "all"):
        raise UserError(f"{name!r} is not a bench: choose {', '.join(NAMES)}, or all")
    for each in NAMES if name == "all" else [name]:
        function = importlib.import_module(f"bench.{each}").main
        # A module that has no --quick, such as one that draws figures, measures nothing.
        if name != "all" or "quick" in inspect.signature(function).parameters:
            tyro.cli(function, args=options, prog=f"python -m bench {each}", use_underscores=True)


run(main)
