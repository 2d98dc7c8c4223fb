"""Results of an evaluation: means and paired differences with 95% intervals, the table and the figure.

A *figure* here is a number and its interval: {"value", "low", "high"}, the last two None where there is no interval.
A *row* has the figures and costs of one task with one number of pauses: see `summary`.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from nanopause.intervals import Interval, bootstrap_interval, is_binary, mcnemar, normal_interval, t_interval, wilson

NOTE = (
    "brackets: 95% intervals: Wilson's where every score is 0 or 1, Student's t for other means, 1.96 standard errors "
    "for other metrics, the percentile bootstrap for a difference; no brackets: all values are equal, or examples have "
    "no scores of their own; p: McNemar's exact test"
)


def figure(value: float, interval: Interval | None) -> dict:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high}


def mean(scores: list[float]) -> dict:
    """The mean of scores of independent examples. The interval of scores in [0, 1] stays within [0, 1]."""
    value = math.fsum(scores) / len(scores)
    if is_binary(scores):
        return figure(value, wilson(round(math.fsum(scores)), len(scores)))
    interval = t_interval(scores)
    if interval and 0 <= min(scores) <= max(scores) <= 1:
        interval = max(0.0, interval[0]), min(1.0, interval[1])
    return figure(value, interval)


def paired_difference(scores: list[float], base: list[float]) -> dict:
    """The mean difference of two scores of each example, and "p" of McNemar's test; None unless every score is 0 or
    1."""
    gains = [x - y for x, y in zip(scores, base)]
    p = mcnemar(sum(x > 0 for x in gains), sum(x < 0 for x in gains)) if is_binary([*scores, *base]) else None
    return figure(math.fsum(gains) / len(gains), bootstrap_interval(gains)) | {"p": p}


def summaries(examples: Iterable[dict]) -> list[dict]:
    """A row for every task and number of pauses that has all of the task's examples (lines of examples.jsonl).
    Differences are to the row with the fewest pauses, which comes first."""
    cells: dict[str, dict[int, dict[int, dict]]] = {}
    for example in examples:
        by_pauses = cells.setdefault(example["task"], {})
        by_pauses.setdefault(example["pauses"], {})[example["index"]] = example
    rows = []
    for by_pauses in cells.values():
        n = max(map(len, by_pauses.values()))
        complete = [by_pauses[pauses] for pauses in sorted(by_pauses) if len(by_pauses[pauses]) == n]
        rows += [summary(cell, complete[0] if cell is not complete[0] else None) for cell in complete]
    return rows


def summary(cell: dict[int, dict], first: dict[int, dict] | None = None) -> dict:
    """The row of examples by index. first: the examples with the fewest pauses, to which the difference of the primary
    metric is taken, paired by example."""
    examples = list(cell.values())
    n, names = len(examples), list(examples[0]["scores"])

    def per_example(key: str) -> float:
        return sum(example["tokens"][key] for example in examples) / n

    row = {
        "task": examples[0]["task"],
        "by": "nanopause",
        "pauses": examples[0]["pauses"],
        "n": n,
        "metrics": {name: mean([example["scores"][name] for example in examples]) for name in names},
        "n_cut": sum(example["tokens"]["cut"] > 0 for example in examples),
        "max_new_tokens": examples[0]["tokens"]["limit"],
        "n_unfinished": sum(end in ("length", "context") for example in examples for end in example.get("ends", ())),
        "prompt_tokens": per_example("prompt"),
        "generated_tokens": per_example("generated"),
        "pauses_per_example": per_example("pauses"),
        "flops_per_example": sum(example["flops"] for example in examples) / n,
        "seconds_per_example": sum(example["seconds"] for example in examples) / n,
    }
    if first:
        scores = [(cell[i]["scores"][names[0]], first[i]["scores"][names[0]]) for i in cell]
        row["difference"] = paired_difference(*map(list, zip(*scores)))
    return row


def described(cell: dict[int, dict]) -> str:
    """The scores of examples by index, and what limits them, in one line."""
    row = summary(cell)
    text = "; ".join(f"{metric} {format_figure(figure)}" for metric, figure in row["metrics"].items())
    if row["pauses_per_example"] != row["pauses"]:
        text += f"; {row['pauses_per_example']:.3g} pauses per example"
    if row["n_cut"]:
        text += f"; {row['n_cut']:,} of {row['n']:,} prompts cut to fit"
    if row["n_unfinished"]:
        text += f"; {row['n_unfinished']:,} answers reached their limit of {row['max_new_tokens']} tokens"
    return text


def harness_summaries(rows: Iterable[dict]) -> list[dict]:
    """Rows by task and number of pauses from those of `nanopause.harness.evaluate`. A metric that is not the mean of
    scores of single examples, such as a perplexity, has the interval of its standard error, and none for a
    difference."""
    first, found = {}, []
    for row in sorted(rows, key=lambda row: (row["task"], row["pauses"])):
        metrics = {
            name: mean(metric["scores"]) if metric["scores"]
            else figure(metric["value"], normal_interval(metric["value"], metric["stderr"]))
            for name, metric in row["metrics"].items()
        }  # fmt: skip
        found.append({**row, "metrics": metrics})
        primary = next(iter(metrics))
        base = first.setdefault(row["task"], row)["metrics"][primary]
        if first[row["task"]] is not row:
            more = row["metrics"][primary]
            found[-1]["difference"] = (
                paired_difference(more["scores"], base["scores"]) if more["scores"] and base["scores"]
                else figure(more["value"] - base["value"], None) | {"p": None}
            )  # fmt: skip
    return found


def format_figure(figure: dict | None, sign: str = "") -> str:
    """value [low, high]; the value alone if there is no interval. sign: "+" gives positive numbers a sign too."""
    if figure is None:
        return "–"
    shown = [figure["value"]] if figure["low"] is None else [figure["value"], figure["low"], figure["high"]]
    digits = 4 if max(map(abs, shown)) < 10 else 2
    value, *limits = (f"{number:{sign}.{digits}f}" for number in shown)
    return f"{value} [{', '.join(limits)}]" if limits else value


def format_p(p: float) -> str:
    return f"p = {p:.3g}" if p >= 0.001 else "p < 0.001"


def panel_name(row: dict) -> str:
    return row["task"] if row["by"] == "nanopause" else f"{row['task']} ({row['by']})"


def table(rows: list[dict]):
    """The rows as a table of rich. The column "in all", pauses per example in prompts and generated texts of all
    samples, is left out if it always equals the number of pauses."""
    from rich.table import Table

    rendered = Table()
    has_total = any(row["pauses_per_example"] != row["pauses"] for row in rows)
    for name in ("task", "pauses", *["in all"] * has_total, "metrics", "difference", "n", "GFLOPs", "ms"):
        rendered.add_column(name, justify="left" if name in ("task", "metrics") else "right")
    for row, after in zip(rows, [*rows[1:], None]):
        difference = format_figure(row.get("difference"), sign="+")
        if "difference" in row and row["difference"]["p"] is not None:
            difference += f"\n{format_p(row['difference']['p'])}"
        rendered.add_row(
            panel_name(row), str(row["pauses"]), *[f"{row['pauses_per_example']:.3g}"] * has_total,
            "\n".join(f"{name} {format_figure(figure)}" for name, figure in row["metrics"].items()),
            difference, f"{row['n']:,}", f"{row['flops_per_example'] / 1e9:.3g}",
            f"{1000 * row['seconds_per_example']:.3g}",
            end_section=after is not None and panel_name(after) != panel_name(row),
        )  # fmt: skip
    return rendered


def panels(n: int) -> tuple:
    """A matplotlib figure and its n axes, at most three per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, n)
    rows = -(-n // columns)
    size = (max(6, 4.6 * columns), 3.4 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, axes.flat[:n]


def plot(rows: list[dict], file: Path, title: str, place: str = "in the prompt") -> None:
    """The primary metric against the number of pauses, one panel per task. Error bars are 95% intervals."""
    import matplotlib.pyplot as plt

    by_task = {}
    for row in rows:
        by_task.setdefault(panel_name(row), []).append(row)
    picture, axes = panels(len(by_task))
    for axis, (name, rows) in zip(axes, by_task.items()):
        metric = next(iter(rows[0]["metrics"]))
        pauses, figures = [row["pauses"] for row in rows], [row["metrics"][metric] for row in rows]
        values = [figure["value"] for figure in figures]
        bars = [[math.nan if figure[key] is None else abs(figure[key] - figure["value"]) for figure in figures]
                for key in ("low", "high")]  # fmt: skip
        axis.errorbar(pauses, values, bars, color="tab:red", marker="o", markersize=5, capsize=4, linewidth=1.5)
        axis.set_xticks(pauses)
        axis.set_title(f"{name}, {rows[0]['n']:,} examples", fontsize=10)
        axis.set(xlabel=f"pauses {place} (tokens)", ylabel=f"{metric.replace('_', ' ')}, 95% interval")
        axis.grid(alpha=0.3)
    picture.suptitle(title, fontsize=11)
    picture.savefig(file, dpi=150)
    plt.close(picture)
