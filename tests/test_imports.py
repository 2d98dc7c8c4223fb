"""./kernels is ours, and must not stand in the way of transformers, which knows another package of that name, nor of
what builds on transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TRANSFORMERS = """
import torch, transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=31)
model = AutoModelForCausalLM.from_config(config)
assert isinstance(model, GPT2LMHeadModel)
ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
assert ids.shape == (1, 7)

from nanopause import kernels
print(kernels.__file__)
"""
LM_EVAL = """
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from nanopause.harness import Harness

from nanopause import kernels
print(kernels.__file__)
"""


@pytest.mark.parametrize("code", [TRANSFORMERS, LM_EVAL], ids=["transformers", "lm_eval"])
def test_others_and_our_kernels_work_from_the_root(code):
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(ROOT / "kernels" / "__init__.py")
