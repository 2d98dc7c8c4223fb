"""Where DIT's pauses go [Kim et al. 2025]: targets shaded by their likelihood, early and late in training.

    python experiments/where_pauses_go.py --checkpoints=HuggingFaceTB/SmolLM2-135M-Instruct --task=gsm8k --examples=0,7
    python experiments/where_pauses_go.py --checkpoints=before=out/pause,SFT=out/gsm8k_sft/best,DIT=out/gsm8k/best
    python experiments/where_pauses_go.py --checkpoints=out/pause --prefix="Return a" --target=" list of the keys."

A checkpoint is any value of init_from of train.py, such as out/gsm8k/best or out/gsm8k/step_00000500. A name for the
figures may precede it.

    out_dir/example_0.png, .svg    one example with every checkpoint: the darker a token, the less likely, and the bars
                                   before it are the pauses that training with --placement=dit would insert
    out_dir/lowest.png, .svg       the 20 lowest log-likelihoods of a target, lowest first, over examples: the paper's
                                   Figure 4, with SFT and DIT as checkpoints. No pause is inserted there
    out_dir/results.json           the numbers

Likelihoods and choice are training's own (nanopause.finetune.TargetPauses.least_likely). A terminal shows the examples.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from textwrap import wrap
from typing import Literal, NamedTuple
from unicodedata import east_asian_width

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanopause import cli, errors, hub
from nanopause.config import Config
from nanopause.distributed import Processes
from nanopause.errors import UserError
from nanopause.evaluation import numbers, versions, words, write_json
from nanopause.finetune import TargetPauses, encode, pack
from nanopause.model import GPT
from nanopause.tasks import Example, get_task, load
from nanopause.tokenizer import Tokenizer
from nanopause.trace import DARKEST, pieces

BATCH = 8  # examples per forward pass
N_LOWEST = 20
COLUMNS = 100  # of a figure of text
CHARACTER, LINE, POINTS = 9 * 0.602 / 72, 0.22, 9  # width of DejaVu Sans Mono at 9 points and height of a line, inches


@dataclass
class Settings:
    checkpoints: str = ""
    """Folders of runs, their checkpoints, transformers folders, GGUF files or hub ids, with commas; name=folder names
    one in the figures."""
    task: str = "gsm8k"
    """The task of the examples."""
    split: Literal["train", "validation", "test"] = "validation"
    """The split of the task."""
    examples: str = "0,1"
    """Indices of the examples to draw, with commas."""
    limit: int = 100
    """Examples that the lowest log-likelihoods are averaged over: the first so many of the split, and those drawn."""
    prefix: str = ""
    """A prefix of your own, in place of a task's examples."""
    target: str = ""
    """What follows it."""
    pauses: int = 5
    """M_DIT, pauses in a target."""
    data_dir: str = ""
    """Folder of the task's files, such as gsm8k_train.jsonl.gz. Empty: the hub."""
    device: str = "auto"
    """cpu, cuda, …; auto takes a GPU where there is one."""
    out_dir: str = "out/where_pauses_go"
    """Folder of the figures."""


class Reading(NamedTuple):
    """A target's log-likelihoods. tokens: their texts, an end of text last. log_likelihoods: nats, float [T]. chosen:
    whether a pause goes before the token, bool [T]."""

    tokens: list[str]
    log_likelihoods: np.ndarray
    chosen: np.ndarray


def readings(
    model: GPT, tokenizer: Tokenizer, examples: dict[int, Example], m: int, attention: str = "causal"
) -> dict[int, Reading]:
    """The log-likelihoods of every example's target, and where training would put m pauses. An example whose target
    does not fit into the model's block_size is left out."""
    dit = TargetPauses(Config(task="gsm8k", placement="dit", pauses=m), tokenizer)
    length = model.config.block_size
    encoded = {i: encode(example, tokenizer, length, target_pauses=dit) for i, example in examples.items()}
    fitting, made = [(i, pair) for i, pair in encoded.items() if pair], {}
    for start in range(0, len(fitting), BATCH):
        indices, pairs = zip(*fitting[start : start + BATCH])
        batch = pack(pairs, tokenizer.pause_id, attention).to(model.head.weight.device)
        log_likelihoods, chosen = (x[0].cpu().numpy() for x in dit.least_likely(model, batch, BATCH))
        for i, pair, end, live in zip(indices, pairs, batch.ends, batch.lives):
            ids, here = pair.tokens[pair.n_prefix : -1].tolist(), slice(end - live, end)
            made[i] = Reading([*pieces(ids, tokenizer), "<end>"], log_likelihoods[here], chosen[here])
    return made


def lowest(some: Iterable[Reading], n: int = N_LOWEST) -> np.ndarray:
    """The n lowest log-likelihoods of each, lowest first, float [readings, n]; NaN where a target has fewer, and no
    column that all lack."""
    rows = [np.sort(reading.log_likelihoods)[:n] for reading in some]
    n = max(map(len, rows))
    return np.array([np.pad(row, (0, n - len(row)), constant_values=np.nan) for row in rows])


# The figures


def shade(log_likelihood: float) -> tuple[float, float, float]:
    """Red, green and blue, 0 to 1: from nearly white to an orange on which black can be read, in grey print too."""
    import matplotlib

    return matplotlib.colormaps["YlOrBr"](0.55 * min(-log_likelihood / DARKEST, 1.0))[:3]


def width(text: str) -> int:
    """Columns of a terminal's font."""
    return sum(1 + (east_asian_width(character) in "WF") for character in text)


def lines_of(reading: Reading, columns: int = COLUMNS) -> Iterator[list[tuple[int, str, float, bool]]]:
    """A target's lines: of every token the column, the text, its log-likelihood and whether a pause goes before it, for
    which two columns are free to its left."""
    line, x = [], 0
    for text, value, chosen in zip(reading.tokens, reading.log_likelihoods, reading.chosen):
        ends, text = "\n" in text, text.replace("\n", "↵").replace("\t", "⇥")
        for part in [text[i : i + columns // 2] for i in range(0, len(text), columns // 2)]:
            if x + 2 * chosen + width(part) > columns:
                yield line
                line, x = [], 0
            x += 2 * bool(chosen)
            line.append((x, part, float(value), bool(chosen)))
            x, chosen = x + width(part), False
        if ends:
            yield line
            line, x = [], 0
    if line:
        yield line


def draw(example: Example, seen: dict[str, Reading], file: Path) -> None:
    """An example's prefix, and its target with the likelihoods of every checkpoint, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    prefix = [part for line in example.prefix.splitlines() for part in wrap(line, COLUMNS) or [""]]
    blocks = {name: list(lines_of(reading)) for name, reading in seen.items()}
    n_lines = len(prefix) + sum(len(block) + 1.6 for block in blocks.values()) + 2
    margin = 2 * CHARACTER
    size = COLUMNS * CHARACTER + 2 * margin, n_lines * LINE + 2 * margin
    figure = plt.figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-2, COLUMNS + 2), ylim=(n_lines + margin / LINE, -margin / LINE))
    axis.axis("off")

    def write(x: float, y: float, text: str, **style) -> None:
        axis.text(x, y + 0.5, text, va="center_baseline", fontsize=POINTS, family="DejaVu Sans Mono", parse_math=False,
                  **style)  # fmt: skip

    def box(x: float, y: float, columns: float, colour: tuple | str, height: float = 0.9) -> None:
        low = y + 0.5 - height / 2
        axis.add_patch(Rectangle((x, low), columns, height, facecolor=colour, edgecolor="white", linewidth=0.5))

    def pause(x: float, y: float) -> None:
        for bar in (0.35, 1.05):
            box(x + bar, y, 0.5, "black", 0.75)

    for y, line in enumerate(prefix):
        write(0, y, line, color="0.35")
    y = len(prefix)
    for name, block in blocks.items():
        reading = seen[name]
        mean = reading.log_likelihoods.mean()
        write(0, y + 0.4, f"{name}, {-mean:.2f} nats per token", weight="bold")
        y += 1.6
        for line in block:
            for x, text, value, chosen in line:
                box(x, y, width(text), shade(value))
                write(x, y, text, color="black")
                if chosen:
                    pause(x - 2, y)
            y += 1
    y, x = y + 1, 0
    for p in (1, 0.5, 0.2, 0.1, 0.03, exp(-DARKEST)):
        label = f" {p:.0%} " if p >= 0.01 else f" ≤ {p:.1%} "
        box(x, y, width(label), shade(np.log(p)))
        write(x, y, label, color="black")
        x += width(label)
    write(x + 1, y, "probability;", color="0.2")
    pause(x + 14, y)
    write(x + 16.5, y, "a pause that training inserts before the token", color="0.2")
    for kind in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{kind}"), dpi=160)
    plt.close(figure)


def draw_lowest(values: dict[str, np.ndarray], title: str, file: Path) -> None:
    """The mean of the lowest log-likelihoods against their rank, with the middle half of the examples as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    colours = matplotlib.colormaps["cividis"](np.linspace(0.05, 0.75, len(values)))
    for i, (name, rows) in enumerate(values.items()):
        ranks = np.arange(1, rows.shape[1] + 1)
        axis.fill_between(ranks, *np.nanpercentile(rows, (25, 75), axis=0), color=colours[i], alpha=0.15, linewidth=0)
        axis.plot(ranks, np.nanmean(rows, axis=0), color=colours[i], linestyle=("-", "--", "-.", ":")[i % 4],
                  marker="os^D"[i % 4], mfc="white" if i % 2 else colours[i], markersize=5, label=name)  # fmt: skip
    axis.set(xlabel="rank of the target's tokens, the least likely first", ylabel="log-likelihood (nats)")
    axis.set_title(title, fontsize=10)
    axis.set_xticks([1, *range(5, ranks[-1] + 1, 5)])
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9, handlelength=4)
    for kind in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{kind}"), dpi=160)
    plt.close(figure)


def shown(reading: Reading) -> Text:
    """The target as text for a terminal."""
    text = Text()
    for token, value, chosen in zip(*reading):
        red, green, blue = (round(255 * x) for x in shade(value))
        text.append("❚❚" * bool(chosen), Style(bold=True))
        text.append(token.replace("\n", "↵\n"), Style.parse(f"black on rgb({red},{green},{blue})"))
    return text


def chosen_examples(settings: Settings) -> tuple[dict[int, Example], list[int]]:
    """The examples by their place in the split, and those that are drawn. Raises UserError where one is not there."""
    if bool(settings.prefix) != bool(settings.target):
        raise UserError("--prefix and --target are a text of your own, in place of a task's: give both")
    if settings.target:
        return {0: Example(settings.prefix, settings.target, (settings.target,))}, [0]
    drawn = numbers("examples", settings.examples)
    if not drawn:
        raise UserError("no example to draw: name some by --examples=0,1")
    n = max(settings.limit, drawn[-1] + 1)
    split, _ = load(get_task(settings.task), settings.split, settings.data_dir or None, n)
    if drawn[-1] >= len(split):
        raise UserError(f"--examples={settings.examples} must be 0 to {len(split) - 1}, as {settings.task}'s "
                        f"{settings.split} split has {len(split):,}")  # fmt: skip
    return {i: split[i] for i in sorted({*range(min(settings.limit, len(split))), *drawn})}, drawn


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/where_pauses_go.py", __doc__)
    named = [word.rpartition("=") for word in words(settings.checkpoints)]
    sources = {name or source: source for name, _, source in named}
    if len(sources) < len(named):
        raise UserError(f"--checkpoints={settings.checkpoints} has two of one name: give each its own")
    if not sources:
        raise UserError("no checkpoint: name some by --checkpoints=before=out/pause,DIT=out/gsm8k/best")
    errors.check("pauses", settings.pauses, 0, 2**31)
    errors.check("limit", settings.limit, 1, 2**31)
    examples, drawn = chosen_examples(settings)
    device, out_dir, found = Processes(settings.device).device, Path(settings.out_dir), {}
    for name, source in sources.items():
        model, tokenizer, state = hub.load(source, device)
        attention = state.get("config", {}).get("attention", "causal")
        found[name] = readings(model, tokenizer, examples, settings.pauses, attention)
        if left_out := {*drawn} - {*found[name]}:
            raise UserError(f"the target of example {min(left_out)} leaves no room for a prefix in the "
                            f"{model.config.block_size} tokens of {source}'s block_size")  # fmt: skip

    out_dir.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    for i in drawn:
        console.print(Text(f"\nexample {i}: {examples[i].prefix}"))
        for name in found:
            console.print(Text(f"\n{name}:", "bold"), shown(found[name][i]))
        draw(examples[i], {name: found[name][i] for name in found}, out_dir / f"example_{i}.png")
    shared = set.intersection(*(set(seen) for seen in found.values()))  # those that every checkpoint has room for
    values = {name: lowest(seen[i] for i in sorted(shared)) for name, seen in found.items()}
    about = "the target" if settings.target else f"{settings.task}, {settings.split}, {len(shared):,} examples"
    draw_lowest(values, f"{about}: mean and middle half", out_dir / "lowest.png")
    written = {"settings": asdict(settings), "versions": versions(), "unit": "nats"}
    written["lowest"] = {
        name: {"mean": np.nanmean(rows, 0).tolist(), "quartiles": np.nanpercentile(rows, (25, 75), 0).tolist()}
        for name, rows in values.items()
    }
    written["examples"] = {
        i: {name: {key: np.array(x).tolist() for key, x in found[name][i]._asdict().items()} for name in found}
        for i in drawn
    }
    write_json(out_dir / "results.json", written)
    console.print(f"\nwritten: {out_dir} (figures and results.json)")


if __name__ == "__main__":
    errors.run(main)
