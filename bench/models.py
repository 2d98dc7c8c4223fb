"""Model settings that several benches share, and the same models in transformers and nanoGPT."""

import importlib.util
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn

from nanopause.errors import UserError
from nanopause.hub import their_tensors, transformers_config
from nanopause.model import GPT

# Settings of nanopause.model.GPTConfig for models with random weights.
GPT2 = dict(position="learned", norm="layer", qk_norm=False, mlp="gelu", tied=True, bias=True, zero_init=False)
LLAMA = dict(position="rope", norm="rms", qk_norm=False, mlp="swiglu", tied=True, bias=False, zero_init=False)

GPT2_124M = dict(n_layer=12, n_head=12, n_embd=768)
GPT2_SMALL = dict(n_layer=3, n_head=4, n_embd=128)  # the model of config/gpt2.py


def compiled(model: nn.Module) -> nn.Module:
    """The model, compiled on a GPU as in train.py."""
    return torch.compile(model) if next(model.parameters()).is_cuda else model


def transformers_model(model: GPT) -> nn.Module:
    """The model in transformers, with the same weights, dtype and device. Raises UserError if transformers has no such
    architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**transformers_config(model.config), bos_token_id=None, eos_token_id=None)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    theirs.loss_type = "ForCausalLM"  # the default; set to avoid a warning
    theirs.load_state_dict(their_tensors(model), strict=False)  # the head is tied to the embedding
    return theirs.to(model.head.weight)


def nanogpt_model(checkout: str, model: GPT) -> nn.Module:
    """The model as the GPT of model.py in a checkout of nanoGPT, with the same weights, dtype and device.

    Raises UserError if the file does not exist, and for models other than GPT-2.
    """
    file = Path(checkout, "model.py")
    if not checkout or not file.exists():
        raise UserError(f"{file if checkout else 'no checkout'}: give --nanogpt=PATH to one of karpathy/nanoGPT")
    if model.config.norm != "layer":
        raise UserError("nanoGPT implements GPT-2 only")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")
    with redirect_stdout(None):  # nanoGPT prints its number of parameters
        theirs = module.GPT(module.GPTConfig(**{name: getattr(model.config, name) for name in names}, dropout=0.0))
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers stores these as [in, out]
    tensors = {name: x.T if name.endswith(transposed) else x for name, x in their_tensors(model).items()}
    theirs.load_state_dict(tensors, strict=False)  # the head is tied to the embedding
    for part in theirs.modules():
        if isinstance(part, nn.GELU):
            part.approximate = "tanh"  # GPT-2's GELU; nanoGPT's exact GELU changes a gradient by 4e-4
    return theirs.to(model.head.weight)
