"""Evaluate a checkpoint on tasks with several numbers of pauses: scores with intervals, and cost.

    # tasks of nanopause, from the hub or from a folder of JSON lines
    python evaluate.py --out_dir=out/gsm8k --tasks=gsm8k,squad --pauses=0,10,50
    python evaluate.py --out_dir=out/gsm8k --tasks=gsm8k --data_dir=tasks --limit=200
    # pauses where the model is unsure, turned off once they no longer change its log-probabilities
    python evaluate.py --out_dir=out/dit --tasks=gsm8k --pauses=0,5 --pause_when=below_confidence --stop_when_useless
    # programs, ten for each example, run in a sandbox
    python evaluate.py --out_dir=out/dit --tasks=mbpp --allow_code_execution --samples=10 --temperature=0.8
    # any task of lm-evaluation-harness (pip install -e '.[harness]'), its own or local ones
    python evaluate.py --out_dir=out/pause --harness=hellaswag,arc_easy --pauses=0,10
    python evaluate.py --out_dir=out/pause --harness=mine --harness_path=my_tasks

The same command continues an interrupted evaluation; more tasks and pauses add to the results:

    examples.jsonl    a line per finished example: prompt, outputs, scores, cost
    results.json      the table, with settings and versions
    pauses.png        the first metric of each task against the number of pauses
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import ClassVar, Literal

import torch

from nanopause import checkpoint, cli, errors, evaluation, hub, kernels, results
from nanopause.config import Config
from nanopause.distributed import Processes
from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.evaluation import Cell, Decoding, add_row, numbers, read_rows, words
from nanopause.policy import PauseOptions, StopWhenUseless
from nanopause.progress import Ticker
from nanopause.tasks import Task, get_task, load

SECONDS_BETWEEN_LINES = 15.0  # of progress, without a terminal


@dataclass
class Settings(PauseOptions):
    GROUPS: ClassVar[dict[str, str]] = {"evaluation": "out_dir", "policy": "pause_when"}  # of --help: first key

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


def check(settings: Settings, tasks: list[Task]) -> Decoding:
    """How answers are generated. Raises UserError for settings that are out of range or do not fit together."""
    n, ks = settings.samples, numbers("pass_at", settings.pass_at)
    errors.check("samples", n, 1, 10_000)
    errors.check("temperature", settings.temperature, 0, 1e6)
    errors.check("top_p", settings.top_p, 0, 1)
    errors.check("seed", settings.seed, 0, 2**40)
    errors.check("batch_size", settings.batch_size, 1, 2**20)
    if settings.limit is not None:
        errors.check("limit", settings.limit, 1, 2**62)
    for k in ks:
        errors.check("pass_at", k, 1, n)
    if n > 1 and settings.temperature == 0:
        raise UserError(f"--samples={n} would all be the same, greedy text: add --temperature=0.8, say")
    if not tasks and not settings.harness:
        raise UserError("nothing to evaluate: name tasks by --tasks=gsm8k,squad or --harness=hellaswag")
    if settings.uses_policy and not settings.pauses:
        raise UserError("--pause_when and --stop_when_useless need numbers of pauses: add --pauses=0,5, say")
    if settings.uses_policy and settings.pause_position:
        raise UserError("--pause_position is for pauses in prompts, and --pause_when and --stop_when_useless have none "
                        "there: leave it out")  # fmt: skip
    if settings.harness and (settings.uses_policy or settings.temperature):
        raise UserError("--pause_when, --stop_when_useless, --temperature and --samples are for --tasks: leave out "
                        "--harness")  # fmt: skip
    if settings.pass_at and not any(task.executes_code for task in tasks):
        raise UserError("--pass_at is for answers that are programs: add --tasks=mbpp, or leave it out")
    return Decoding(n, settings.temperature, settings.top_p, settings.seed, tuple(ks or sorted({1, n})))


def results_folder(settings: Settings) -> Path:
    path = Path(settings.out_dir)
    run, named = checkpoint.run_of(path) or (Path("out", path.stem), None)
    return Path(settings.results or run / (f"evaluation-{path.name}" if named else "evaluation"))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate_tasks(cells: list[Cell], file: Path, batch_size: int, ticker: Ticker) -> None:
    """Append the answers that `file` does not have yet, example by example."""
    before = read_rows(file)
    finished = [cell.rows_of(before, file) for cell in cells]
    n_done, last_line = sum(map(len, finished)), perf_counter()
    if n_done:
        ticker.say(f"{n_done:,} of {sum(len(cell.examples) for cell in cells):,} examples are in {file} already")
    engine, generating = None, [cell for cell in cells if cell.max_new_tokens]
    if generating:
        length = max(cell.max_length() for cell in generating)
        engine = Engine(generating[0].model, generating[0].tokenizer, batch_size, length)
    for cell, rows in zip(cells, finished):
        name = f"{cell.task.name}, {cell.pauses} pauses"
        todo = [i for i in range(len(cell.examples)) if i not in rows]
        if todo:
            ticker.step(n_done, f"{name}: starts", True)
            cell.warm_up(todo, engine)
            start = perf_counter()  # time between two answers is not counted
            for answer in cell.answers(todo, engine):
                seconds = perf_counter() - start
                rows[answer["index"]] = row = cell.scored(answer) | {"seconds": seconds}
                add_row(file, row)
                n_done += 1
                is_due = perf_counter() - last_line > SECONDS_BETWEEN_LINES
                last_line = perf_counter() if is_due else last_line
                ticker.step(n_done, f"{name}: {len(rows):,} of {len(cell.examples):,}", is_due)
                start = perf_counter()
        report = f"; {cell.policy.report()}" if todo and isinstance(cell.policy, StopWhenUseless) else ""
        ticker.say(f"{name}: {results.described(rows)}{report}")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python evaluate.py", __doc__)
    tasks = [get_task(name).permitted(settings.allow_code_execution) for name in words(settings.tasks)]
    harness_names, options = words(settings.harness), settings.resolved()
    decoding = check(settings, tasks)

    # ---- the model
    processes = Processes(settings.device)
    if processes.count > 1:
        raise UserError(f"evaluate.py is one process, not {processes.count}: start it without torchrun, or once per "
                        f"task and GPU")  # fmt: skip
    device = processes.device
    print(f"loading the model {settings.out_dir}", flush=True)
    model, tokenizer, state = hub.load(settings.out_dir, device)
    trained = Config(**state.get("config", {}))
    counts = numbers("pauses", settings.pauses) or [state["pauses"]]
    attention = settings.attention or trained.attention
    pause_position, cut = settings.pause_position or trained.pause_position, trained.cut
    weights = evaluation.fingerprint(model)
    if settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda"):
        model = model.bfloat16()

    # ---- what to evaluate: everything is checked before the first example
    cells, sources, harnesses = [], [], []
    for task in tasks:
        print(f"reading {task.name}", flush=True)
        examples, source = load(task, settings.split, settings.data_dir or None, settings.limit)
        sources.append(source)
        for n_pauses in counts:
            policy = settings.policy(n_pauses) if settings.uses_policy else None
            cells.append(Cell(model, tokenizer, task, examples, n_pauses, attention, settings.batch_size,
                              pause_position, cut, policy, decoding))  # fmt: skip
    if harness_names:
        if pause_position == "prepend":
            raise UserError("tasks of lm-evaluation-harness take pauses after the prompt: use --pause_position=append")
        print("listing the tasks of lm-evaluation-harness and loading their data", flush=True)
        errors.needs("lm_eval", "harness")
        from nanopause import harness

        manager = harness.load_tasks(harness_names, settings.harness_path)
        harnesses = [harness.Harness(model, tokenizer, n, settings.batch_size, attention) for n in counts]
    folder = results_folder(settings)
    is_gpu = device.type == "cuda"
    fixed = {  # what all results of a folder have in common
        "format": 3,  # of examples.jsonl and harness.jsonl
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
        "device": torch.cuda.get_device_name(device) if is_gpu else f"cpu ({torch.get_num_threads()} threads)",
    }
    evaluation.claim(folder, fixed)
    kernels.choose(None, device)  # reports which

    # ---- scores
    by_example, by_task = folder / "examples.jsonl", folder / "harness.jsonl"
    with Ticker(sum(len(cell.examples) for cell in cells), enabled=True) as ticker:
        ticker.say("\n".join([f"results: {folder}", *sources]))
        evaluate_tasks(cells, by_example, settings.batch_size, ticker)
    found = {(row["task"], row["pauses"]) for row in read_rows(by_task)}
    for name in harness_names:
        for lm in harnesses:
            if (name, lm.pauses) not in found:
                ticker.say(f"{name}, {lm.pauses} pauses, by lm-evaluation-harness: starts")
                evaluated = harness.evaluate(lm, name, manager, settings.limit)
                add_row(by_task, {"task": name, "pauses": lm.pauses, "results": evaluated})
    ticker.say("computing the intervals")
    rows = results.summaries(read_rows(by_example))
    rows += results.harness_summaries(row for group in read_rows(by_task) for row in group["results"])

    # ---- table, JSON, figure
    about = {"source": settings.out_dir, "model": asdict(model.config), "tokenizer": tokenizer.name,
             "parameters": sum(parameter.numel() for parameter in model.parameters())}  # fmt: skip
    evaluation.write_json(folder / "results.json", {
        "checkpoint": about, "settings": {**asdict(settings), **fixed}, "sources": sources,
        "versions": evaluation.versions(), "results": rows,
    })  # fmt: skip
    ticker.show(results.table(rows))
    ticker.say(f"difference: to the fewest pauses, paired by example; GFLOPs and ms per example"
               f"{', GFLOPs without the pauses that were rolled back' * settings.uses_policy}, at batch size "
               f"{settings.batch_size}, {fixed['device']}, {fixed['dtype']}\n{results.NOTE}")  # fmt: skip
    files = "examples.jsonl, results.json"
    if len({row["pauses"] for row in rows}) > 1:
        step = f", step {state['step']:,}" if "step" in state else ""
        place = f"at a place, {settings.pause_when}" if settings.uses_policy else "in the prompt"
        results.plot(rows, folder / "pauses.png", f"{Path(settings.out_dir).name}{step}", place)
        files += ", pauses.png"
    ticker.say(f"written: {folder} ({files})")


if __name__ == "__main__":
    errors.run(main)
