import importlib
import inspect
import pkgutil
import subprocess
import sys
from time import perf_counter

import tyro

import bench
from nanopause.errors import UserError, run

NAMES = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if module.name[0] != "_")
NAMES.remove("harness")


def main_of(name: str):
    return importlib.import_module(f"bench.{name}").main


def main() -> None:
    name, *options = sys.argv[1:] or [""]
    if name in ("-h", "--help") or (name == "all" and {"-h", "--help"} & {*options}):
        print(f"{bench.__doc__}\nBenches: {', '.join(NAMES)}. `python -m bench NAME --help` has the options of one; "
              f"all takes those of each.")  # fmt: skip
    elif name == "all":
        run_all(options)
    elif name in NAMES:
        tyro.cli(main_of(name), args=options, prog=f"python -m bench {name}", use_underscores=True)
    else:
        raise UserError(f"{name!r} is not a bench: choose {', '.join(NAMES)}, or all")


def run_all(options: list[str]) -> None:
    """Every bench that measures, which is what has --quick, in a process of its own, with those of the options that it
    has. Raises UserError at the end if any failed."""
    print("left out: resources, which compiles for GPUs that are not there, in half an hour", file=sys.stderr)
    keys = {name: set(inspect.signature(main_of(name)).parameters) for name in NAMES if name != "resources"}
    keys = {name: its for name, its in keys.items() if "quick" in its}
    of_option = {option: option.lstrip("-").partition("=")[0].replace("-", "_") for option in options}
    for option, key in of_option.items():
        if not any(key in its for its in keys.values()):
            raise UserError(f"{option} is an option of no bench: write --quick, or --key=value as one of them has it")
    failed, seconds = [], {}
    for name, its in keys.items():
        mine = [option for option, key in of_option.items() if key in its]
        print(f"\npython -m bench {' '.join([name, *mine])}", file=sys.stderr, flush=True)
        begun = perf_counter()
        with subprocess.Popen([sys.executable, "-m", "bench", name, *mine]) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # which it has heard too: it ends its call and writes what there is
                process.wait()
                raise
        if code:
            failed.append(name)
        seconds[name] = perf_counter() - begun
    each = ", ".join(f"{name} {n:.0f}" for name, n in seconds.items())
    print(f"\n{sum(seconds.values()):.0f} s: {each}", file=sys.stderr)
    if failed:
        raise UserError(f"of {len(keys)} benches {len(failed)} failed, as they say above: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
