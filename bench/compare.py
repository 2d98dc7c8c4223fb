"""Two sets of results side by side: folders, or commits of this repository.

A folder is one of bench/results/<device>/, or holds several. Of results from one device each, what is compared is told
by the bench alone; otherwise by device and bench. Times are the medians, in milliseconds.
"""

import json
import subprocess
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.table import Table

from bench.harness import DASH, ROOT, console, label, number
from nanopause.errors import UserError

Times = dict[tuple[str, str, str], float]  # milliseconds by pass, shape and name
Found = dict[tuple[str, str], Times]  # by device's folder and bench


def load(name: str) -> Found:
    """The results of a folder or a commit. Raises UserError where it is neither, or has none."""
    folder = Path(name)
    if folder.is_dir():
        texts = {file: file.read_text() for file in sorted(folder.rglob("*.json"))}
    else:
        listed = _git("ls-tree", "-r", "--name-only", f"{name}^{{commit}}", "bench/results")
        if listed is None:
            raise UserError(f"{name} is neither a folder nor a commit of this repository")
        files = [file for file in listed.splitlines() if file.endswith(".json")]
        texts = {Path(file): _git("show", f"{name}:{file}") for file in files}
    found: Found = {}
    for file, text in texts.items():
        try:
            rows = [row for row in json.loads(text)["rows"] if "p50_ms" in row]
            times = {(row["what"], label(row["shape"]), row["name"]): row["p50_ms"] for row in rows}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file} of {name} is not a result of a bench: leave it out or run the bench anew"
            ) from None
        if times:
            found[file.parent.name, file.stem] = times
    if not found:
        raise UserError(f"{name} holds no results: give a folder such as bench/results/<device>, or a later commit")
    return found


def _git(*arguments: str) -> str | None:
    ended = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return None if ended.returncode else ended.stdout


def by_bench(a: Found, b: Found) -> tuple[dict[str, Times], dict[str, Times]]:
    """Both by what they have in common: the bench, or the device and the bench where either has several devices."""
    alone = all(len({device for device, _ in found}) == 1 for found in (a, b))
    return tuple({bench if alone else f"{device} {bench}": times for (device, bench), times in found.items()}
                 for found in (a, b))  # fmt: skip


def main(a: Annotated[str, tyro.conf.Positional], b: Annotated[str, tyro.conf.Positional]) -> None:
    """Set two folders of results, or two commits, side by side.

    Args:
        a: A folder, or a commit.
        b: Another.
    """
    of_a, of_b = by_bench(load(a), load(b))
    screen = console()
    for bench in [bench for bench in of_a if bench in of_b]:
        table = Table(title=f"{bench}: ms of {a} and of {b}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column()
        for column in ("a", "b", "b/a"):
            table.add_column(column, justify="right")
        for key in dict.fromkeys((*of_a[bench], *of_b[bench])):
            ms = of_a[bench].get(key), of_b[bench].get(key)
            table.add_row(" ".join(key), *map(number, ms), DASH if None in ms else f"{ms[1] / ms[0]:.2f}")
        screen.print(table, markup=False)
    for name, mine, other in ((a, of_a, of_b), (b, of_b, of_a)):
        if only := [bench for bench in mine if bench not in other]:
            screen.print(f"only {name} has {', '.join(only)}", markup=False)
