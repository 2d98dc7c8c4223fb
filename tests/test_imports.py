"""./kernels is ours, and must not stand in the way of transformers, which knows another package of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CODE = """
import torch, transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=31)
model = AutoModelForCausalLM.from_config(config)
assert isinstance(model, GPT2LMHeadModel)
ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
assert ids.shape == (1, 7)

import kernels
print(kernels.__file__)
"""


def test_transformers_and_our_kernels_work_from_the_root():
    ended = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(ROOT / "kernels" / "__init__.py")
