"""Evaluate a checkpoint on tasks with several numbers of pauses: scores with intervals, and cost.

Tasks of nanopause, from the hub or from a folder of JSON lines:
    python evaluate.py --out_dir=out/gsm8k --tasks=gsm8k,squad --pauses=0,10,50
    python evaluate.py --out_dir=out/gsm8k --tasks=gsm8k --data_dir=tasks --limit=200
Pauses where the model is unsure, turned off once they no longer change its log-probabilities; sampled programs:
    python evaluate.py --out_dir=out/dit --tasks=gsm8k --pauses=0,5 --pause_when=below_confidence --stop_when_useless
    python evaluate.py --out_dir=out/dit --tasks=mbpp --allow_code_execution --samples=10 --temperature=0.8
Any task of lm-evaluation-harness (pip install -e '.[harness]'), its own or local ones:
    python evaluate.py --out_dir=out/pause --harness=hellaswag,arc_easy --pauses=0,10
    python evaluate.py --out_dir=out/pause --harness=mine --harness_path=my_tasks

The results folder has examples.jsonl, one line per finished example, results.json, and with several numbers of pauses
pauses.png. The same command continues an interrupted evaluation; more tasks and pauses add to the results.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from nanopause import checkpoint, cli, errors, hub, kernels, sandbox
from nanopause.config import Config
from nanopause.distributed import Processes
from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.evaluation import (
    Cell,
    Decoding,
    add_row,
    claim,
    fingerprint,
    format_figure,
    harness_results,
    harness_tasks,
    interval_note,
    numbers,
    plot,
    read_rows,
    summaries,
    summary,
    table,
    timed,
    versions,
    with_intervals,
    words,
    write_json,
)
from nanopause.policy import PauseOptions, StopWhenUseless
from nanopause.progress import Ticker
from nanopause.tasks import Task, get_task, load

SECONDS_BETWEEN_LINES = 30.0  # of progress, without a terminal


@dataclass
class Settings(PauseOptions):
    out_dir: str = "out/pause"
    """Folder of a run (its newest intact checkpoint is used), out_dir/best (lowest validation loss), a transformers
    folder, a GGUF file or a hub id."""
    tasks: str = ""
    """Tasks of nanopause, with commas: gsm8k, squad, coqa, csqa, piqa, hellaswag, lambada, webq, nq, aqua, mbpp."""
    allow_code_execution: bool = False
    """Run the programs that a model writes for mbpp, each in a sandbox of its own."""
    harness: str = ""
    """Tasks of lm-evaluation-harness, with commas."""
    harness_path: str = ""
    """Folder of YAML files with tasks that the harness does not have."""
    pauses: str = ""
    """Numbers of pauses in every prompt, or at each place of pause_when, with commas. Empty: as in finetuning."""
    pause_position: Literal["append", "prepend"] | None = None
    """Pauses after the prompt or before it. None: as in finetuning, else after it."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this."""
    samples: int = 1
    """Texts per example, whose scores are averaged."""
    pass_at: str = ""
    """Every k of pass@k, with commas, for tasks whose answers are programs. Empty: 1 and samples."""
    seed: int = 1337
    """Of sampling; sample j of example i has seed + i · samples + j."""
    data_dir: str = ""
    """Folder of files like gsm8k_test.jsonl for --tasks. Empty: the hub."""
    split: Literal["test", "validation", "train"] = "test"
    """Of --tasks; papers report test."""
    limit: int | None = None
    """Only the first so many examples of a task. None: all."""
    attention: Literal["causal", "prefix"] | None = None
    """prefix: prompt and pauses attend to each other in both directions. None: as in finetuning, else causal."""
    batch_size: int = 8
    """Sequences at a time."""
    device: str = "auto"
    """cpu, cuda, …; auto: a GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights and cache; auto: bfloat16 on a GPU."""
    results: str = ""
    """Folder of the results. Empty: evaluation/ in the run (evaluation-best/ for its best checkpoint), or out/NAME for
    a model that is not a run."""

    @property
    def uses_policy(self) -> bool:
        """Whether pauses are placed during generation, rather than in the prompt."""
        return self.pause_when != "after_prompt" or self.stop_when_useless


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def decoding_of(settings: Settings) -> Decoding:
    """Samples, temperature and the like, checked."""
    n, ks = settings.samples, numbers("pass_at", settings.pass_at)
    errors.check("samples", n, 1, 10_000)
    errors.check("temperature", settings.temperature, 0, 1e6)
    errors.check("top_p", settings.top_p, 0, 1)
    errors.check("seed", settings.seed, 0, 2**40)
    if n > 1 and settings.temperature == 0:
        raise UserError(f"--samples={n} would all be the same, greedy text: add --temperature=0.8, say")
    for k in ks:
        errors.check("pass_at", k, 1, n)
    return Decoding(n, settings.temperature, settings.top_p, settings.seed, tuple(ks or sorted({1, n})))


def check(settings: Settings, tasks: list[Task]) -> None:
    """Raises UserError for settings that do not fit together."""
    if settings.uses_policy and not settings.pauses:
        raise UserError("--pause_when and --stop_when_useless need numbers of pauses: add --pauses=0,5, say")
    if not tasks and not settings.harness:
        raise UserError("nothing to evaluate: name tasks by --tasks=gsm8k,squad or --harness=hellaswag")
    errors.check("batch_size", settings.batch_size, 1, 2**20)
    if settings.limit is not None:
        errors.check("limit", settings.limit, 1, 2**62)
    if (settings.uses_policy or settings.temperature) and settings.harness:
        raise UserError("--pause_when, --stop_when_useless, --temperature and --samples are for --tasks: leave out "
                        "--harness")  # fmt: skip
    if settings.uses_policy and settings.pause_position:
        raise UserError("--pause_position is for pauses in prompts, and --pause_when and --stop_when_useless have none "
                        "there: leave it out")  # fmt: skip
    if settings.pass_at and not any(task.executes_code for task in tasks):
        raise UserError("--pass_at is for answers that are programs: add --tasks=mbpp, or leave it out")


def results_folder(settings: Settings) -> Path:
    path = Path(settings.out_dir)
    run, named = checkpoint.run_of(path) or (Path("out", path.stem), None)
    return Path(settings.results or run / (f"evaluation-{path.name}" if named else "evaluation"))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate_tasks(cells: list[Cell], file: Path, batch_size: int, ticker: Ticker) -> list[dict]:
    """Answer what is not in `file` yet, example by example, and return the summaries."""
    before = read_rows(file)
    finished = [cell.rows_of(before, file) for cell in cells]
    n_total = sum(len(cell.examples) for cell in cells)
    n_done = sum(map(len, finished))
    if n_done:
        ticker.say(f"{n_done:,} of {n_total:,} examples are in {file} already")
    generating = [cell for cell in cells if cell.max_new_tokens]
    engine = None
    if generating:
        cell = generating[0]
        engine = Engine(cell.model, cell.tokenizer, batch_size, max(cell.max_length() for cell in generating))
    last_line = time.perf_counter()
    for cell, rows in zip(cells, finished):
        name = f"{cell.task.name}, {cell.pauses} pauses"
        todo = [i for i in range(len(cell.examples)) if i not in rows]
        if todo:
            cell.warm_up(todo, engine)
        for answer, seconds in timed(cell.answers(todo, engine) if todo else ()):
            row = cell.row(answer, seconds)
            add_row(file, row)
            rows[answer.index] = row
            n_done += 1
            is_due = time.perf_counter() - last_line > SECONDS_BETWEEN_LINES
            last_line = time.perf_counter() if is_due else last_line
            ticker.step(n_done, f"{name}: {len(rows):,} of {len(cell.examples):,}", is_due)
        report = f"; {cell.policy.report()}" if todo and isinstance(cell.policy, StopWhenUseless) else ""
        ticker.say(f"{name}: {described(cell, rows)}{report}")
    return summaries(read_rows(file))


def described(cell: Cell, rows: dict[int, dict]) -> str:
    """The scores of a task with a number of pauses, and what limits them, in one line."""
    figures = summary(rows)
    text = "; ".join(f"{metric} {format_figure(figure)}" for metric, figure in figures["metrics"].items())
    if cell.policy:
        text += f"; {figures['pauses_per_example']:.3g} pauses per example"
    if figures["n_cut"]:
        text += f"; {figures['n_cut']:,} of {len(rows):,} prompts cut from the {cell.placing[-1]} to fit"
    if figures["n_unfinished"]:
        text += f"; {figures['n_unfinished']:,} answers reached their limit of {figures['max_new_tokens']} tokens"
    return text


def evaluate_harness(names: list[str], harnesses: list, manager, limit: int | None, file: Path) -> list[dict]:
    """The results of lm-evaluation-harness; a task that is not in `file` yet is evaluated as a whole."""
    found = {(row["task"], row["pauses"]): row["results"] for row in read_rows(file)}
    for name in names:
        for lm in harnesses:
            if (name, lm.pauses) not in found:
                found[name, lm.pauses] = harness_results(lm, name, manager, limit)
                add_row(file, {"task": name, "pauses": lm.pauses, "results": found[name, lm.pauses]})
    return [with_intervals(row) for key in sorted(found) for row in found[key]]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python evaluate.py", __doc__)
    tasks = [get_task(name).permitted(settings.allow_code_execution) for name in words(settings.tasks)]
    harness_names, decoding = words(settings.harness), decoding_of(settings)
    options = settings.resolved()
    check(settings, tasks)

    # ---- the model
    processes = Processes(settings.device)
    if processes.count > 1:
        raise UserError(f"evaluate.py is one process, not {processes.count}: start it without torchrun, or once per "
                        f"task and GPU")  # fmt: skip
    device = processes.device
    model, tokenizer, state = hub.load(settings.out_dir, device)
    trained = Config(**state.get("config", {}))
    counts = numbers("pauses", settings.pauses) or [state["pauses"]]
    attention = settings.attention or trained.attention
    pause_position, cut = settings.pause_position or trained.pause_position, trained.cut
    weights = fingerprint(model)
    if settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda"):
        model = model.bfloat16()

    # ---- what to evaluate: everything is checked before the first example
    cells, sources = [], []
    for task in tasks:
        examples, source = load(task, settings.split, settings.data_dir or None, settings.limit)
        sources.append(source)
        for n_pauses in counts:
            cell_policy = settings.policy(n_pauses) if settings.uses_policy else None
            cells.append(Cell(model, tokenizer, task, examples, n_pauses, attention, settings.batch_size,
                              pause_position, cut, cell_policy, decoding))  # fmt: skip
    harnesses, manager = [], None
    if harness_names:
        if pause_position == "prepend":
            raise UserError("tasks of lm-evaluation-harness take pauses after the prompt: use --pause_position=append")
        manager = harness_tasks(harness_names, settings.harness_path)
        from nanopause.harness import Harness

        harnesses = [Harness(model, tokenizer, n, settings.batch_size, attention) for n in counts]
    folder = results_folder(settings)
    device_name = device.type + f" ({torch.get_num_threads()} threads)"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    fixed = {  # what all results of a folder have in common
        "format": 2,  # of examples.jsonl
        "step": state.get("step"),
        "weights": weights,
        "split": settings.split,
        "limit": settings.limit,
        "attention": attention,
        "pause_position": pause_position,
        "cut": cut,
        "batch_size": settings.batch_size,
        "policy": options if settings.uses_policy else None,
        "decoding": decoding._asdict() if decoding.temperature else None,
        "dtype": str(model.head.weight.dtype).removeprefix("torch."),
        "device": device_name,
    }
    claim(folder, fixed)
    kernels.choose(None, device)  # reports which

    # ---- scores
    with Ticker(sum(len(cell.examples) for cell in cells), enabled=True) as ticker:
        ticker.say("\n".join([f"results: {folder}", *sources]))
        if any(task.executes_code for task in tasks):
            ticker.say(str(sandbox.protections()))
        results = evaluate_tasks(cells, folder / "examples.jsonl", settings.batch_size, ticker)
    results += evaluate_harness(harness_names, harnesses, manager, settings.limit, folder / "harness.jsonl")
    order = list(dict.fromkeys((row["by"], row["task"]) for row in results))
    results.sort(key=lambda row: order.index((row["by"], row["task"])))

    # ---- table, JSON, figure
    about = {"source": settings.out_dir, "model": asdict(model.config), "tokenizer": tokenizer.name,
             "parameters": sum(parameter.numel() for parameter in model.parameters())}  # fmt: skip
    write_json(folder / "results.json", {"checkpoint": about, "settings": {**asdict(settings), **fixed},
                                         "sources": sources, "versions": versions(), "results": results})  # fmt: skip
    ticker.show(table(results))
    note = (f"difference: to the fewest pauses, paired by example; ms per example at batch size {settings.batch_size}"
            + "; GFLOPs without the pauses that were rolled back" * settings.uses_policy)  # fmt: skip
    ticker.say(f"{note}, {device_name}, {fixed['dtype']}")
    if note := interval_note(results):
        ticker.say(note)
    files = "examples.jsonl, results.json"
    if len({row["pauses"] for row in results}) > 1:
        step = f", step {state['step']:,}" if "step" in state else ""
        place = f"at a place, {settings.pause_when}" if settings.uses_policy else "in the prompt"
        plot(results, folder / "pauses.png", f"{Path(settings.out_dir).name}{step}", place)
        files += ", pauses.png"
    ticker.say(f"written: {folder} ({files})")


if __name__ == "__main__":
    errors.run(main)
