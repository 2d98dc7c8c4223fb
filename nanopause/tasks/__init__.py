"""The finetuning and evaluation tasks: `load(get_task("gsm8k"), "train")`."""

from difflib import get_close_matches

from nanopause.errors import UserError
from nanopause.tasks import counting, match
from nanopause.tasks.aqua import AQUA
from nanopause.tasks.coqa import COQA
from nanopause.tasks.csqa import CSQA
from nanopause.tasks.gsm8k import GSM8K
from nanopause.tasks.hellaswag import HELLASWAG
from nanopause.tasks.lambada import LAMBADA
from nanopause.tasks.mbpp import MBPP
from nanopause.tasks.nq import NQ
from nanopause.tasks.piqa import PIQA
from nanopause.tasks.rows import load
from nanopause.tasks.squad import SQUAD
from nanopause.tasks.task import Example, Task
from nanopause.tasks.webq import WEBQ

__all__ = ["TASKS", "Example", "Task", "get_task", "load"]

GENERATED = {counting.NAME: counting.counting, match.NAME: match.match}  # name patterns of tasks with generated data
TASKS = {task.name: task for task in (GSM8K, SQUAD, COQA, CSQA, PIQA, HELLASWAG, LAMBADA, WEBQ, NQ, AQUA, MBPP)}


def get_task(name: str) -> Task:
    """The task with this name. Raises UserError for an unknown name, with the nearest known one."""
    for names, task_of in GENERATED.items():
        if names.fullmatch(name):
            return task_of(name)
    if name not in TASKS:
        near = get_close_matches(name.lower(), TASKS, 1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"choose one of {', '.join(TASKS)}, parity_16, mod3_16 or match3_6"
        )
        raise UserError(f"task {name!r} is not known: {hint}")
    return TASKS[name]
