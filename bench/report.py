"""docs/benchmarks.md and the figures in bench/results/<device>/, from the JSON files there, without the quick ones."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import shorten

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.harness import ALL, OURS, RESULTS, ROOT, Row, label, number
from nanopause.errors import UserError

Result = dict
Results = dict[str, list[tuple[str, Result]]]  # by bench: the name of the device's folder, and the result

INTRODUCTION = """# Benchmarks

Written by `python -m bench report` from `bench/results/<device>/<bench>.json`. Each result was measured at the commit
named in its section; later code can be faster or slower.

Candidates run interleaved in one process (A B A B) on the same inputs. A baseline whose output differs from the truth
by more than the tolerance is listed as missing and not timed. Times are medians. A number in brackets is the baseline's
time over ours, the median of the ratios of all rounds. **Bold**: the baseline is faster. *Italics*: neither is clearly
faster, because the 10th and the 90th percentile of the ratio are on both sides of 1. Figures show the median ratio and
these percentiles. nanoGPT runs with GPT-2's GELU instead of its own.
"""


def load(folder: Path) -> Results:
    """The results of each bench, the newest first. Raises UserError for a damaged file."""
    results: Results = {name: [] for name in TABLES}
    for file in sorted(folder.glob("*/*.json")):
        if file.stem in TABLES:
            try:
                results[file.stem].append((file.parent.name, json.loads(file.read_text())))
            except ValueError:
                raise UserError(f"{file} is not JSON: run python -m bench {file.stem} again, or remove it") from None
    for devices in results.values():
        devices.sort(key=lambda item: item[1]["date"], reverse=True)
    return {name: devices for name, devices in results.items() if devices}


def document(results: Results) -> str:
    """docs/benchmarks.md."""
    contents, sections = [], []
    for name, devices in results.items():
        contents.append(f"- [{name}](#{name}): {'; '.join(device(result) for _, result in devices)}")
        first_paragraph = import_module(f"bench.{name}").__doc__.split("\n\n")[0]
        sections.append(f"## {name}\n\n{first_paragraph}")
        for folder, result in devices:
            figure = f"![{name} on {device(result)}](../bench/results/{folder}/{name}.png)"
            command = f"```\n{result['command']}\n```"
            sections += [f"### {name} on {device(result)}", command, provenance(result), figure, TABLES[name](result)]
    return "\n".join([INTRODUCTION, *contents, "", "\n\n".join(sections)]) + "\n"


def device(result: Result) -> str:
    return result["device"] + f", {result['threads']} threads" * (result["device"] == result["cpu"])


def provenance(result: Result) -> str:
    """The date, commit and versions of a result, in one sentence."""
    commit = (result["commit"] or "unknown")[:7] + " with uncommitted changes" * bool(result["dirty"])
    versions = [f"torch {result['torch']}", f"Triton {result['triton']}", f"Python {result['python']}"]
    baselines = {row["name"]: row["version"] for row in result["rows"] if row["name"] != OURS}
    versions += [f"{name} {version}" for name, version in baselines.items() if version != result["torch"]]
    return f"Measured on {result['date'][:10]} at commit {commit} in {result['dtype']} with {', '.join(versions)}."


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """The rows of each measurement and shape, by candidate."""
    cases = defaultdict(dict)
    for row in rows:
        if not row["what"].startswith("growth"):  # in older results of train
            cases[f"{row['what']}, {label(row['shape'])}"][row["name"]] = row
    return cases


def pivot(rows: list[Row], unit: str, cell: Callable[[Row], str]) -> str:
    """A table with a line per case and a column per candidate."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [[case, *(cell(candidates[name]) if name in candidates else "–" for name in names)]
             for case, candidates in by_case(rows).items()]  # fmt: skip
    return markdown([unit, *names], lines)


def comparison(result: Result, unit: str, field: str) -> str:
    """A field of every row, with the ratios of the baselines; then a summary, and what is missing."""

    def cell(row: Row) -> str:
        if row["name"] == OURS:
            # Older results of generate have the percentage of the peak memory bandwidth here.
            peak = row["percent_of_peak"] if row.get("tflops") else None
            return number(row[field]) + (f" ({peak:.0f} % of peak)" if peak else "")
        mark = "**" if row["ratio_p90"] < 1 else "*" if row["ratio_p10"] <= 1 else ""
        return f"{mark}{number(row[field])} ({row['ratio']:.2f}){mark}"

    return "\n\n".join([pivot(result["rows"], unit, cell), summary(result["rows"]), *missing(result)])


def summary(rows: list[Row]) -> str:
    """In how many cases ours is faster than all baselines, slower than one, or neither."""
    cases = [[row for row in case.values() if row["name"] != OURS] for case in by_case(rows).values()]
    cases = [case for case in cases if case]
    faster = sum(all(row["ratio_p10"] > 1 for row in case) for case in cases)
    lost = [{row["name"] for row in case if row["ratio_p90"] < 1} for case in cases]
    slower = sum(map(bool, lost))
    sentence = f"Faster than every baseline measured here in {faster} of {len(cases)} cases"
    if slower:
        sentence += f"; slower than one ({', '.join(sorted(set.union(*lost)))}) in {slower}"
    unclear = len(cases) - faster - slower
    return sentence + (f"; in the remaining {unclear} not clearly faster than all of them." if unclear else ".")


def missing(result: Result) -> list[str]:
    """The baselines that are missing and the shapes that were not measured, with the reasons."""
    counts = Counter((each["name"], shorten(each["reason"], 90, placeholder="…")) for each in result["missing"])
    names = {ALL: "all candidates"}
    lines = [f"- {names.get(name, name)}, {n} case{'s' * (n > 1)}: {why}" for (name, why), n in counts.items()]
    return ["\n".join(["Missing:", "", *lines])] if lines else []


def loss_table(result: Result) -> str:
    def cell(row: Row) -> str:
        return f"{number(row['extra_bytes'] / 2**20)} ({number(row['percent_of_logits'])} %)"

    rows = [row for row in result["rows"] if row["what"] == "forward+backward"]
    memory = pivot(rows, "MiB beyond the gradients (percent of the logits)", cell)
    return f"{times_table(result)}\n\n{memory}"


# Older results of pause_cost have more kinds and ways than the bench measures now.
KINDS = {"step": "a token", "prefix": "a prompt", "decode": "a token after the prompt"}
WAYS = {"without": "without pauses", OURS: "pauses in one forward pass", "sequential": "pauses one by one",
        "chain of thought": "as many more generated tokens", "more layers": "without pauses, more layers",
        "more heads": "without pauses, more heads"}  # fmt: skip


def pause_cost_table(result: Result) -> str:
    """Milliseconds without pauses, and the time of the others relative to that, by batch size."""
    batches = sorted({row["shape"]["batch"] for row in result["rows"]})
    lines = defaultdict(dict)
    for row in result["rows"]:
        pauses = row["shape"]["pauses"]
        key = row["shape"]["context"], list(KINDS).index(row["what"]), list(WAYS).index(row["name"]), pauses
        if pauses in (0, 1, 8, 15, 50):
            lines[key]["FLOPs"] = f"{row['flops_ratio']:.2f}"
            lines[key][row["shape"]["batch"]] = f"{row['ratio']:.2f}" if pauses else f"{number(row['p50_ms'])} ms"
    table = []
    for (context, kind, way, pauses), line in sorted(lines.items()):
        case = f"{list(KINDS.values())[kind]}, {list(WAYS.values())[way]}"
        table.append([case, str(context), str(pauses), *(line.get(key, "–") for key in ("FLOPs", *batches))])
    head = ["time over that without pauses", "context", "pauses", "FLOPs", *(f"batch {batch}" for batch in batches)]
    return "\n\n".join([markdown(head, table), *missing(result)])


def ratio_figure(result: Result) -> Figure:
    """The ratio of each baseline in each case, as a point with a line from the 10th to the 90th percentile."""
    cases = by_case(result["rows"])
    names = list(dict.fromkeys(row["name"] for case in cases.values() for row in case.values() if row["name"] != OURS))
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.22 * len(cases)), layout="constrained")
    for i, name in enumerate(names):
        points = [(y, case[name]) for y, case in enumerate(cases.values()) if name in case]
        low, middle, high = (np.array([row[key] for _, row in points]) for key in ("ratio_p10", "ratio", "ratio_p90"))
        heights = [y + 0.16 * (i - (len(names) - 1) / 2) for y, _ in points]
        axes.errorbar(middle, heights, xerr=(middle - low, high - middle), fmt="os^Dv<>p"[i % 8], label=name, ms=4)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=50))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.tick_params(labelsize=7)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("time of the baseline over ours")
    axes.grid(alpha=0.3)
    if names:
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def pause_cost_figure(result: Result) -> Figure:
    """The time with M pauses over that without, for steps above and prompts below, by batch size."""
    rows = [row for row in result["rows"] if row["name"] in (OURS, "sequential") and row["what"] != "decode"]
    batches, contexts = (sorted({row["shape"][key] for row in rows}) for key in ("batch", "context"))
    size = 1.5 + 3.3 * len(batches), 6.6
    figure, grid = plt.subplots(2, len(batches), figsize=size, squeeze=False, sharey="row", layout="constrained")
    lines = defaultdict(list)
    for row in rows:
        place = ("step", "prefix").index(row["what"]), batches.index(row["shape"]["batch"])
        lines[place, row["shape"]["context"], row["name"]].append((row["shape"]["pauses"], row["ratio"]))
    for (place, context, name), points in sorted(lines.items()):
        style = "o-" if name == OURS else "s--"
        colour = plt.get_cmap("viridis")(contexts.index(context) / len(contexts))
        grid[place].plot(*zip(*sorted(points)), style, color=colour, ms=4, label=f"{WAYS[name]}, context {context}")
    pauses = sorted({row["shape"]["pauses"] for row in rows})
    for (i, j), axes in np.ndenumerate(grid):
        axes.set(title=f"{('a token', 'a prompt')[i]}, batch {batches[j]}", xlabel="pauses", xscale="log", yscale="log")
        axes.set_xticks(pauses, pauses)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("time over that without pauses")
    handles = {text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


times_table = partial(comparison, unit="milliseconds", field="p50_ms")
tokens_table = partial(comparison, unit="tokens per second", field="tokens_per_second")
TABLES = {"pause_cost": pause_cost_table, "attention": times_table, "loss": loss_table, "train": tokens_table,
          "generate": tokens_table, "finetune": tokens_table}  # fmt: skip


def main() -> None:
    """Write docs/benchmarks.md and the figures."""
    matplotlib.use("Agg")
    results = load(RESULTS)
    for name, devices in results.items():
        for folder, result in devices:
            figure = (pause_cost_figure if name == "pause_cost" else ratio_figure)(result)
            figure.suptitle(f"{name} on {device(result)}", fontsize=10)
            figure.savefig(RESULTS / folder / f"{name}.png", dpi=150, metadata={"Software": None})
            plt.close(figure)
    (ROOT / "docs" / "benchmarks.md").write_text(document(results))
    print("written: docs/benchmarks.md, and the figures in bench/results")
