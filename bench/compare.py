"""Two sets of results side by side: folders, or commits of this repository.

A folder is one of bench/results/<device>/, or holds several. Of results from one device each, what is compared is told
by the bench alone; otherwise by device and bench. Times are the medians, in milliseconds; those of different hours say
less than the ratios beside ours, which had their turns in the same minutes.
"""

import json
import subprocess
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich import box
from rich.table import Table

from bench.harness import DASH, ROOT, console, label, number
from nanopause.errors import UserError


class Measured(NamedTuple):
    """of: where and when. rows: milliseconds and the ratio beside ours, by pass, shape and name."""

    of: str
    rows: dict[tuple[str, str, str], tuple[float, float]]


Found = dict[tuple[str, str], Measured]  # by device's folder and bench


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
            result = json.loads(text)
            rows = {(row["what"], label(row["shape"]), row["name"]): (row["p50_ms"], row["ratio"])
                    for row in result["rows"] if "p50_ms" in row}  # fmt: skip
            changes = " with changes" * bool(result.get("dirty"))
            of = f"{result.get('device')}, {result.get('date')}, commit {(result.get('commit') or DASH)[:7]}{changes}"
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file} of {name} is not a result of a bench: leave it out or run the bench anew"
            ) from None
        if rows:
            found[file.parent.name, file.stem] = Measured(of, rows)
    if not found:
        raise UserError(f"{name} holds no results: give a folder such as bench/results/<device>, or a later commit")
    return found


def _git(*arguments: str) -> str | None:
    ended = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return None if ended.returncode else ended.stdout


def by_bench(a: Found, b: Found) -> tuple[dict[str, Measured], dict[str, Measured]]:
    """Both by what they have in common: the bench, or the device and the bench where either has several devices."""
    alone = all(len({device for device, _ in found}) == 1 for found in (a, b))
    return tuple({bench if alone else f"{device} {bench}": its for (device, bench), its in found.items()}
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
        x, y = of_a[bench], of_b[bench]
        table = Table(title=f"{bench}: ms, and how many times ours", title_justify="left", box=box.SIMPLE_HEAD,
                      pad_edge=False)  # fmt: skip
        table.add_column()
        for column in ("a", "b", "b/a", "a's ratio", "b's ratio"):
            table.add_column(column, justify="right")
        for key in dict.fromkeys((*x.rows, *y.rows)):
            ms, ratios = zip(x.rows.get(key, (None, None)), y.rows.get(key, (None, None)))
            table.add_row(" ".join(key), *map(number, ms), DASH if None in ms else f"{ms[1] / ms[0]:.2f}",
                          *map(number, ratios))  # fmt: skip
        screen.print(table, markup=False)
        same = ": the same measurement" * (x == y)
        screen.print(f"a: {a}: {x.of}\nb: {b}: {y.of}{same}\n", markup=False, soft_wrap=True)
    for name, mine, other in ((a, of_a, of_b), (b, of_b, of_a)):
        if only := [bench for bench in mine if bench not in other]:
            screen.print(f"only {name} has {', '.join(only)}", markup=False)
