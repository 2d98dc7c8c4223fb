"""Compare training runs: one picture, and a table of differences with their spread over seeds.

    python -m nanopause.compare out/standard out/pause
    python -m nanopause.compare out/standard_seed1 out/standard_seed2 out/pause_seed1 out/pause_seed2
    python -m nanopause.compare out/standard_* out/pause_* --out=out/pauses.png

A run is a folder that train.py wrote. Runs that differ only in their seed, or in settings that change no result (such
as log_interval), are one group: the mean over seeds. The group of the first run is the baseline.

    out/compare.png     training loss, validation loss (pretraining: bits per byte) and exact match where runs
                        log it, against steps, tokens and training FLOPs; the shade is the 95% interval of the mean
                        (Student's t over seeds)
    out/compare.json    the groups, their curves, the table and its notes

The table compares validations at equal steps and at equal training FLOPs. Intervals of differences are 95%: paired t
where both groups have the same seeds, Welch's t otherwise. At equal FLOPs a run's value is interpolated linearly
between its validations. Pretraining's validation after the last step covers final_eval_blocks blocks, the earlier
ones eval_blocks blocks; the table does not mix the two. A difference of val_bpb_pauses is shown only at equal
pause_rate, as a block with more pauses has less text.
"""

import json
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.conf import arg

from nanopause import checkpoint, cli, errors, metrics
from nanopause.config import Config
from nanopause.errors import UserError
from nanopause.files import replace_file
from nanopause.intervals import t_interval
from nanopause.progress import Ticker

# Keys of Config that change no result beyond rounding; a recipe's values are keys of their own.
NEUTRAL = {"seed", "out_dir", "recipe", "resume", "device", "compile", "micro_batch_size", "tracker", "log_interval",
           "eval_interval", "checkpoint_interval"}  # fmt: skip
OTHER_DATA = "losses on different data are not comparable"
REQUIRED = {  # keys that must be equal, and why
    "task": OTHER_DATA,
    "dataset": OTHER_DATA,
    "limit": OTHER_DATA,
    "data_dir": OTHER_DATA,
    "tokenizer": "different tokenizers split the same text into different tokens",
    "eval_blocks": "validations on different blocks are not comparable",
    "final_eval_blocks": "validations on different blocks are not comparable",
    "block_size": "validation bits per byte depend on the context length, which block_size limits",
}
AXES = {"step": "steps", "tokens": "tokens (pauses included)", "flops": "training FLOPs"}
QUANTITIES = {  # the rows of the picture
    "loss": "training loss\n(nats per token)",
    "val_loss": "validation loss\n(nats per token)",
    "val_bpb": "validation loss\n(bits per byte)",
    "val_exact_match": "validation exact match",
}
PAUSE_KEYS = "pause_rate", "placement", "pauses"
PAUSES = "_pauses"  # suffix of the keys of a validation with pauses


@dataclass
class Settings:
    runs: Annotated[list[Path], tyro.conf.Positional, arg(metavar="RUN RUN [RUN …]", help_behavior_hint="")]
    """Folders of two or more runs. The group of the first is the baseline."""
    out: Annotated[Path, arg(metavar="FILE.png")] = Path("out/compare.png")
    """The picture. The numbers are written beside it, as .json."""


@dataclass
class Run:
    folder: Path
    config: dict
    rows: list[dict]  # of metrics.jsonl

    def validations(self, key: str, axis: str, whole: bool) -> dict[float, float]:
        """`key` by `axis`. whole: only the validation after pretraining's last step, on final_eval_blocks blocks;
        otherwise only those on eval_blocks blocks."""
        last = None if self.config["task"] else self.config["max_steps"]
        return {row[axis]: row[key] for row in self.rows if key in row and (row["step"] == last) == whole}

    def value(self, key: str, axis: str, whole: bool, at: float) -> float | None:
        """`key` at a step, or interpolated at a number of FLOPs; None if the run has no value there."""
        points = self.validations(key, axis, whole)
        if axis == "step" or not points or not min(points) <= at <= max(points):
            return points.get(at)
        return float(np.interp(at, list(points), list(points.values())))


@dataclass
class Group:
    """Runs that differ only in their seed, in the order of their seeds. settings: the keys that differ between groups,
    and the values of this one."""

    label: str
    settings: dict
    runs: list[Run]

    @property
    def seeds(self) -> list[int]:
        return [run.config["seed"] for run in self.runs]


def load(folder: Path) -> Run:
    """Raises UserError if the folder is not a run, or the run has no checkpoint or no validation yet."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is not a run, as it has no metrics.jsonl: name a folder that train.py wrote")
    newest = max(folder.glob("step_" + 8 * "[0-9]" + "/checkpoint.json"), default=None)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint, which holds the settings of a run: train more steps")
    try:
        config = checkpoint.read_state(newest.parent)["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{newest} is damaged: delete {newest.parent}, and continue the run with --resume") from None
    config["block_size"] = Config(**config).text_length  # text tokens only: pauses between tokens are extra
    # Runs that continue other runs, seed by seed, are one group.
    config["init_from"] = re.sub(r"\bseed\d+", "seed*", config["init_from"])
    rows = metrics.read(folder / "metrics.jsonl")
    if not any("val_loss" in row for row in rows):
        raise UserError(f"{folder} has no validation yet: train more steps, or train with a lower --eval_interval")
    return Run(folder, config, rows)


def load_groups(folders: list[Path]) -> list[Group]:
    """The groups in the order of their first runs. Raises UserError for fewer than two runs, a run given twice, or runs
    that are not comparable."""
    if len(folders) < 2:
        raise UserError(f"a comparison needs two or more runs, not {len(folders)}: name their folders, such as "
                        f"out/standard out/pause")  # fmt: skip
    runs = [load(folder) for folder in folders]
    by_settings = {}
    first = runs[0]
    unused = {"dataset", "block_size"} if first.config["task"] else {}
    for run in runs:
        for key, reason in REQUIRED.items():
            expected, value = first.config[key], run.config[key]
            if expected != value and key not in unused:
                raise UserError(f"{first.folder} has {key}={expected!r}, but {run.folder} has {key}={value!r}, and "
                                f"{reason}: leave one out, or train both with the same --{key}")  # fmt: skip
        settings = {key: value for key, value in run.config.items() if key not in NEUTRAL}
        by_seed = by_settings.setdefault(json.dumps(settings), {})
        duplicate = by_seed.setdefault(run.config["seed"], run)
        if duplicate is not run:
            raise UserError(f"{duplicate.folder} and {run.folder} are the same run, as seed={run.config['seed']} and "
                            f"all settings that change results are equal: leave one out")  # fmt: skip
    every = [json.loads(settings) for settings in by_settings]
    differing = [key for key in every[0] if any(settings[key] != every[0][key] for settings in every)]
    groups = []
    for settings, by_seed in zip(every, by_settings.values()):
        settings = {key: settings[key] for key in differing}
        label = ", ".join(f"{key}={value}" for key, value in settings.items()) or "all runs"
        groups.append(Group(label, settings, [by_seed[seed] for seed in sorted(by_seed)]))
    return groups


def curve(group: Group, key: str) -> dict[str, list[float]]:
    """Means over seeds of `key` and of every axis, at the steps where all seeds have `key`; with two seeds or more also
    the limits of the 95% interval of `key` (Student's t)."""
    from scipy import stats

    rows = [{row["step"]: row for row in run.rows if key in row} for run in group.runs]
    steps, n = sorted(set.intersection(*map(set, rows))), len(rows)
    values = {name: np.array([[by_step[step][name] for step in steps] for by_step in rows]) for name in (*AXES, key)}
    found = {name: each.mean(axis=0) for name, each in values.items()}
    if n > 1:
        half = stats.t.ppf(0.975, n - 1) * np.std(values[key], axis=0, ddof=1) / n**0.5
        found |= {"low": found[key] - half, "high": found[key] + half}
    return {name: each.tolist() for name, each in found.items()}


def difference(group: Group, values: list[float], baseline: Group, base: list[float]) -> dict:
    """The group's mean over seeds minus the baseline's; if both have two seeds or more, and their values differ, also
    its 95% interval."""
    from scipy import stats

    found = {"difference": float(np.mean(values) - np.mean(base))}
    if min(len(values), len(base)) < 2:
        return found
    if group.seeds == baseline.seeds:
        interval, method = t_interval(np.subtract(values, base).tolist()), "paired t"
    elif len({*values}) > 1 or len({*base}) > 1:
        interval, method = stats.ttest_ind(values, base, equal_var=False).confidence_interval(0.95), "Welch's t"
    else:
        interval = None
    return found | ({"interval": [*map(float, interval)], "method": method} if interval else {})


def last_common(runs: list[Run], key: str, axis: str) -> tuple[float, bool] | None:
    """The largest step, or number of FLOPs, at which every run has `key` of the same kind of validation, and whether
    that validation covers final_eval_blocks blocks; None if there is none."""
    found = []
    for whole in (False, True):
        points = [run.validations(key, axis, whole) for run in runs]
        if axis == "step":
            found += [(step, whole) for step in set.intersection(*map(set, points))]
        elif all(points) and max(map(min, points)) <= min(map(max, points)):
            found.append((min(map(max, points)), whole))
    return max(found, default=None)


def compare(groups: list[Group], keys: list[str], axis: str) -> list[dict]:
    """The table's lines of `keys` at equal "step" or "flops"; empty if the runs have no common point."""
    baseline, lines = groups[0], []
    common = last_common([run for group in groups for run in group.runs], keys[0], axis)
    if not common:
        return []
    at, whole = common
    for key, group in product(keys, groups):
        values, base = ([run.value(key, axis, whole, at) for run in each.runs] for each in (group, baseline))
        if None in values:
            continue
        line = {"axis": axis, "at": at, "whole_split": whole, "quantity": key, "group": group.label,
                "n": len(values), "value": float(np.mean(values)), "values": values}  # fmt: skip
        # A different number of pauses leaves different text in a block.
        pauses, base_pauses = ([each.runs[0].config[name] for name in PAUSE_KEYS] for each in (group, baseline))
        if group is not baseline and None not in base and (not key.endswith(PAUSES) or pauses == base_pauses):
            line |= difference(group, values, baseline, base)
        lines.append(line)
    return lines


def table(lines: list[dict]):
    """The lines as a rich Table, with a section for each quantity, named on its first line."""
    from rich.table import Table

    shown, heading = Table(), None
    for name in ("at equal", "quantity", "group", "n", "value", "difference", "95% interval"):
        shown.add_column(name, justify="left" if name in ("at equal", "quantity", "group") else "right")
    for line in lines:
        at = f"steps: {line['at']:,}" if line["axis"] == "step" else f"FLOPs: {line['at']:.4g}"
        names = at, line["quantity"]
        if names == heading:
            names = "", ""
        else:
            heading = names
            shown.add_section()
        low, high = line.get("interval", (None, None))
        shown.add_row(
            *names, line["group"], str(line["n"]), f"{line['value']:.4f}",
            f"{line['difference']:+.4f}" if "difference" in line else "–",
            "–" if low is None else f"{low:+.4f} to {high:+.4f} ({line['method']})",
        )  # fmt: skip
    return shown


def plot(groups: list[Group], curves: list[dict], file: Path) -> None:
    """The picture: a row for each quantity, a column for each axis. Groups differ in colour, shade of grey, marker and
    line; a validation with pauses is dashed and has open markers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    quantities = [key for key in QUANTITIES if any(key in each for each in curves)]
    size = (4.2 * len(AXES), 2.9 * len(quantities) + 0.9)
    figure, panels = plt.subplots(len(quantities), len(AXES), figsize=size, sharex="col", sharey="row",
                                  layout="constrained", squeeze=False)  # fmt: skip
    colours, legend = plt.get_cmap("viridis")(np.linspace(0, 0.75, len(groups))), {}
    for (row, key), (column, axis) in product(enumerate(quantities), enumerate(AXES)):
        panel, shown = panels[row, column], []
        for i, (group, of_group) in enumerate(zip(groups, curves)):
            style = {"color": colours[i], "marker": "os^Dv"[i % 5], "markersize": 5, "linewidth": 1.4}
            solid = {"linestyle": ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[i % 4]}
            dashed = {"linestyle": "--", "markerfacecolor": "white"}
            label = f"{group.label} (n={len(group.runs)})"
            for name, more, what in ((key, solid, label), (key + PAUSES, dashed, label + ", validation with pauses")):
                if points := of_group.get(name):
                    every = max(1, len(points[name]) // 8)  # groups have their markers at different points
                    markers = (i * every // len(groups), every)
                    (legend[what],) = panel.plot(points[axis], points[name], markevery=markers, **style, **more)
                    shown += points[name]
                    if "low" in points:
                        panel.fill_between(points[axis], points["low"], points["high"], color=colours[i], alpha=0.18,
                                           linewidth=0)  # fmt: skip
        low, high = np.percentile([value for value in shown if np.isfinite(value)] or [0, 1], (0, 100))
        margin = 0.3 * (high - low) or 1  # the interval of two seeds can be much wider than the curves' range
        panel.set_ylim(low - margin, high + margin)
        panel.grid(alpha=0.3)
        panel.set(xlabel=AXES[axis] if row == len(quantities) - 1 else "", ylabel="" if column else QUANTITIES[key])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    columns = 1 if 0.17 * max(map(len, legend)) > size[0] else 2  # a character takes about 0.085 inch
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, frameon=False)
    if any(len(group.runs) > 1 for group in groups):
        figure.suptitle("mean over n seeds; shade: 95% interval (Student's t), cut at the frame", fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python -m nanopause.compare", __doc__)
    if settings.out.suffix != ".png":
        raise UserError(f"--out={settings.out} must be a .png file, such as out/compare.png")
    groups = load_groups(settings.runs)
    is_finetuning = bool(groups[0].runs[0].config["task"])
    quantity = "val_loss" if is_finetuning else "val_bpb"
    keys, lines, notes = [quantity, quantity + PAUSES, "val_exact_match"], [], []
    for axis, name in (("step", "steps"), ("flops", "FLOPs")):
        found = compare(groups, keys, axis)
        lines += found
        if not found:
            notes.append(f"No table at equal {name}: the runs have no {name} in common with a validation of the same "
                         f"blocks; train with a lower --eval_interval.")  # fmt: skip
        elif axis == "flops" and not is_finetuning and not found[0]["whole_split"]:
            notes.append("At equal FLOPs the last validations of the runs are excluded: they cover final_eval_blocks "
                         "blocks, the others eval_blocks blocks.")  # fmt: skip
    if len(groups) > 1:
        notes.append(f"Differences are relative to the first group, {groups[0].label}.")
    if single := [group.label for group in groups if len(group.runs) == 1]:
        notes.append(f"One seed shows no spread: no interval for {'; '.join(single)}. Train it with more seeds.")
    curves = [{key: points for key in ("loss", *keys) if (points := curve(group, key))[key]} for group in groups]
    described = [{"label": group.label, "settings": group.settings, "seeds": group.seeds,
                  "runs": [str(run.folder) for run in group.runs], "curves": each}
                 for group, each in zip(groups, curves)]  # fmt: skip
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    plot(groups, curves, settings.out)
    numbers = settings.out.with_suffix(".json")
    replace_file(numbers, json.dumps({"groups": described, "differences": lines, "notes": notes}, indent=2) + "\n")
    ticker = Ticker(1, enabled=True)
    if lines:
        ticker.show(table(lines))
    ticker.say("\n".join([*notes, f"written: {settings.out}, {numbers}"]))


if __name__ == "__main__":
    errors.run(main)
