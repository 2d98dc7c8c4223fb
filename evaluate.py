"""Score a checkpoint on tasks, with several numbers of pauses in every prompt, and say what they cost.

Tasks of nanopause, from the hub or from a folder of JSON lines:
    python evaluate.py --out_dir=out/gsm8k --tasks=gsm8k,squad --pauses=0,10,50
    python evaluate.py --out_dir=out/gsm8k --tasks=gsm8k --data_dir=tasks --limit=200
Pauses where the model is unsure, 0 for none, turned off once they are seen to change nothing; programs, sampled:
    python evaluate.py --out_dir=out/dit --tasks=gsm8k --pauses=0,5 --pause_when=below_confidence --stop_when_useless
    python evaluate.py --out_dir=out/dit --tasks=mbpp --allow_code_execution --samples=10 --temperature=0.8
Any task of lm-evaluation-harness (pip install -e '.[harness]'), its own or local ones:
    python evaluate.py --out_dir=out/pause --harness=hellaswag,arc_easy --pauses=0,10
    python evaluate.py --out_dir=out/pause --harness=mine --harness_path=my_tasks

The results folder gets examples.jsonl, a line an example as soon as it is done, results.json, and with several numbers
of pauses pauses.png. The same command goes on where one broke off; more tasks and more pauses add to what is there.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import kernels
from nanopause import checkpoint, cli, errors, hub, sandbox
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
from nanopause.tasks import get_task, load

SAY_EVERY = 30.0  # seconds, where there is no terminal


@dataclass
class Settings(PauseOptions):
    out_dir: str = "out/pause"
    """Folder of a run, whose newest intact checkpoint is read, or out_dir/best in it, which has the lowest validation
    loss; or a transformers folder, a GGUF file or a hub id."""
    tasks: str = ""
    """Tasks of nanopause, with commas: gsm8k, squad, coqa, csqa, piqa, hellaswag, lambada, webq, nq, aqua, mbpp."""
    allow_code_execution: bool = False
    """Run the programs that a model writes for mbpp, each in a sandbox of its own."""
    harness: str = ""
    """Tasks of lm-evaluation-harness, with commas."""
    harness_path: str = ""
    """Folder of YAML files with tasks that the harness does not have."""
    pauses: str = ""
    """Numbers of pauses in every prompt, or wherever pause_when has them, with commas. Empty: as many as prompts had in
    finetuning."""
    pause_position: Literal["append", "prepend"] | None = None
    """Pauses after the prompt or before it. None: as the run was finetuned, else after it."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this."""
    samples: int = 1
    """Texts an example, whose scores are averaged."""
    pass_at: str = ""
    """Every k of pass@k, with commas, where answers are programs. Empty: 1 and samples."""
    seed: int = 1337
    """Of the sampling; sample j of example i has seed + i · samples + j."""
    data_dir: str = ""
    """Folder of files like gsm8k_test.jsonl for --tasks. Empty: the hub."""
    split: Literal["test", "validation", "train"] = "test"
    """Of --tasks; test is what papers report."""
    limit: int | None = None
    """Only the first so many examples of a task. None: all."""
    attention: Literal["causal", "prefix"] | None = None
    """prefix: prompt and pauses read each other both ways. None: as the run was finetuned, else causal."""
    batch_size: int = 8
    """Sequences at a time."""
    device: str = "auto"
    """cpu, cuda, …; auto takes a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights and cache; auto is bfloat16 on a GPU."""
    results: str = ""
    """Folder of the results. Empty: evaluation/ in the run (evaluation-best/ of its best checkpoint), or in out/ and
    the name of what is no run."""


def decoding_of(settings: Settings) -> Decoding:
    """What --samples, --temperature and the like say. Raises UserError."""
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


def results_folder(settings: Settings) -> Path:
    path = Path(settings.out_dir)
    run, named = checkpoint.run_of(path) or (Path("out", path.stem), None)
    return Path(settings.results or run / (f"evaluation-{path.name}" if named else "evaluation"))


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python evaluate.py", __doc__)
    tasks = [get_task(name).permitted(settings.allow_code_execution) for name in words(settings.tasks)]
    of_harness = words(settings.harness)
    counts, decoding = numbers("pauses", settings.pauses), decoding_of(settings)
    policy, by_policy = settings.resolved(), settings.pause_when != "after_prompt" or settings.stop_when_useless
    if by_policy and not counts:
        raise UserError("--pause_when and --stop_when_useless ask how many pauses: add --pauses=0,5, say")
    if not tasks and not of_harness:
        raise UserError("nothing to evaluate: name tasks by --tasks=gsm8k,squad or --harness=hellaswag")
    errors.check("batch_size", settings.batch_size, 1, 2**20)
    if settings.limit is not None:
        errors.check("limit", settings.limit, 1, 2**62)
    if (by_policy or decoding.temperature) and of_harness:
        raise UserError("--pause_when, --stop_when_useless, --temperature and --samples are for --tasks: leave out "
                        "--harness")  # fmt: skip
    if by_policy and settings.pause_position:
        raise UserError("--pause_position is for pauses in prompts, and --pause_when and --stop_when_useless have none "
                        "there: leave it out")  # fmt: skip
    if settings.pass_at and not any(task.executes_code for task in tasks):
        raise UserError("--pass_at is for answers that are programs: add --tasks=mbpp, or leave it out")

    # The model, and everything that is to be answered, before anything is.
    processes = Processes(settings.device)
    if processes.count > 1:
        raise UserError(f"evaluate.py is one process, not {processes.count}: start it without torchrun, or once a task "
                        f"and GPU")  # fmt: skip
    device = processes.device
    model, tokenizer, state = hub.load(settings.out_dir, device)
    trained = Config(**state["config"]) if state else Config()
    counts = counts or [trained.prefix_pauses]
    attention = settings.attention or trained.attention
    pause_position, cut = settings.pause_position or trained.pause_position, trained.cut
    weights = fingerprint(model)
    if settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda"):
        model = model.bfloat16()
    cells, sources = [], []
    for task in tasks:
        examples, source = load(task, settings.split, settings.data_dir or None, settings.limit)
        sources.append(source)
        for pauses in counts:
            asked = settings.batch_size, pause_position, cut, settings.policy(pauses) if by_policy else None, decoding
            cells.append(Cell(model, tokenizer, task, examples, pauses, attention, *asked))
    if of_harness:
        if pause_position == "prepend":
            raise UserError("tasks of lm-evaluation-harness take pauses after the prompt: use --pause_position=append")
        manager = harness_tasks(of_harness, settings.harness_path)
        from nanopause.harness import Harness

        harnesses = [Harness(model, tokenizer, pauses, settings.batch_size, attention) for pauses in counts]
    folder = results_folder(settings)
    threads = f" ({torch.get_num_threads()} threads)"
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type + threads
    same = {
        "format": 2,  # of examples.jsonl
        "step": state.get("step"),
        "weights": weights,
        "split": settings.split,
        "limit": settings.limit,
        "attention": attention,
        "pause_position": pause_position,
        "cut": cut,
        "batch_size": settings.batch_size,
        "policy": policy if by_policy else None,
        "decoding": decoding._asdict() if decoding.temperature else None,
        "dtype": str(model.head.weight.dtype).removeprefix("torch."),
        "device": device_name,
    }
    claim(folder, same)
    file = folder / "examples.jsonl"
    before = read_rows(file)
    done = [cell.rows_of(before, file) for cell in cells]
    kernels.choose(None, device)  # says which

    # Answers
    total = sum(len(cell.examples) for cell in cells)
    with Ticker(total, enabled=True) as ticker:
        ticker.say("\n".join([f"results: {folder}", *sources]))
        if any(task.executes_code for task in tasks):
            ticker.say(str(sandbox.protections()))
        if n_before := sum(map(len, done)):
            ticker.say(f"{n_before:,} of {total:,} examples are in {file} already")
        engine, n_done, shown = None, sum(map(len, done)), time.perf_counter()
        if any(cell.max_new_tokens for cell in cells):
            length = max(cell.max_length() for cell in cells if cell.max_new_tokens)
            engine = Engine(model, tokenizer, settings.batch_size, length)
        for cell, rows in zip(cells, done):
            name = f"{cell.task.name}, {cell.pauses} pauses"
            if todo := [i for i in range(len(cell.examples)) if i not in rows]:
                cell.warm_up(todo, engine)
            for answer, seconds in timed(cell.answers(todo, engine) if todo else ()):
                row = cell.row(answer, seconds)
                add_row(file, row)
                rows[answer.index], n_done = row, n_done + 1
                logged = time.perf_counter() - shown > SAY_EVERY
                shown = time.perf_counter() if logged else shown
                ticker.step(n_done, f"{name}: {len(rows):,} of {len(cell.examples):,}", logged)
            figures = summary(rows)
            text = "; ".join(f"{metric} {format_figure(figure)}" for metric, figure in figures["metrics"].items())
            if by_policy:
                text += f"; {figures['pauses_per_example']:.3g} pauses an example"
            if figures["n_cut"]:
                text += f"; {figures['n_cut']:,} of {len(rows):,} prompts cut from the {cut} to fit"
            if figures["n_unfinished"]:
                text += f"; {figures['n_unfinished']:,} answers ended by their {figures['max_new_tokens']} tokens"
            if isinstance(cell.policy, StopWhenUseless) and todo:
                text += f"; {cell.policy.report()}"
            ticker.say(f"{name}: {text}")

    # lm-evaluation-harness, whose tasks are done as a whole
    results, file = summaries(read_rows(file)), folder / "harness.jsonl"
    kept = {(row["task"], row["pauses"]): row["results"] for row in read_rows(file)}
    for name in of_harness:
        for lm in harnesses:
            if (name, lm.pauses) not in kept:
                kept[name, lm.pauses] = harness_results(lm, name, manager, settings.limit)
                add_row(file, {"task": name, "pauses": lm.pauses, "results": kept[name, lm.pauses]})
    results += [with_intervals(row) for key in sorted(kept) for row in kept[key]]

    # Table, JSON, figure
    order = list(dict.fromkeys((row["by"], row["task"]) for row in results))
    results.sort(key=lambda row: order.index((row["by"], row["task"])))
    about = {"source": settings.out_dir, "model": asdict(model.config), "tokenizer": tokenizer.name}
    about["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    written = {"checkpoint": about, "settings": {**asdict(settings), **same}, "sources": sources,
               "versions": versions(), "results": results}  # fmt: skip
    write_json(folder / "results.json", written)
    ticker.show(table(results))
    note = f"difference: to the fewest pauses, example by example; ms an example at batch size {settings.batch_size}"
    note += "; GFLOPs without the pauses that were taken back" * by_policy
    ticker.say(f"{note}, {device_name}, {same['dtype']}")
    if note := interval_note(results):
        ticker.say(note)
    written = "examples.jsonl, results.json"
    if len({row["pauses"] for row in results}) > 1:
        step = f", step {state['step']:,}" if state else ""
        place = f"at a place, {settings.pause_when}" if by_policy else "in the prompt"
        plot(results, folder / "pauses.png", f"{Path(settings.out_dir).name}{step}", place)
        written += ", pauses.png"
    ticker.say(f"written: {folder} ({written})")


if __name__ == "__main__":
    errors.run(main)
