"""Finetuning hyper-parameters of the papers: python train.py config/finetune.py --recipe=gsm8k_1b --init_from=out/pause

A recipe sets the task and the values below. It is applied after the config files and before the other --key=value
arguments: an explicit key wins.
"""

from difflib import get_close_matches
from typing import NamedTuple

from nanopause.errors import UserError

GOYAL = "Goyal et al. 2023"  # after config/finetune.py; 130m, 1b: the models of config/pause_130m.py and pause_1b.py
KIM = "Kim et al. 2025"  # after config/dit.py; max_steps are three epochs


class Recipe(NamedTuple):
    """warmup_steps: None keeps the value of the config files. source: the paper; it is no setting."""

    task: str
    learning_rate: float
    warmup_steps: int | None
    max_steps: int
    batch_size: int
    source: str

    def arguments(self) -> list[str]:
        """The settings as --key=value."""
        settings = self._asdict()
        del settings["source"]
        return [f"--{key}={value}" for key, value in settings.items() if value is not None]


RECIPES = {
    "gsm8k_130m": Recipe("gsm8k", 1e-4, 75, 7_500, 16, GOYAL),
    "gsm8k_1b": Recipe("gsm8k", 1e-4, 200, 20_000, 16, GOYAL),
    "squad_130m": Recipe("squad", 1e-4, 400, 40_000, 16, GOYAL),
    "squad_1b": Recipe("squad", 1e-4, 100, 10_000, 256, GOYAL),
    "coqa_130m": Recipe("coqa", 1e-4, 75, 3_500, 16, GOYAL),
    "coqa_1b": Recipe("coqa", 5e-5, 75, 3_500, 16, GOYAL),
    "csqa_130m": Recipe("csqa", 5e-5, 100, 6_000, 16, GOYAL),
    "csqa_1b": Recipe("csqa", 5e-5, 100, 4_000, 16, GOYAL),
    "piqa_130m": Recipe("piqa", 1e-6, 50, 600, 32, GOYAL),
    "piqa_1b": Recipe("piqa", 1e-6, 50, 600, 32, GOYAL),
    "hellaswag_130m": Recipe("hellaswag", 1e-6, 100, 1_000, 16, GOYAL),
    "hellaswag_1b": Recipe("hellaswag", 5e-6, 100, 1_000, 16, GOYAL),
    "lambada_130m": Recipe("lambada", 5e-5, 40, 1_400, 16, GOYAL),
    "lambada_1b": Recipe("lambada", 5e-5, 40, 2_800, 16, GOYAL),
    "webq_130m": Recipe("webq", 5e-4, 200, 2_000, 16, GOYAL),
    "webq_1b": Recipe("webq", 5e-4, 200, 2_000, 16, GOYAL),
    "nq_130m": Recipe("nq", 5e-4, 100, 5_000, 256, GOYAL),
    "nq_1b": Recipe("nq", 1e-4, 100, 5_000, 256, GOYAL),
    "gsm8k_dit": Recipe("gsm8k", 1e-5, None, 5_321, 4, KIM),  # of the 7,095 examples outside the validation split
    "aqua_dit": Recipe("aqua", 3e-5, None, 73_100, 4, KIM),  # of 97,467 examples
    "mbpp_dit": Recipe("mbpp", 3e-5, None, 280, 4, KIM),  # of 374 examples
}


def get_recipe(name: str) -> Recipe:
    """A recipe by its name. Raises UserError with the nearest name."""
    if name not in RECIPES:
        near = get_close_matches(name.lower(), RECIPES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"recipe {name!r} is not known: {hint}All are in nanopause/recipes.py")
    return RECIPES[name]
