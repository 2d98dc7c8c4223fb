"""The commands of an installed nanopause; in a clone `python train.py` is the same as `nanopause train`.

nanopause prepare --files=my.txt --name=my
nanopause train config/pause.py
nanopause sample --prompt="Return a" --pauses=10
nanopause evaluate --out_dir=out/gsm8k --tasks=gsm8k --pauses=0,10
"""

import sys
from importlib import import_module

from nanopause import errors

COMMANDS = {
    "prepare": "nanopause.scripts.data.text",
    "train": "nanopause.scripts.train",
    "sample": "nanopause.scripts.sample",
    "evaluate": "nanopause.scripts.evaluate",
    "compare": "nanopause.compare",
    "export": "nanopause.hub",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        sys.exit(f"usage: nanopause {'|'.join(COMMANDS)} …; nanopause train --help shows a command's settings")
    del sys.argv[1]
    errors.run(import_module(COMMANDS[name]).main)


if __name__ == "__main__":
    main()
