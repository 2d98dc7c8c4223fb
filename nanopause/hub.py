"""Import and export of transformers checkpoints: GPT-2, Llama (and SmolLM2), Qwen2 and Qwen3.

    python -m nanopause.hub --checkpoint=out/pause --folder=exported    # for transformers, vLLM and the like

The pause is the id after the tokenizer's last one. If the embedding has no row for it, rows are added up to a multiple
of 64. The rows of the pause and of added ids are initialised to the mean of the text rows.
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from nanopause import checkpoint, cli, errors
from nanopause.card import card
from nanopause.config import Config
from nanopause.errors import UserError, first_line, needs
from nanopause.model import GPT, GPTConfig, rope_tables
from nanopause.tokenizer import PAUSE, Tokenizer, pretrained_tokenizer

KINDS = ("gpt2", "llama", "qwen2", "qwen3")  # SmolLM2 is a llama
CHUNK_ELEMENTS = 1 << 20  # of a tensor copied at a time
PROBE = "It's 12345, and\n\n  WE'LL see: ”naïve”…"  # tokenizers split it in different ways
COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # in some files, but computed from the config
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # first bytes of torch.save files
SHARED = {"vocab_size": "vocab_size", "tied": "tie_word_embeddings"}
GPT2_NAMES = SHARED | {
    "block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_mlp": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}  # of a GPTConfig's settings in transformers  # fmt: skip
LLAMA_NAMES = SHARED | {
    "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "n_mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}  # also of Qwen  # fmt: skip
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Parameter names and configs, in both directions


def names(config: GPTConfig, vocab_size: int | None = None) -> dict[str, list[tuple[str, int]]]:
    """For every parameter of a GPT, names and numbers of rows of the transformers parameters of which it is the
    concatenation. Names lack the model's prefix. GPT-2's matrices are transposed in transformers. vocab_size: rows of
    the embedding in transformers; default: config.vocab_size."""
    C, D = config.n_embd, config.head_width
    V = vocab_size or config.vocab_size
    q, kv = config.n_head * D, config.n_kv_head * D
    if config.norm == "layer":
        ours = {
            "token_embedding": [("wte", V)],
            "position_embedding": [("wpe", config.block_size)],
            "norm": [("ln_f", C)],
        }
        path = "h"
        layer = {
            "attention_norm": [("ln_1", C)],
            "attention.qkv": [("attn.c_attn", 3 * q)],
            "attention.out": [("attn.c_proj", C)],
            "mlp_norm": [("ln_2", C)],
            "mlp.up": [("mlp.c_fc", config.n_mlp)],
            "mlp.down": [("mlp.c_proj", C)],
        }
    else:
        ours = {"token_embedding": [("embed_tokens", V)], "norm": [("norm", C)]}
        path = "layers"
        layer = {
            "attention_norm": [("input_layernorm", C)],
            "attention.q_norm": [("self_attn.q_norm", D)],
            "attention.k_norm": [("self_attn.k_norm", D)],
            "attention.qkv": [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
            "attention.out": [("self_attn.o_proj", C)],
            "mlp_norm": [("post_attention_layernorm", C)],
            "mlp.up": [("mlp.gate_proj", config.n_mlp), ("mlp.up_proj", config.n_mlp)],  # ReLU²: two equal matrices
            "mlp.down": [("mlp.down_proj", C)],
        }
    for i in range(config.n_layer):
        ours |= {
            f"blocks.{i}.{part}": [(f"{path}.{i}.{name}", rows) for name, rows in theirs]
            for part, theirs in layer.items()
        }
    ours["head"] = [("lm_head", V)]
    with torch.device("meta"):
        parameters = [name.rpartition(".") for name, _ in GPT(config).named_parameters()]
    return {f"{part}.{kind}": [(f"{name}.{kind}", rows) for name, rows in ours[part]] for part, _, kind in parameters}


def config_of(theirs: dict, source: str) -> GPTConfig:
    """The GPTConfig of a transformers config. Raises UserError that names the first unsupported setting."""
    kind = theirs["model_type"]
    if kind not in KINDS:
        raise UserError(f"{source} has the architecture {kind!r}, which is not supported: {', '.join(KINDS)} are")

    def refuse(key: str, *accepted) -> None:
        if theirs.get(key) not in (None, *accepted):
            raise UserError(f"{source} has {key}={theirs[key]!r}, which is not supported: "
                            f"{' or '.join(map(repr, accepted))} is")  # fmt: skip

    if theirs.get("quantization_config"):
        raise UserError(f"{source} is quantised, which is not supported: use the original weights")
    if kind == "gpt2":
        refuse("activation_function", "gelu_new", "gelu_pytorch_tanh")
        refuse("scale_attn_weights", True)
        refuse("scale_attn_by_inverse_layer_idx", False)
        refuse("add_cross_attention", False)
        shape = {ours: theirs[name] for ours, name in GPT2_NAMES.items()}
        return GPTConfig(**shape, norm="layer", qk_norm=False, position="learned", mlp="gelu", bias=True)
    refuse("hidden_act", "silu", "relu")
    if kind != "qwen2":
        refuse("attention_bias", False)
    refuse("mlp_bias", False)
    refuse("use_sliding_window", False)
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if rope_type == "linear":
        scaling = [rope["factor"]]
    elif rope_type == "llama3":
        scaling = [rope[key] for key in LLAMA3_SCALING]
    elif rope_type != "default":
        raise UserError(f"{source} has rotary scaling of type {rope_type!r}, which is not supported: 'linear' and "
                        f"'llama3' are")  # fmt: skip
    head_dim = theirs.get("head_dim")
    if head_dim and head_dim * theirs["num_attention_heads"] == theirs["hidden_size"]:
        head_dim = None
    return GPTConfig(
        **{ours: theirs[name] for ours, name in LLAMA_NAMES.items()}, head_dim=head_dim, norm="rms",
        qk_norm=kind == "qwen3", position="rope", rope_theta=rope.get("rope_theta", theirs.get("rope_theta")),
        rope_scaling=scaling, mlp="swiglu" if theirs["hidden_act"] == "silu" else "relu2", bias=False,
        qkv_bias=kind == "qwen2",
    )  # fmt: skip


def transformers_config(config: GPTConfig) -> dict:
    """The transformers config of a GPTConfig. Raises UserError for a setting that transformers' model does not have. To
    detect these, the transformers config is converted back and compared."""
    theirs = _transformers_config(config)
    restored = config_of(theirs, "the export")
    for field in fields(config):
        ours, written = _effective(config, field.name), _effective(restored, field.name, field.default)
        if ours != written:
            raise UserError(f"transformers' {theirs['model_type']} has no {field.name}={ours}, only {written}: train "
                            f"with that to export")  # fmt: skip
    return theirs


def _effective(config: GPTConfig, name: str, default: object = None) -> object:
    """The value of a setting, or a constant if the output of a trained model does not depend on it. default: if the
    config lacks the setting."""
    if name == "zero_init" or (name.startswith("rope_") and config.position == "learned"):
        return None
    if name == "head_dim":
        return config.head_width
    if name in ("bias", "qkv_bias"):
        has_all_biases = config.norm == "layer"  # GPT-2; missing biases are exported as zeros
        return True if has_all_biases else bool(config.bias if config.qkv_bias is None else getattr(config, name))
    return getattr(config, name, default)


def _transformers_config(config: GPTConfig) -> dict:
    """The transformers config; only the choice of the architecture is checked."""
    if config.norm == "layer":
        ours = config.qk_norm, config.position, config.mlp, config.n_kv_head, config.n_head * config.head_width
        if ours != (False, "learned", "gelu", config.n_head, config.n_embd):
            raise UserError("with norm=layer transformers has GPT-2 only: train with qk_norm=False, position=learned, "
                            "mlp=gelu, n_kv_head=n_head and head_dim=n_embd/n_head")  # fmt: skip
        return {name: getattr(config, ours) for ours, name in GPT2_NAMES.items()} | {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        }  # fmt: skip
    if config.position != "rope" or config.mlp == "gelu" or config.bias or (config.qkv_bias and config.qk_norm):
        raise UserError("with norm=rms transformers has Llama, Qwen2 and Qwen3: train with position=rope, mlp=swiglu "
                        "or relu2, bias=False, and not both qkv_bias and qk_norm")  # fmt: skip
    kind = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias else "Llama"
    if kind == "Llama" and config.n_embd % config.n_head:
        raise UserError(f"transformers' Llama cannot have n_embd={config.n_embd}, which is not a multiple of "
                        f"n_head={config.n_head}: train with qk_norm=True, which is Qwen3")  # fmt: skip
    scaling = None
    if config.rope_scaling:
        scaling = {"rope_type": "linear" if len(config.rope_scaling) == 1 else "llama3"}
        scaling |= zip(LLAMA3_SCALING, config.rope_scaling)
    return {name: getattr(config, ours) for ours, name in LLAMA_NAMES.items()} | {
        "model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"], "head_dim": config.head_width,
        "rope_theta": config.rope_theta, "rope_scaling": scaling,
        "hidden_act": "silu" if config.mlp == "swiglu" else "relu",
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
    }  # fmt: skip


# Import


class Weights(NamedTuple):
    """Tensors of a checkpoint by their names in transformers, read on demand."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype  # represents all of them exactly
    read: Callable[[str, int, int], Tensor]  # (name, start, stop): rows start … stop − 1


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    """An open safetensors file. Raises UserError if it is missing, damaged or a pickle."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing, and the index of {file.parent} names it: download the folder again"
        ) from None
    except safetensors.SafetensorError as error:
        with open(file, "rb") as stream:
            if stream.read(4).startswith(PICKLES):
                raise UserError(f"{file} is a pickle, which can execute code, and not a safetensors file: convert it "
                                f"with safetensors.torch.save_file") from None  # fmt: skip
        raise UserError(f"{file} is truncated or damaged ({error}): download it again") from None


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, from model.safetensors or else from the index of several files."""
    index = folder / "model.safetensors.index.json"
    file = folder / "model.safetensors"
    if file.exists():
        with _opened(file) as tensors:
            return dict.fromkeys(tensors.keys(), file)
    if index.exists():
        try:
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is damaged: download it again") from None
        if outside := [file for file in files.values() if file.parent != folder]:
            raise UserError(f"{index} names {outside[0]}, which is not in its folder: download it again")
        return files
    if pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
        raise UserError(f"{folder} has its weights as a pickle ({pickles[0].name}), which can execute code: convert "
                        f"them to safetensors")  # fmt: skip
    raise UserError(f"{folder} has no model.safetensors: download the folder again")


def _folder_weights(folder: Path) -> Weights:
    """The weights of a folder. The file is memory-mapped again for each read and unmapped when the returned view is
    freed: pages of a file that stays mapped count as memory of the process, up to the size of the file."""
    files = _weight_files(folder)
    shapes, dtypes = {}, set()
    for file in dict.fromkeys(files.values()):
        with _opened(file) as tensors:
            present = set(tensors.keys())
            if missing := sorted(name for name in files if files[name] == file and name not in present):
                raise UserError(f"{file} has no tensor {missing[0]}, which model.safetensors.index.json lists: "
                                f"download both again")  # fmt: skip
            for name in sorted(name for name in present if not name.endswith(COMPUTED)):
                tensor = tensors.get_slice(name)
                dtype = tensor.get_dtype()
                if dtype not in DTYPES:
                    raise UserError(f"{file} has {name} in {dtype}, which is not supported: use the original weights "
                                    f"in one of {', '.join(DTYPES)}")  # fmt: skip
                shapes[name] = tuple(tensor.get_shape())
                dtypes.add(DTYPES[dtype])

    def read(name: str, start: int, stop: int) -> Tensor:
        with _opened(files[name]) as tensors:
            return tensors.get_slice(name)[start:stop]

    return Weights(shapes, reduce(torch.promote_types, dtypes or {torch.float32}), read)


def _copy_weights(model: GPT, weights: Weights, vocab_size: int, source: str) -> None:
    """Copy the weights into the model, at most CHUNK_ELEMENTS at a time. vocab_size: rows of their embedding."""
    config = model.config
    by_name = {name.removeprefix("transformer.").removeprefix("model."): name for name in weights.shapes}
    unused = set(by_name)
    for ours, parts in names(config, vocab_size).items():
        parameter = model.get_parameter(ours).detach()
        if config.norm == "layer" and parameter.ndim == 2 and ours.startswith("blocks."):
            parameter = parameter.T
            parts = [(name, len(parameter)) for name, _ in parts]
        if config.tied and ours == "token_embedding.weight" and "lm_head.weight" in by_name:
            parts = [*parts, ("lm_head.weight", vocab_size)]
        start = 0
        for name, rows in parts:
            if name not in by_name:
                raise UserError(f"{source} has no tensor {name}, which its config requires: download it again")
            unused.discard(name)
            shape, expected = weights.shapes[by_name[name]], (rows, *parameter.shape[1:])
            if shape != expected:
                raise UserError(f"{source} has {name} of shape {list(shape)}, and its config requires "
                                f"{list(expected)}: download it again")  # fmt: skip
            must_equal = None  # error message if the tensor differs from the rows that it shares with an earlier one
            if config.mlp == "relu2" and name.endswith("up_proj.weight"):
                must_equal = "hidden_act='relu' and a gate_proj that differs from up_proj: only ReLU² is supported"
            elif config.tied and name == "lm_head.weight":
                must_equal = ("tie_word_embeddings=true and an lm_head that differs from the embedding: set it to "
                              "false in config.json")  # fmt: skip
            start = 0 if must_equal else start
            step = max(1, CHUNK_ELEMENTS // max(1, parameter[0].numel()))
            for i in range(0, rows, step):
                chunk = weights.read(by_name[name], i, min(i + step, rows))
                target = parameter[start + i :][: len(chunk)]
                if not must_equal:
                    target.copy_(chunk)
                elif not torch.equal(target, chunk.to(target)):
                    raise UserError(f"{source} has {must_equal}")
            start += rows
    if unused:
        raise UserError(f"{source} has a tensor {min(unused)}, which its architecture does not have: remove it")


def begin_rows(model: GPT, rows: list[int], n_text: int) -> None:
    """Set rows of embedding and head to the mean of their first n_text rows, those of text ids."""
    with torch.no_grad():
        for table in {model.token_embedding.weight, model.head.weight}:
            total = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
            for chunk in table[:n_text].split(4096):
                total += chunk.double().sum(0)
            table[rows] = (total / n_text).to(table.dtype)


def _download(source: str) -> Path:
    """Download a hub id, except weights in other formats than safetensors, and return the folder."""
    try:
        return Path(needs("huggingface_hub", "hub").snapshot_download(
            source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        ))  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # many types: unknown id, no network, no permission
        raise UserError(f"{source!r} is not a folder and cannot be downloaded from the hub ({first_line(error)}): "
                        f"check the name and the network") from None  # fmt: skip


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[dict, Weights]:
    """The transformers config and the dequantised weights of a GGUF file. transformers loads the whole model."""
    transformers = needs("transformers", "hub")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    needs("gguf", "hub")
    print(f"{path}: transformers reads GGUF slowly, in about a minute; `python -m nanopause.hub --checkpoint={path} "
          f"--folder=FOLDER` converts it once", file=sys.stderr)  # fmt: skip
    try:
        original = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    except Exception as error:  # many types, depending on the file's content
        raise UserError(f"transformers cannot read {path}: {first_line(error)}") from None
    config = original.config.to_dict()
    config.pop("quantization_config", None)  # of the file; the weights are dequantised
    weights = original.state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return config, Weights(shapes, dtype, lambda name, start, stop: weights[name][start:stop])


def _read_config(folder: Path, source: str) -> dict:
    """The transformers config of a folder, with its defaults."""
    transformers = needs("transformers", "hub")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] not in KINDS:  # transformers may not support it either
            config_of(config, source)
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json, so it is not a transformers checkpoint: use another") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/config.json is damaged: download it again") from None
    try:
        return transformers.AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:
        raise UserError(f"transformers cannot read {folder}/config.json: {first_line(error)}") from None


def _empty_model(config: GPTConfig, device: str | torch.device, dtype: torch.dtype) -> GPT:
    """A model in evaluation mode with uninitialised weights."""
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    if config.tied:
        model.head.weight = None  # to_empty would allocate a second table
    model = model.to_empty(device=device).eval()
    if config.tied:
        model.head.weight = model.token_embedding.weight
    if config.position == "rope":
        model.rope_cos, model.rope_sin = (table.to(device) for table in rope_tables(config))
    return model


def load_pretrained(
    name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[GPT, Tokenizer]:
    """A model in evaluation mode and its tokenizer, from a transformers folder, a GGUF file or a hub id.

    Safetensors are read a few rows at a time, so that peak memory is about the size of the model; a GGUF file is loaded
    by transformers first, which takes twice as much. If the embedding has no row for the pause, rows are added. dtype:
    of the weights; None: as in the files.

    Raises UserError for unsupported architectures and settings, and for missing or damaged files.
    """
    return _load_pretrained(name_or_path, device, dtype)[:2]


def _load_pretrained(
    name_or_path: str | Path, device: str | torch.device, dtype: torch.dtype | None
) -> tuple[GPT, Tokenizer, dict]:
    """Model and tokenizer of load_pretrained, and what config.json holds about training with pauses."""
    source, path = str(name_or_path), Path(name_or_path)
    needs("transformers", "hub")
    if path.suffix == ".gguf":
        folder = None
        theirs, weights = _read_gguf(path, dtype or torch.float32)
    else:
        folder = path if path.is_dir() else _download(source)
        theirs = _read_config(folder, source)
        weights = _folder_weights(folder)
    config = config_of(theirs, source)
    vocab_size = config.vocab_size
    tokenizer = pretrained_tokenizer(source, vocab_size, folder)
    config.vocab_size, tokenizer.pad_id = tokenizer.vocab_size, theirs.get("pad_token_id")
    model = _empty_model(config, device, dtype or weights.dtype)
    with torch.no_grad():
        _copy_weights(model, weights, vocab_size, source)
    new = [*range(vocab_size, config.vocab_size), *([tokenizer.pause_id] if tokenizer.pause_is_new else [])]
    begin_rows(model, new, min(tokenizer.pause_id, vocab_size))
    # If `export` did not write knows_pauses, a model that had no row for the pause was not trained with pauses.
    knows_pauses = theirs.get("knows_pauses", tokenizer.pause_id not in new)
    return model, tokenizer, {"knows_pauses": knows_pauses, "pauses": theirs.get("pauses", 0)}


def load(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[GPT, Tokenizer, dict]:
    """Model, tokenizer and training of a run, of one of its checkpoints (`out_dir/best`, `out_dir/step_00000500`), or
    of any source of load_pretrained. A run is loaded in float32.

    The dictionary has knows_pauses, whether the model was trained with pauses, and pauses, the number after every
    prompt in finetuning; for a run, checkpoint.json too. Errors: as load_pretrained."""
    is_hub_id = re.fullmatch(r"(?!out/)[\w-]+/[\w.-]+", str(source))
    if checkpoint.run_of(Path(source)) or not (Path(source).exists() or is_hub_id):
        model, tokenizer, state = checkpoint.load(Path(source), torch.device(device))
        return model, tokenizer, state | {"pauses": Config(**state["config"]).prefix_pauses}
    return _load_pretrained(source, device, dtype)


# Export


def their_tensors(model: GPT) -> dict[str, Tensor]:
    """A model's parameters under their names and in their layout in transformers, copied to the CPU."""
    config, tensors = model.config, {}
    prefix = "transformer." if config.norm == "layer" else "model."
    for ours, parts in names(config).items():
        parameter = model.get_parameter(ours).detach().cpu()
        if config.norm == "layer" and parameter.ndim == 2 and ours.startswith("blocks."):
            parameter = parameter.T
            parts = [(parts[0][0], len(parameter))]
        if config.mlp == "relu2" and len(parts) == 2:
            parameter = torch.cat((parameter, parameter))
        for (name, _), tensor in zip(parts, parameter.split([rows for _, rows in parts])):
            name = name if name.startswith("lm_head.") else prefix + name
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    if config.norm == "layer":
        for i in range(config.n_layer):  # GPT-2 always has biases
            for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
                name = f"transformer.h.{i}.{part}"
                weight = tensors[f"{name}.weight"]
                tensors.setdefault(f"{name}.bias", weight.new_zeros(weight.shape[-1]))
        tensors.setdefault("transformer.ln_f.bias", torch.zeros_like(tensors["transformer.ln_f.weight"]))
    return tensors


def export(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write a run, or any source of load_pretrained, as a transformers checkpoint, and return its folder: config,
    safetensors in the dtype of the source, generation_config.json with the source's settings, the tokenizer with the
    pause as a special token, a model card, and custom_generate/generate.py, which adds pauses to transformers'
    `generate`. The checkpoint does not need nanopause.

    Raises UserError if transformers has no such model, or the folder is not empty."""
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder")
    hub = needs("huggingface_hub", "hub")
    model, tokenizer, state = load(checkpoint, dtype=None)
    if "config" in state and state["config"]["attention"] == "prefix":
        print(f"warning: {checkpoint} was finetuned with attention=prefix, which transformers does not have, so its "
              f"export has causal prompts: finetune with --attention=causal to export", file=sys.stderr)  # fmt: skip
    config, generation = _export_configs(model, tokenizer)
    config |= {key: state[key] for key in ("knows_pauses", "pauses")}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        temporary = Path(parent, folder.name)
        (temporary / "custom_generate").mkdir(parents=True)
        theirs = _export_tokenizer(tokenizer, temporary, checkpoint)
        for name, content in (("config", config), ("generation_config", generation)):
            (temporary / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        restored = needs("transformers", "hub").AutoTokenizer.from_pretrained(temporary)
        if restored.encode(PROBE) != theirs.encode(PROBE):
            raise UserError(f"transformers loads the tokenizer of every {config['model_type']} as Qwen2's, which gives "
                            f"other ids than {tokenizer.name}: train with qk_norm=True or qkv_bias=False")  # fmt: skip
        shutil.copy(Path(__file__).with_name("custom_generate.py"), temporary / "custom_generate" / "generate.py")
        (temporary / "README.md").write_text(card(str(checkpoint), folder, model, tokenizer, state))
        hub.save_torch_state_dict(their_tensors(model), temporary)
        for file in temporary.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes it readable by its owner only
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    return folder


def _export_configs(model: GPT, tokenizer: Tokenizer) -> tuple[dict, dict]:
    """config.json and generation_config.json."""
    ends = tokenizer.end_ids
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    # transformers gives the row of config.json's pad no gradient, so there is none unless the source has one.
    config = transformers_config(model.config) | ids | {"pad_token_id": tokenizer.pad_id}
    config |= {"pause_token_id": tokenizer.pause_id, "dtype": dtype}
    generation = {key: value for key, value in tokenizer.generation.items() if value is not None}
    if not generation and tokenizer.pad_id is not None:  # transformers then takes it from config.json
        generation = {"pad_token_id": tokenizer.pad_id}
    no_text = {*(generation.get("suppress_tokens", [])), *range(tokenizer.pause_id, model.config.vocab_size)}
    generation = ids | generation | {"eos_token_id": ids["eos_token_id"], "suppress_tokens": sorted(no_text)}
    generation.pop("_from_model_config", None)
    return config, generation


def _export_tokenizer(tokenizer: Tokenizer, folder: Path, source: str | Path):
    """Write the tokenizer's files and return it as a transformers tokenizer."""
    theirs = tokenizer.of_transformers()
    pause_id = theirs.convert_tokens_to_ids(PAUSE)
    if pause_id != tokenizer.pause_id:
        raise UserError(f"the tokenizer of {source} has unused ids, so that the pause gets id {pause_id} instead of "
                        f"{tokenizer.pause_id}: number its ids without gaps")  # fmt: skip
    theirs.pad_token = theirs.pad_token or theirs.eos_token  # for prompts of unequal length
    theirs.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    # Names that transformers 4 supports too.
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return theirs


@dataclass
class Settings:
    checkpoint: str
    """Folder of a run, or a transformers folder, GGUF file or hub id."""
    folder: str
    """Output folder, which must not exist or be empty."""


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python -m nanopause.hub", __doc__)
    print(f"written: {export(settings.checkpoint, settings.folder)}")


if __name__ == "__main__":
    errors.run(main)
