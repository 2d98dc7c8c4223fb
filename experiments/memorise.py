"""End-to-end check of finetuning, pauses, decoding and scoring: a small model memorises 32 examples of each task with
generated answers, and generates them.

    python experiments/memorise.py                  # tasks from the hub
    python experiments/memorise.py --data_dir=tasks --tasks=gsm8k,squad

For every task, 0 and 10 pauses, causal and prefix attention: train.py on the first 32 examples of the training split,
evaluate.py on the same ones. The exit code is 1 unless every answer is generated word for word.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanopause import cli, errors  # noqa: E402
from nanopause.errors import UserError  # noqa: E402
from nanopause.evaluation import words  # noqa: E402
from nanopause.tasks import get_task  # noqa: E402

N = 32
MODEL = ["--tokenizer=gpt2", "--n_layer=2", "--n_embd=64", "--n_head=4", "--block_size=1024"]
TRAINING = [f"--limit={N}", f"--batch_size={N}", "--warmup_steps=5", "--eval_blocks=1"]


@dataclass
class Settings:
    tasks: str = "gsm8k,squad,coqa,csqa,lambada,webq,nq"
    """Tasks, with commas."""
    data_dir: str = ""
    """Folder with the tasks' files. Empty: the hub."""
    max_steps: int = 50
    """Optimizer steps, each over all examples."""
    out_dir: str = "out/memorise"
    """Folder of runs and results.json; existing runs are deleted and repeated."""
    device: str = "auto"
    """cpu, cuda, …; auto: a GPU if there is one."""


def train_and_evaluate(settings: Settings, task: str, pauses: int, attention: str) -> tuple[int, float]:
    """Number of examples that the model trained on them generates word for word, and the task's first metric, 0 to 1.
    For CoQA the metric is below 1 where its references disagree. Raises UserError if a script fails."""
    out = Path(settings.out_dir, f"{task}-{pauses}-{attention}").resolve()
    shutil.rmtree(out, ignore_errors=True)
    data_dir = settings.data_dir and Path(settings.data_dir).resolve()
    common = [f"--out_dir={out}", f"--data_dir={data_dir}", f"--device={settings.device}"]
    steps = [f"--max_steps={settings.max_steps}", f"--eval_interval={settings.max_steps}"]
    for command in (
        ["train.py", f"--task={task}", f"--pauses={pauses}", f"--attention={attention}", *MODEL, *TRAINING, *steps],
        ["evaluate.py", f"--tasks={task}", "--split=train", f"--limit={N}", f"--batch_size={N}"],
    ):
        ended = subprocess.run([sys.executable, *command, *common], cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise UserError(f"{command[0]} of {out.name} failed: {ended.stderr.strip().splitlines()[-1]}")
    (row,) = json.loads((out / "evaluation" / "results.json").read_text())["results"]
    lines = [json.loads(line) for line in (out / "evaluation" / "examples.jsonl").read_text().splitlines()]
    metric = next(iter(row["metrics"]))
    return sum(line["answers"] == line["references"][:1] for line in lines), row["metrics"][metric]["value"]


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/memorise.py", __doc__)
    names = [get_task(name).name for name in words(settings.tasks)]
    rows = []
    for task, pauses, attention in product(names, (0, 10), ("causal", "prefix")):
        n, metric = train_and_evaluate(settings, task, pauses, attention)
        rows.append({"task": task, "pauses": pauses, "attention": attention, "generated": n, "metric": metric})
        print(f"{task:10} {pauses:3} pauses  {attention:6}  {n} of {N}, metric {metric:.1%}", flush=True)
        Path(settings.out_dir, "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    if missed := [row for row in rows if row["generated"] < N]:
        raise UserError(f"{len(missed)} of {len(rows)} models have not memorised all examples: raise --max_steps")


if __name__ == "__main__":
    errors.run(main)
