"""The wheel: its commands, notebooks, and Hugging Face's package `kernels` beside ours."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, TINY
from nbclient import NotebookClient

BESIDE_HUGGING_FACE = """
import torch, transformers.integrations.hub_kernels
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import is_kernels_available
assert is_kernels_available()
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=31)
model = AutoModelForCausalLM.from_config(config)
ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
assert ids.shape == (1, 7)

import kernels, nanopause.kernels
assert kernels.LayerRepository and nanopause.kernels.attention
print(nanopause.kernels.__file__)
"""
NOTEBOOK = """
import nanopause
nanopause.train(nanopause.Config(dataset="CORPUS", out_dir="out/notebook", max_steps=2, n_layer=1, n_embd=16, n_head=1,
                                 block_size=32, pause_rate=0.1, eval_blocks=2))
model = nanopause.load("out/notebook")
print("generated", model.generate("Return a", pauses=3, max_new_tokens=5).pauses)
"""


def run(*command: str | Path, folder: Path, path: list[Path]) -> str:
    """The stdout of a command in `folder`, with `path` before the installed packages."""
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, path))}
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A folder in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for file in files:
        if file.endswith((".py", ".toml", "README.md", "LICENSE")) and (ROOT / file).exists():
            (folder / "clone" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "clone" / file).write_bytes((ROOT / file).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", f"--target={folder / 'site'}"]
    subprocess.run([*pip, folder / "clone"], check=True)
    return folder / "site"


WITHOUT_IT = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: (
    None if (spec := find_spec(name, *args)) and name == "kernels" and "site-packages" in str(spec.origin) else spec
)
from transformers.models.qwen3 import modeling_qwen3
from transformers import GenerationMixin
from nanopause.kernels import attention
"""


def test_a_clone_without_hugging_face_kernels():
    """transformers finds our folder instead, in the root of a clone."""
    run(sys.executable, "-c", WITHOUT_IT, folder=ROOT, path=[])


@pytest.mark.parametrize("is_wheel", [True, False], ids=["wheel", "clone"])
def test_beside_hugging_face_kernels(is_wheel, wheel, tmp_path):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    # transformers ignores other versions than this one.
    (tmp_path / "kernels-0.dist-info").mkdir()
    (tmp_path / "kernels-0.dist-info/METADATA").write_text(f"Name: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    folder, path, ours = (tmp_path, [wheel, tmp_path], wheel / "nanopause") if is_wheel else (ROOT, [tmp_path], ROOT)
    printed = run(sys.executable, "-c", BESIDE_HUGGING_FACE, folder=folder, path=path)
    assert printed.splitlines()[-1] == str(ours / "kernels" / "__init__.py")


def test_commands_of_a_wheel(wheel, tmp_path):
    command = sys.executable, wheel / "bin/nanopause"
    size = [*TINY, "--max_steps=2", "--eval_blocks=2"]
    assert "written: out/pause" in run(*command, "train", "config/pause.py", *size, folder=tmp_path, path=[wheel])
    assert (tmp_path / "data/pydocs/bytes/meta.json").exists()
    assert run(*command, "sample", "--prompt=Return", "--max_new_tokens=3", folder=tmp_path, path=[wheel])
    ended = subprocess.run([*command, "pretrain"], capture_output=True, text=True, env={"PYTHONPATH": str(wheel)})
    assert ended.returncode == 1 and ended.stderr.startswith("usage: nanopause prepare|train|sample")


def test_notebook(wheel, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(wheel))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK.replace("CORPUS", str(tiny_corpus)))])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    printed = "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "written: out/notebook" in printed and printed.rstrip().endswith("generated 3")
