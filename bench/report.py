"""The figures and the tables in Markdown, from the JSON in bench/results/<device>/.

README.md has a place for each bench, from `<!-- bench: NAME -->` to `<!-- end -->`: what stands between is written
here, of the device that was measured last. bench/results/README.md has all devices. Figures lie beside the JSON, as PNG
and SVG. Quick results are left out of everything.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill, shorten
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.harness import DASH, NO_TIME, OURS, RESULTS, ROOT, Row, number
from nanopause.errors import UserError

PLACE = re.compile(r"(<!-- bench: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
LONG = 24  # lines of a table that are shown without being asked

Result = dict
Results = dict[str, dict[str, Result]]  # by bench, then by device's folder


def load(folder: Path) -> Results:
    results: Results = {}
    for file in sorted(folder.glob("*/*.json")):
        if file.stem in PAGES:
            try:
                results.setdefault(file.stem, {})[file.parent.name] = json.loads(file.read_text())
            except ValueError:
                raise UserError(f"{file} is no JSON: run python -m bench {file.stem} again, or remove it") from None
    return results


def text(readme: str, results: Results) -> str:
    """README with its places filled; one stays empty where its bench has not run. Raises UserError for a place that no
    bench has, or that does not end."""
    names = re.findall(r"<!-- bench: (\S+) -->", readme)
    for name in names:
        if name not in PAGES:
            raise UserError(f"README.md has a place for the bench {name!r}: it can have one for {', '.join(PAGES)}")
    if len(PLACE.findall(readme)) != len(names) or any("<!-- bench:" in place[2] for place in PLACE.findall(readme)):
        raise UserError("README.md has a place `<!-- bench: NAME -->` without `<!-- end -->`: close it")

    def filled(place: re.Match) -> str:
        bench, devices = place[2], by_date(results.get(place[2], {}))
        parts = [part(bench, *devices[0], "bench/results/")] if devices else []
        if len(devices) > 1:
            others = "; ".join(named_device(result) for _, result in devices[1:])
            parts.append(f"Also measured: [{others}](bench/results/README.md#{bench}).")
        return place[1] + "\n\n".join(parts) + "\n" * bool(parts) + place[4]

    return PLACE.sub(filled, readme)


def all_devices(results: Results) -> str:
    """bench/results/README.md."""
    lines = ["# What was measured", "", "Written by `python -m bench report` from the JSON in the folders beside it."]
    for bench in PAGES:
        if bench in results:
            lines += ["", f"## {bench}"]
        for device, result in by_date(results.get(bench, {})):
            lines += ["", f"### {named_device(result)}", "", part(bench, device, result)]
    return "\n".join(lines) + "\n"


def by_date(devices: dict[str, Result]) -> list[tuple[str, Result]]:
    """The last first."""
    return sorted(devices.items(), key=lambda item: item[1]["date"], reverse=True)


def named_device(result: Result) -> str:
    return result["device"] + f", {result['threads']} threads" * (result["device"] == result["cpu"])


def part(bench: str, device: str, result: Result, folder: str = "") -> str:
    """What is said of a bench on a device. folder: of results, from where the text will lie."""
    commit = f"commit {result['commit'][:7]}{' with changes' * bool(result['dirty'])}" if result["commit"] else ""
    lines = [
        f"{named_device(result)}, {result['dtype']}, torch {result['torch']} "
        f"(`{result['command']}`, {result['date'][:10]}{', ' * bool(commit)}{commit}):"
    ]
    page = PAGES[bench]
    for suffix, (about, _) in page.figures.items():
        lines += ["", f"![{about}]({folder}{device}/{bench}{suffix}.png)"]
    return "\n".join([*lines, "", page.table(result)])


# Tables


def words(shape: dict) -> str:
    return ", ".join(value if isinstance(value, str) else f"{key} {value:g}" for key, value in shape.items())


def markdown(head: list[str], lines: list[list[str]], folded: str = "") -> str:
    """A table; folded under its length if it is long, or under a title."""
    rows = [head, ["---"] * len(head), *lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if len(lines) <= LONG and not folded:
        return table
    return f"<details><summary>{folded or f'{len(lines)} lines'}</summary>\n\n{table}\n\n</details>"


def varying(rows: list[Row]) -> tuple[list[str], dict]:
    """The keys by which shapes differ, and what all shapes have in common."""
    keys = list(dict.fromkeys(key for row in rows for key in row["shape"]))
    common = {key: rows[0]["shape"].get(key) for key in keys if len({row["shape"].get(key) for row in rows}) == 1}
    if len({str(row["shape"]) for row in rows}) == 1:
        common = {}
    return [key for key in keys if key not in common], common


def named(row: Row, rows: list[Row], keys: list[str]) -> str:
    """What sets a row's pass and shape apart from those of other rows."""
    what = row["what"] if len({row["what"] for row in rows}) > 1 else ""
    return ", ".join(filter(None, (what, words({key: row["shape"][key] for key in keys if key in row["shape"]}))))


def beside(result: Result, rows: list[Row], unit: str, value: Callable[[Row], float | None], lacks: bool = True) -> str:
    """A line for each pass and shape: `value` of ours, and of every rival with how many times longer it takes, bold
    where it is faster, in italics where the rounds disagree; then what is behind a number: where rivals are faster, and
    with `lacks` who is missing."""
    if not rows:
        return "Nothing could be measured."
    keys, common = varying(rows)
    names = [OURS, *dict.fromkeys(row["name"] for row in rows if row["name"] != OURS)]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = number(value(row))
        if row["name"] != OURS:
            cell += f" ({row['ratio']:.2f})"
            cell = f"**{cell}**" if row["ratio_p90"] < 1 else f"*{cell}*" if row["ratio_p10"] < 1 else cell
        cells.setdefault(named(row, rows, keys), {})[row["name"]] = cell
    head = unit + "; in brackets, how many times longer a rival takes" * (len(names) > 1)
    head += f"; {words(common)}" if common else ""
    lines = [[line, *(row.get(name, DASH) for name in names)] for line, row in cells.items()]
    said = [*faster(rows), *(missing(result) if lacks else ())]
    return markdown([head, *names], lines) + "\n\n" + " ".join(said)


def faster(rows: list[Row]) -> list[str]:
    rivals = [row for row in rows if row["name"] != OURS]
    lost = [row for row in rivals if row["ratio_p90"] < 1]
    close = [row for row in rivals if row["ratio_p10"] < 1 <= row["ratio_p90"]]
    said = []
    if lost:
        who = ", ".join(dict.fromkeys(row["name"] for row in lost))
        said.append(f"Bold, {len(lost)} of {len(rivals)}: faster than ours ({who}).")
    elif rivals:
        said.append("No rival is faster.")
    if close:
        said.append(f"Italics, {len(close)} of {len(rivals)}: faster in some rounds, slower in others.")
    return said


def missing(result: Result) -> list[str]:
    """A sentence about the rivals that are missing, with how often where it is not always, and one about the shapes
    that there was no time for."""
    why: dict[str, dict[str, int]] = {}
    for lack in result["missing"]:
        if lack["name"] != "all":
            reasons, reason = why.setdefault(lack["name"], {}), shorten(lack["reason"], 90, placeholder="…")
            reasons[reason] = reasons.get(reason, 0) + 1
    there, said = {row["name"] for row in result["rows"]}, []
    for name, reasons in why.items():
        for reason, n in reasons.items():
            cases = f" ({n} case{'s' * (n > 1)})" if name in there else ""
            said.append(f"{name}{cases}: {reason}")
    sentences = [f"Missing: {'; '.join(said)}."] if said else []
    shapes = [words(lack["shape"]) for lack in result["missing"] if lack["reason"] == NO_TIME]
    more = f" and {len(shapes) - 3} more shapes" * (len(shapes) > 3)
    return sentences + ([f"Not measured, for want of time: {'; '.join(shapes[:3])}{more}."] if shapes else [])


def peak(row: Row) -> str:
    return DASH if row.get("percent_of_peak") is None else f"{row['percent_of_peak']:.0f} %"


def pause_cost_table(result: Result) -> str:
    """Milliseconds of the pass without pauses, and times that of others: a table for each context, folded but for 1024
    tokens, or the least."""
    rows = result["rows"]
    pauses = [m for m in (0, 1, 8, 50) if any(row["shape"]["pauses"] == m for row in rows)]
    batches = sorted({row["shape"]["batch"] for row in rows})
    ours = {(row["what"], *row["shape"].values()): row for row in rows if row["name"] == OURS}
    tables: dict[int, dict[tuple, dict[int | str, str]]] = {}  # by context; lines by what they are and their pauses
    for row in rows:
        shape, kind = row["shape"], (row["what"], row["name"])
        if shape["pauses"] not in pauses:
            continue
        context = around(shape["context"])
        tokens = f" ({shape['context']} tokens)" * (shape["context"] < context)
        key = list(PAUSE_LINES).index(kind), PAUSE_LINES[kind] + tokens, shape["pauses"]
        line = tables.setdefault(context, {}).setdefault(key, {"FLOPs": f"{row['flops_ratio']:.2f}"})
        if shape["pauses"] == 0:
            line[shape["batch"]] = f"{number(row['p50_ms'])} ms"
        else:
            faster = row["ratio_p90"] < ours[(row["what"], *shape.values())]["ratio_p10"]
            line[shape["batch"]] = f"**{row['ratio']:.2f}**" if faster else f"{row['ratio']:.2f}"
    shown = 1024 if 1024 in tables else min(tables)
    parts = []
    for context in sorted(tables, key=lambda context: (context != shown, context)):
        head = [f"context {context}; times that of the same without pauses", "pauses", "FLOPs"]
        lines = [[about, str(m), line["FLOPs"], *(line.get(batch, DASH) for batch in batches)]
                 for (_, about, m), line in sorted(tables[context].items())]  # fmt: skip
        head += [f"batch {batch}" for batch in batches]
        parts.append(markdown(head, lines, folded="" if context == shown else f"context {context}"))
    if any("**" in part for part in parts):
        parts.append("Bold: takes less time than the pauses in one pass, in nearly every round.")
    rounds = [row["samples"] for row in rows]
    parts.append(f"Medians of {min(rounds)} to {max(rounds)} rounds, the fewest of the longest prompts.")
    step = next((row for row in ours.values() if row["what"] == "step" and row["shape"]["pauses"] == pauses[-1]), None)
    if step:
        each, counted = (
            step[key] / 1e6 / step["shape"]["batch"] for key in ("flops_per_pause", "flops_per_pause_counted")
        )
        parts.append(
            f"One of the {pauses[-1]} pauses of a token ({words(step['shape'])}) adds {number(each)} MFLOPs by "
            f"formula, {number(counted)} counted, and {number(step['added_ms_per_pause'])} ms."
        )
    return "\n\n".join([*parts, *missing(result)])


PAUSE_LINES = {
    ("step", "without"): "a token",
    ("step", OURS): "a token and its pauses in one pass",
    ("step", "sequential"): "a token, then its pauses one by one",
    ("step", "chain of thought"): "a token, and as many more of a chain of thought",
    ("prefix", "without"): "a prompt",
    ("prefix", OURS): "a prompt and its pauses in one pass",
    ("prefix", "sequential"): "a prompt, then its pauses one by one",
    ("prefix", "more layers"): "the prompt alone, with more layers",
    ("prefix", "more heads"): "the prompt alone, with more heads",
    ("decode", "without"): "a later token, without pauses",
    ("decode", OURS): "a later token, after the pauses",
    ("decode", "more layers"): "a later token of more layers",
    ("decode", "more heads"): "a later token of more heads",
}


def tokens_table(result: Result) -> str:
    return beside(result, result["rows"], "tokens per second", lambda row: row["tokens_per_second"])


def generate_table(result: Result) -> str:
    tables = []
    for what in ("prompts included", "after the prompts"):
        rows = [row for row in result["rows"] if row["what"] == what]
        speed = f"tokens per second, {what}"
        tables.append(beside(result, rows, speed, lambda row: row["tokens_per_second"], lacks=bool(tables)))
    keys, _ = varying(rows)
    speeds = [f"{named(row, rows, keys)}: {number(row['gbps'])} ({peak(row)})" for row in rows if row["name"] == OURS]
    source = f"{number(result['peak_bytes_per_second'] / 1e9)}, {result['peak_bytes_per_second_source']}"
    speed = f"GB/s that a step of ours reads after the prompts (share of the memory's {source}): {'; '.join(speeds)}."
    return "\n\n".join([*tables, speed])


def train_table(result: Result) -> str:
    rows = [row for row in result["rows"] if row["what"] == "step"]
    shares = [f"{words(row['shape'])}: {peak(row)}" for row in rows if row["name"] == OURS]
    table = beside(result, rows, "tokens per second of training", lambda row: row["tokens_per_second"])
    said = [f"{table} MFU ({number(result['peak_flops'] / 1e12)} TFLOP/s, {result['peak_flops_source']}): "
            f"{'; '.join(shares)}."]  # fmt: skip
    turns = [f"{each['ratio']:.2f} ({words(each['shape'])})" for each in result["with_pauses"]]
    return " ".join(
        said + [f"Time of a step with pauses over one without, by turns: {'; '.join(turns)}."] * bool(turns)
    )


def data_table(result: Result) -> str:
    keys, _ = varying(result["rows"])
    times = [f"{named(row, result['rows'], keys)}: {number(row['tokens_per_second'] / row['needed'])}"
             for row in result["rows"] if row["name"] == OURS and row["needed"]]  # fmt: skip
    table = beside(result, result["rows"], "thousand tokens per second", lambda row: row["tokens_per_second"] / 1e3)
    return table + f" Ours beside what a training step takes here, times: {'; '.join(times)}."


def loss_table(result: Result) -> str:
    times = beside(result, result["rows"], "milliseconds", lambda row: row["p50_ms"])
    rows = [row for row in result["rows"] if row["what"] == "forward+backward"]
    if not rows:
        return times
    keys, common = varying(rows)
    names, lines = list(dict.fromkeys(row["name"] for row in rows)), {}
    halves = [f"{each['what']} " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in each["ratios"].items())
              for each in result["half_masked"]]  # fmt: skip
    times += f"\n\nTime with half of the rows masked over none, by turns: {'; '.join(halves)}." * bool(halves)
    for row in rows:
        memory = f"{number(row['extra_bytes'] / 2**20)} ({number(row['percent_of_logits'])} %)"
        lines.setdefault(words({key: row["shape"][key] for key in keys}), {})[row["name"]] = memory
    head = "MiB of memory beyond the gradients (share of the logits)" + (f"; {words(common)}" if common else "")
    return (
        times + "\n\n" + markdown([head, *names], [[s, *(at.get(n, DASH) for n in names)] for s, at in lines.items()])
    )


def dit_table(result: Result) -> str:
    """A line a placement."""
    rows = result["rows"]
    sizes = dict.fromkeys(words({key: row["shape"][key] for key in ("model", "batch")}) for row in rows)
    lines = [[row["shape"]["placement"], number(row["p50_ms"]), f"{row['ratio']:.2f}", f"{row['flops_ratio']:.2f}",
              f"{row['tokens']} ({row['pauses']})"] for row in rows]  # fmt: skip
    head = [f"a step, {'; '.join(sizes)}", "ms", "times sft", "FLOPs, times sft", "tokens (of them pauses)"]
    return "\n\n".join([markdown(head, lines), *missing(result)])


# Figures


class Panel(NamedTuple):
    """series: points (x, y) by name."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]


def looks(names: Iterable[str]) -> dict[str, dict]:
    """A name's colour, whose lightness shows in grey too, its marker, and the hatch of its bar. Ours is the darkest."""
    names = sorted(dict.fromkeys(names), key=lambda name: name != OURS)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, max(2, len(names))))
    hatches = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
    return {name: {"color": colour, "marker": "osD^vPX*<>"[i % 10], "hatch": hatches[i % 8]}
            for i, (name, colour) in enumerate(zip(names, colours))}  # fmt: skip


def curves(panels: list[Panel], title: str, columns: int = 3) -> Figure:
    """A panel each, both axes logarithmic, x marked where there are points; panels of one x only if all are such."""
    grown = [panel for panel in panels if len({x for points in panel.series.values() for x, _ in points}) > 1]
    panels = grown or panels
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1 + 3.4 * columns, 0.9 + 2.7 * lines), squeeze=False,
                                layout="constrained")  # fmt: skip
    look = looks(name for panel in panels for name in panel.series)
    for ax, panel in zip(axes.flat, panels):
        for name, points in panel.series.items():
            colour, marker = look[name]["color"], look[name]["marker"]
            ax.plot(*zip(*sorted(points)), color=colour, marker=marker, markersize=5, label=name,
                    linestyle="-" if name == OURS else "--", markeredgecolor="black", markeredgewidth=0.4)  # fmt: skip
        xs = sorted({x for points in panel.series.values() for x, _ in points})
        ys = [y for points in panel.series.values() for _, y in points]
        # A share can be 0, and other sizes double.
        if xs[0] > 0:
            ax.set_xscale("log")
        ax.set_xticks(xs, [short(x) for x in xs], rotation=0 if len(xs) <= 7 else 40)
        ax.set_yscale("log")
        # Within two decades 1, 2 and 5 are marked too.
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(ys) < 100 * min(ys) else (1,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_minor_locator(plt.NullLocator())
        ax.set_ylim(min(ys) / 1.5, max(ys) * 1.5)
        ax.set_title("\n".join(fill(line, 38) for line in panel.title.splitlines()), fontsize=9)
        ax.set_xlabel(panel.x, fontsize=9)
        ax.set_ylabel(panel.y, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    if len(look) > 1:
        handles = {text: handle for ax in figure.axes for handle, text in zip(*ax.get_legend_handles_labels())}
        names = [name for name in look if name in handles]
        figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}"


def bars(rows: list[Row], title: str, value: Callable[[Row], float], unit: str, columns: int = 2) -> Figure:
    """A panel a shape with a bar for each name, and beside it the number."""
    panels: dict[str, list[Row]] = {}
    keys, common = varying(rows)
    for row in rows:
        panels.setdefault(named(row, rows, keys), []).append(row)
    columns = min(columns, len(panels))
    lines = [list(panels.items())[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [0.75 + 0.24 * max(map(len, panels.values()))] * len(lines)
    figure, axes = plt.subplots(len(lines), columns, figsize=(1 + 4.6 * columns, 0.5 + sum(heights)), squeeze=False,
                                gridspec_kw={"height_ratios": heights}, layout="constrained")  # fmt: skip
    look = looks(row["name"] for row in rows)
    most = max(map(len, panels.values()))
    for ax, (about, its) in zip(axes.flat, panels.items()):
        for i, row in enumerate(its):
            style = look[row["name"]]
            ax.barh(i, value(row), color=style["color"], hatch=style["hatch"], edgecolor="white", linewidth=0)
            ax.text(value(row), i, f" {number(value(row))}", va="center", fontsize=8)
        ax.set_yticks(range(len(its)), [row["name"] for row in its], fontsize=8)
        ax.set_ylim(most - 0.5, -0.5)
        ax.set_xlim(0, 1.18 * max(map(value, its)))
        ax.tick_params(axis="x", labelsize=8)
        ax.set_title(about, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.supxlabel(", ".join(filter(None, (unit, words(common)))), fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def device(result: Result) -> str:
    return f"{result['device']}, {result['dtype']}"


def pause_cost_figure(result: Result) -> Figure:
    """Times that of the same without pauses: of steps above, of prompts below, a column a batch size."""
    rows = [row for row in result["rows"] if row["what"] in PAUSED and row["name"] in (OURS, "sequential")]
    batches = sorted({row["shape"]["batch"] for row in rows})
    size = (1.5 + 3.3 * len(batches), 6.6)
    figure, grid = plt.subplots(2, len(batches), figsize=size, sharey="row", squeeze=False, layout="constrained")
    contexts = sorted({around(row["shape"]["context"]) for row in rows})
    pauses = sorted({row["shape"]["pauses"] for row in rows})
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.8, len(contexts)))
    for (what, about), panels in zip(PAUSED.items(), grid):
        lines: dict[tuple, list[tuple[int, float]]] = {}
        for row in rows:
            if row["what"] == what:
                key = row["shape"]["batch"], around(row["shape"]["context"]), row["name"]
                lines.setdefault(key, []).append((row["shape"]["pauses"], row["ratio"]))
        most = 1.2 * max((ratio for points in lines.values() for _, ratio in points), default=1)
        for axes, batch in zip(panels, batches):
            for context, colour, marker in zip(contexts, colours, "osD^"):
                for name, style in (("sequential", "--"), (OURS, "-")):
                    label = f"{'in one pass' if name == OURS else 'one by one'}, context {context}"
                    face = colour if name == OURS else "white"
                    if points := sorted(lines.get((batch, context, name), [])):
                        axes.plot(
                            *zip(*points), style, color=colour, marker=marker, markersize=4, mfc=face, label=label
                        )
            axes.set(title=f"{about}, batch {batch}", xlabel="pauses", xscale="log", yscale="log")
            axes.set_xticks(pauses, pauses)
            axes.set_xlim(0.85 * pauses[0], 1.15 * pauses[-1])
            ticks = [tick for tick in (1, 1.1, 1.2, 1.5, 2, 5, 10, 20, 50) if tick <= most]
            axes.set_yticks([tick for tick in ticks if most < 5 or tick == int(tick)])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("times that without pauses")
    handles = {text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    title = f"Time with pauses: {result.get('model', 'GPT-2 124M')} on {result['device']}"
    figure.suptitle(title, fontsize=10)
    return figure


PAUSED = {"step": "a token and pauses", "prefix": "a prompt and pauses"}


def around(context: int) -> int:
    """The context with the room that a prompt leaves for its pauses on a GPU."""
    return 1 << (context - 1).bit_length()


def attention_figure(result: Result) -> Figure:
    """Speed against the queries of a sequence; for decode steps that of reading the cache."""
    rows = result["rows"]
    tera = max(row["tflops"] or 0 for row in rows) >= 1
    panels: dict[tuple, Panel] = {}
    for row in rows:
        shape = row["shape"]
        decode = shape["mask"] == "decode"
        keys = (f"B {shape['B']}, S {shape['S']}, " if decode else "") + f"H {shape['H']}, D {shape['D']}"
        title = f"{shape['mask']}, {row['what']}\n{keys}{', G ' + str(shape['G']) if 'G' in shape else ''}"
        unit = "GB/s of keys and values" if decode else f"{'TFLOP' if tera else 'GFLOP'}/s of visible pairs"
        speed = row["gbps"] if decode else row["tflops"] * (1 if tera else 1e3)
        panel = panels.setdefault(title, Panel(title, "queries a sequence", unit, {}))
        panel.series.setdefault(row["name"], []).append((shape["T"], speed))
    return curves(list(panels.values()), f"Attention on {device(result)}")


def loss_figure(result: Result) -> Figure:
    """Time and memory against rows, and time against the share of them that is masked."""
    both = [row for row in result["rows"] if row["what"] == "forward+backward"]
    panels: dict[str, Panel] = {}

    def add(title: str, x: str, y: str, row: Row, point: tuple[float, float]) -> None:
        panel = panels.setdefault(title, Panel(title, x, y, {}))
        panel.series.setdefault(row["name"], []).append(point)

    for row in both:
        N, C, V, masked = (row["shape"][key] for key in ("N", "C", "V", "masked"))
        if masked == 0:
            add(f"time, C {C}, V {V:,}", "rows N", "ms", row, (N, row["p50_ms"]))
            point = (N, max(row["extra_bytes"], 1) / 2**20)
            add(f"memory, C {C}, V {V:,}", "rows N", "MiB beyond the gradients", row, point)
    partly = {(row["shape"]["N"], row["shape"]["C"], row["shape"]["V"]) for row in both if row["shape"]["masked"]}
    for row in both:
        N, C, V, masked = (row["shape"][key] for key in ("N", "C", "V", "masked"))
        if (N, C, V) in partly:
            add(f"time, N {N:,}, C {C}, V {V:,}", "rows masked, %", "ms", row, (100 * masked, row["p50_ms"]))
    return curves(list(panels.values()), f"Linear cross-entropy, forward and backward, on {device(result)}")


def growth_figure(result: Result) -> Figure:
    """Speed and memory of a training step against sequence length, batch and model size."""
    panels = []
    rows = [row for row in result["rows"] if row["what"].startswith("growth")]
    titles = {"T": "tokens a sequence", "batch": "sequences a batch", "parameters": "parameters, millions"}
    for y, of in (("thousand tokens/s", lambda row: row["tokens_per_second"] / 1e3),
                  ("GiB beyond what stays", lambda row: row["peak_extra_bytes"] / 2**30)):  # fmt: skip
        for key, x in titles.items():
            its = [row for row in rows if row["what"] == f"growth with {key}"]
            if its:
                common = words(varying(its)[1])
                tokens = {row["shape"]["batch"] * row["shape"]["T"] for row in its}
                common += f", {max(tokens)} tokens a step" * (len(tokens) == 1)
                millions = {"parameters": [float(f"{row['parameters'] / 1e6:.3g}") for row in its]}
                xs = millions.get(key) or [row["shape"][key] for row in its]
                panels.append(Panel(common, x, y, {OURS: list(zip(xs, map(of, its)))}))
    return curves(panels, f"A step of training on {device(result)}")


def generate_figure(result: Result) -> Figure:
    """Speed against batch, context and pauses, where the rest is the same."""
    panels = []
    for axis, x in (("batch", "sequences"), ("context", "tokens of a prompt"), ("pauses", "pauses behind a prompt")):
        others: dict[str, list[Row]] = {}
        for row in (row for row in result["rows"] if row["what"] == "prompts included"):
            others.setdefault(words({k: v for k, v in row["shape"].items() if k not in (axis, "new")}), []).append(row)
        for title, its in others.items():
            panel = Panel(title, x, "tokens/s, prompts included", {})
            for row in its:
                panel.series.setdefault(row["name"], []).append((row["shape"][axis], row["tokens_per_second"]))
            panels.append(panel)
    return curves(panels, f"Generation on {device(result)}")


def speeds(rows: Callable[[Result], list[Row]], title: str, thousands: bool = False) -> Callable[[Result], Figure]:
    unit = "thousand " * thousands + "tokens per second"
    return lambda result: bars(rows(result), f"{title} on {device(result)}",
                               lambda row: row["tokens_per_second"] / (1000 if thousands else 1), unit)  # fmt: skip


class Page(NamedTuple):
    """table: its Markdown. figures: by what follows the bench's name in their files', what they show and how it is
    drawn."""

    table: Callable[[Result], str]
    figures: dict[str, tuple[str, Callable[[Result], Figure]]]


PAGES = {
    "pause_cost": Page(pause_cost_table, {"": (
        "Time of a step and of a prompt with pauses over that without, in one pass and one by one",
        pause_cost_figure)}),
    "attention": Page(
        lambda result: beside(result, result["rows"], "milliseconds", lambda row: row["p50_ms"]),
        {"": ("Speed of attention against the length of sequences, by implementation", attention_figure)}),
    "loss": Page(loss_table, {"": ("Time and memory of the loss, by implementation", loss_figure)}),
    "train": Page(train_table, {
        "": ("Tokens per second of training, by implementation",
             speeds(lambda result: [row for row in result["rows"] if row["what"] == "step"], "Training")),
        "_growth": ("Speed and memory of a training step as it grows", growth_figure)}),
    "generate": Page(generate_table, {"": (
        "Tokens per second of generation against batch, context and pauses, by implementation", generate_figure)}),
    "finetune": Page(tokens_table, {"": (
        "Tokens per second of finetuning, packed and padded", speeds(lambda result: result["rows"], "Finetuning"))}),
    "dit": Page(dit_table, {}),
    "data": Page(data_table, {"": (
        "Tokens per second of the loader and of preparing a corpus", speeds(
            lambda result: result["rows"], "Data", thousands=True))}),
}  # fmt: skip


def draw(results: Results, folder: Path) -> list[Path]:
    """The PNG and SVG of every figure, in the folder of their device."""
    matplotlib.use("Agg")
    # So that the same data makes the same file, whose text is text.
    plt.rcParams.update({"svg.hashsalt": "nanopause", "svg.fonttype": "none"})
    files = []
    for bench, devices in results.items():
        for name, result in devices.items():
            for suffix, (_, figure_of) in PAGES[bench].figures.items() if result["rows"] else ():
                figure = figure_of(result)
                for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": result["date"]})):
                    files.append(folder / name / f"{bench}{suffix}.{kind}")
                    figure.savefig(files[-1], dpi=150, metadata=metadata)
                plt.close(figure)
    return files


def main() -> None:
    """Draw the figures and write the tables anew."""
    results, readme = load(RESULTS), ROOT / "README.md"
    written = {readme: text(readme.read_text(), results), RESULTS / "README.md": all_devices(results)}
    files = draw(results, RESULTS)
    for file, content in written.items():
        file.write_text(content)
    for file in (*files, *written):
        print(f"written: {file.relative_to(ROOT)}")
