"""Every command of README.md and docs/. Commands for which the page says GPU or hub, and those that take minutes, are
parsed; the others run, small."""

import importlib
import re
import shlex
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
import scripts
from conftest import ROOT

from nanopause import cli
from nanopause.config import load_config
from nanopause.scripts.data import DATA

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {  # arguments that make a command quick
    "train.py": ["--max_steps=2", "--eval_blocks=2", "--final_eval_blocks=2", "--device=cpu"],
    "sample.py": ["--max_new_tokens=3", "--device=cpu"],
    "evaluate.py": ["--limit=4", "--device=cpu"],
    "data/text.py": [],
    "nanopause.compare": ["--out=out/compare.png"],
    "nanopause.hub": [],
}


def commands(page: Path) -> list[tuple[list[str], bool]]:
    """The command lines in a page's code blocks, and whether one needs a GPU or the hub."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            for command in " ".join(map(shlex.quote, words)).split(" '&&' "):
                command = shlex.split(command)
                if command and command[0] in ("python", "torchrun", "pip", "pytest", "ruff", "bash", "pre-commit"):
                    found.append((command, bool(re.search(r"#.*\b(GPU|hub)", line))))
    return found


def target(command: list[str]) -> tuple[str, list[str]]:
    """The script or module that a command runs, and its arguments."""
    words = command[1:]
    launcher = list(takewhile(lambda word: word.startswith("-") and word != "-m", words))
    words = words[len(launcher) :]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


ALL = [(page.name, command, is_marked) for page in PAGES for command, is_marked in commands(page)]
PYTHON = [each for each in ALL if each[1][0] in ("python", "torchrun")]


def test_pages_have_commands():
    assert {"README.md", "evaluation.md", "evidence.md", "checkpoints.md", "dit.md"} <= {page for page, *_ in PYTHON}


@pytest.mark.parametrize("page, command", [each[:2] for each in PYTHON], ids=lambda x: x if isinstance(x, str) else "")
def test_arguments_are_understood(page, command):
    script, arguments = target(command)
    if script == "train.py":
        if "--help" not in arguments:
            load_config(arguments)
    elif script == "bench":  # test_bench.py runs them
        assert (ROOT / "bench" / f"{arguments[0]}.py").exists()
    elif script.startswith("data/"):
        assert (ROOT / script).exists()
    else:
        name = script.removesuffix(".py").replace("/", ".")
        module = importlib.import_module(f"nanopause.scripts.{name}" if name in ("sample", "evaluate") else name)
        cli.parse(module.Settings, arguments, script)


def test_commands_run(tmp_path, monkeypatch):
    """Those of the README that need neither a GPU nor the hub, one after another in an empty folder."""
    shutil.copy(ROOT / "README.md", tmp_path)
    corpus = f"readme_{tmp_path.parent.name}"
    ran = []
    try:
        for command, is_marked in commands(ROOT / "README.md"):
            if command[0] != "python" or is_marked or (script := target(command)[0]) not in SMALL:
                continue
            arguments = [word.replace("=mine", f"={corpus}") for word in target(command)[1]]
            module = ["-m"] if script.startswith("nanopause.") else []
            ended = scripts.run(*module, script, *arguments, *SMALL[script], folder=tmp_path)
            assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stderr}"
            ran.append(script)
    finally:
        shutil.rmtree(DATA / corpus, ignore_errors=True)
    assert set(ran) == set(SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "out"}
