"""Recipes: the papers' values, an explicit key wins, an unknown name is refused, a run resumes."""

import json

import pytest
from conftest import ROOT
from test_train import rows

from nanopause.config import load_config
from nanopause.errors import UserError
from nanopause.recipes import RECIPES, get_recipe

FINETUNE, DIT = (str(ROOT / "config" / name) for name in ("finetune.py", "dit.py"))
GOYAL = {  # learning rate, warmup, steps, batch; of the 1B model, and of the 130M
    "squad": ((1e-4, 100, 10_000, 256), (1e-4, 400, 40_000, 16)),
    "gsm8k": ((1e-4, 200, 20_000, 16), (1e-4, 75, 7500, 16)),
    "hellaswag": ((5e-6, 100, 1000, 16), (1e-6, 100, 1000, 16)),
    "piqa": ((1e-6, 50, 600, 32), (1e-6, 50, 600, 32)),
    "coqa": ((5e-5, 75, 3500, 16), (1e-4, 75, 3500, 16)),
    "csqa": ((5e-5, 100, 4000, 16), (5e-5, 100, 6000, 16)),
    "lambada": ((5e-5, 40, 2800, 16), (5e-5, 40, 1400, 16)),
    "webq": ((5e-4, 200, 2000, 16), (5e-4, 200, 2000, 16)),
    "nq": ((1e-4, 100, 5000, 256), (5e-4, 100, 5000, 256)),
}
KIM = {"gsm8k": (1e-5, 100, 5321, 4), "aqua": (3e-5, 100, 73_100, 4), "mbpp": (3e-5, 100, 280, 4)}
EXPECTED = {
    **{f"{task}_{size}": (task, *values) for task, both in GOYAL.items() for size, values in zip(("1b", "130m"), both)},
    **{f"{task}_dit": (task, *values) for task, values in KIM.items()},
}


def values(config):
    return config.task, config.learning_rate, config.warmup_steps, config.max_steps, config.batch_size


def test_every_recipe_has_the_papers_values():
    assert RECIPES.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        file = DIT if name.endswith("_dit") else FINETUNE
        config = load_config([file, f"--recipe={name}", "--init_from=out/pause"])
        assert values(config) == expected and config.recipe == name
        assert (config.optimizer, config.out_dir) == ("adamw", f"out/{config.task}")
        assert config.pauses == (5 if file == DIT else 10) and config.placement == ("dit" if file == DIT else "appd")
        assert get_recipe(name).source.startswith("Kim" if file == DIT else "Goyal")


def test_an_explicit_key_wins_in_any_order(tmp_path):
    recipe, key, init = "--recipe=gsm8k_1b", "--max_steps=7", "--init_from=out/pause"
    for args in ([FINETUNE, recipe, key], [FINETUNE, key, recipe], [key, recipe, FINETUNE]):
        assert values(load_config([*args, init])) == ("gsm8k", 1e-4, 200, 7, 16)
    assert load_config([FINETUNE, "--recipe=nq_1b", recipe, init]).task == "gsm8k"
    file = tmp_path / "mine.py"  # of a file too, whatever its own keys
    file.write_text("recipe = 'squad_1b'\nmax_steps = 7")
    assert values(load_config([FINETUNE, str(file), init])) == EXPECTED["squad_1b"]
    assert load_config([FINETUNE, str(file), init, recipe]).task == "gsm8k"
    assert load_config([FINETUNE, str(file), init, "--recipe=", "--task=csqa"]).max_steps == 7


@pytest.mark.parametrize("name, hint", [("gsm8k_1bb", "did you mean 'gsm8k_1b'? All are in "), ("xyz", "All are in ")])
def test_an_unknown_recipe_is_one_sentence(name, hint):
    with pytest.raises(UserError) as error:
        load_config([FINETUNE, f"--recipe={name}"])
    assert str(error.value) == f"recipe {name!r} is not known: {hint}nanopause/recipes.py"


def test_a_run_with_a_recipe_resumes(train, tmp_path):
    examples = [{"question": f"{i}?", "answer": f"so\n#### {i}"} for i in range(40)]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    train(tmp_path / "pre", "--block_size=128", "--max_steps=1")
    args = (FINETUNE, "--recipe=gsm8k_130m", f"--init_from={tmp_path / 'pre'}", f"--data_dir={tmp_path}",
            "--block_size=128", "--eval_blocks=2", "--checkpoint_interval=2", "--log_interval=1")  # fmt: skip
    train(tmp_path / "run", *args, "--max_steps=2")
    ended = train(tmp_path / "run", *args, "--max_steps=4", "--resume")
    assert "from step 2\n" in ended.stdout and "recipe was" not in ended.stdout
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert rows(tmp_path / "run")[0]["learning_rate"] == pytest.approx(1e-4 / 75)
    config = json.loads((tmp_path / "run/step_00000004/checkpoint.json").read_text())["config"]
    assert (config["recipe"], config["task"], config["warmup_steps"]) == ("gsm8k_130m", "gsm8k", 75)
    # The values are in the checkpoint too: it continues without the recipe's name.
    same = (FINETUNE, "--task=gsm8k", "--warmup_steps=75", *args[2:], "--max_steps=6")
    ended = train(tmp_path / "run", *same, "--resume")
    assert "recipe was gsm8k_130m" in ended.stdout and rows(tmp_path / "run")[-1]["step"] == 6
