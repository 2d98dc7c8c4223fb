import subprocess
import sys
from importlib import import_module

import tyro

import bench
from bench import harness
from nanopause.errors import UserError, run

TIMED = ("attention", "finetune", "generate", "loss", "pause_cost", "train")
NAMES = (*TIMED, "report", "resources")


def main() -> None:
    name, *options = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(f"{bench.__doc__}\nBenches: {', '.join(NAMES)}, all. `python -m bench NAME --help` lists the options.")
    elif name == "all":
        run_all(options)
    elif name in NAMES:
        module = import_module(f"bench.{name}")
        command = harness.Options if name in TIMED else module.main
        parsed = tyro.cli(command, args=options, prog=f"python -m bench {name}", description=module.__doc__,
                          use_underscores=True)  # fmt: skip
        if name in TIMED:
            harness.Bench(name, parsed).run(module)
    else:
        raise UserError(f"{name!r} is not a bench: choose {', '.join(NAMES)}, or all")


def run_all(options: list[str]) -> None:
    """Run each timed bench in its own process. Raises UserError at the end if a bench failed."""
    failed = []
    for name in TIMED:
        print(f"\npython -m bench {' '.join([name, *options])}", file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, "-m", "bench", name, *options]).returncode:
            failed.append(name)
    if failed:
        raise UserError(f"{len(failed)} of {len(TIMED)} benches failed, with the errors above: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
