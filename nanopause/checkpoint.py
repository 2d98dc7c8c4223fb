"""Crash-safe checkpoints. Damage is detected by sha256.

    out_dir/step_00000500/    model.safetensors, optimizer.pt, checkpoint.json (step, configs, versions, sha256s)
    out_dir/latest            name of the newest checkpoint
    out_dir/best              finetuning: name of the checkpoint with the lowest validation loss
    out_dir/tokenizer/        the tokenizer of a run that started from a transformers checkpoint

A checkpoint is written to a temporary folder, fsynced and renamed; then `latest` is updated; then all checkpoints but
the newest, the one before it and the best are deleted.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.optim import Optimizer

from nanopause.config import Config
from nanopause.errors import UserError, first_line
from nanopause.files import replace_file, sha256, sync
from nanopause.model import GPT, GPTConfig
from nanopause.tokenizer import Tokenizer, load_tokenizer

PARTS = {"config": Config, "model": GPTConfig}  # keys of checkpoint.json that hold dataclasses


def _folders(out_dir: Path) -> list[Path]:
    """Completely written checkpoints, newest first."""
    return sorted(out_dir.glob("step_" + 8 * "[0-9]"), reverse=True)


def save(
    out_dir: Path, step: int, model: nn.Module, optimizers: list[Optimizer], config: Config, *,
    tokens: int = 0, flops: float = 0.0, knows_pauses: bool | None = None, best: bool = False, data_sha256: str = "",
) -> Path:  # fmt: skip
    """Write the state after `step` steps and return its folder. tokens, flops: of training so far. knows_pauses:
    whether the weights were trained with pauses, in this run or before; None: config.pausing. best: `best` names this
    checkpoint from now on. data_sha256: hash of the training data.

    Raises UserError if a weight is not finite, and OSError on a full disk, after removing the incomplete folder; in
    both cases the earlier checkpoints are kept."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"after step {step} there are weights that are not finite, so they are not saved and the "
                        f"checkpoints in {out_dir} are kept: lower --learning_rate")  # fmt: skip
    for leftover in out_dir.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    folder = out_dir / f"step_{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True)
    try:
        safetensors.torch.save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
        torch.save([optimizer.state_dict() for optimizer in optimizers], temporary / "optimizer.pt")
        state = {
            "step": step,
            "tokens": tokens,
            "flops": flops,
            "config": asdict(config),
            "model": asdict(model.config),
            "knows_pauses": config.pausing if knows_pauses is None else knows_pauses,
            "data_sha256": data_sha256,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "sha256": {file.name: sha256(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "checkpoint.json").write_text(json.dumps(state, indent=2))
        for file in [*temporary.iterdir(), temporary]:
            sync(file)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (safetensors.SafetensorError, RuntimeError)):
            raise OSError(f"checkpoint {folder} could not be written: {error}") from error
        raise
    replaced = folder.with_name(folder.name + ".old.tmp")
    if folder.exists():  # it was damaged, and the run resumed from an earlier one
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    sync(out_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    if best:  # before `latest`: a run that resumes from `latest` then has the best up to that step
        replace_file(out_dir / "best", folder.name)
    replace_file(out_dir / "latest", folder.name)
    before = [other for other in _folders(out_dir) if other < folder]
    kept = [out_dir / (out_dir / "best").read_text()] if (out_dir / "best").exists() else []
    for other in set(_folders(out_dir)) - {folder, *before[:1], *kept}:
        shutil.rmtree(other)
    return folder


def _damage(folder: Path) -> str | None:
    """Description of a checkpoint's damage, or None if it is intact."""
    try:
        state = read_state(folder)
        for name in ("model.safetensors", "optimizer.pt"):
            if not (folder / name).exists():
                return f"{name} is missing"
            if sha256(folder / name) != state["sha256"][name]:
                return f"{name} does not have its sha256"
        keys = [set(state[part]) <= {field.name for field in fields(kind)} for part, kind in PARTS.items()]
        if not isinstance(state["step"], int) or not all(keys):
            return "checkpoint.json is of a later version"
    except FileNotFoundError:
        return "checkpoint.json is missing"
    except (ValueError, KeyError, TypeError):
        return "checkpoint.json is cut short"
    return None


def find(out_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint, or None if there are no checkpoints. Damaged ones are skipped and reported through
    `warn`. Raises UserError if all are damaged."""
    folders = _folders(out_dir)
    latest = out_dir / "latest"
    if latest.exists():
        folders.sort(key=lambda folder: folder.name != latest.read_text())
    for folder in folders:
        damage = _damage(folder)
        if damage is None:
            return folder
        warn(f"checkpoint {folder} is damaged ({damage}): using the one before it")
    if folders:
        raise UserError(f"no checkpoint in {out_dir} is intact: start again with another --out_dir")
    return None


def read_state(folder: Path) -> dict:
    """checkpoint.json: step, config, model config, versions. Keys that an earlier version lacks have their defaults."""
    state = json.loads((folder / "checkpoint.json").read_text())
    defaults = {part: asdict(kind()) | state[part] for part, kind in PARTS.items()}
    if not defaults["config"]["task"] and defaults["config"]["placement"] == "appd":
        defaults["config"]["placement"] = "random"  # its earlier name
    earlier = {"tokens": 0, "flops": 0.0, "data_sha256": "", "knows_pauses": state["config"]["pause_rate"] > 0}
    return earlier | state | defaults


def restore(
    folder: Path, model: nn.Module, optimizers: list[Optimizer], config: Config, warn: Callable[[str], None],
    data_sha256: str = "",
) -> dict:  # fmt: skip
    """Load weights and optimizer states in place and return checkpoint.json. Learning rates and other optimizer
    settings come from config; differences are reported through `warn`. data_sha256: hash of the training data; "": not
    compared. Raises UserError if config has another model, corpus or data order than the checkpoint, or fewer steps, or
    if the data has changed."""
    state = read_state(folder)
    if state["step"] > config.max_steps:
        raise UserError(f"{folder} is beyond max_steps={config.max_steps}: raise --max_steps")
    fixed = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
    data = {"init_from", "dataset", "tokenizer", "batch_size", "optimizer", "seed"}
    finetuning = {"task", "limit", "pauses", "placement", "hints", "consecutive", "pause_loss", "focal",
                  "pause_position", "attention", "cut", "trainable"}  # fmt: skip
    for key in sorted(fixed | data | finetuning):
        then, now = state["config"][key], getattr(config, key)
        if then != now:
            raise UserError(f"{folder} was made with {key}={then}, not {now}: resume with --{key}={then}, "
                            f"or start again with another --out_dir")  # fmt: skip
    if data_sha256 and state["data_sha256"] not in ("", data_sha256):
        raise UserError(f"{folder} was trained on another version of the data of {config.task or config.dataset}: put "
                        f"that back to resume, or start again with another --out_dir")  # fmt: skip
    changed = [key for key, value in asdict(config).items() if value != state["config"][key]]
    for key in set(changed) - {"resume", "out_dir", "device", "vocab_size"}:
        warn(f"resume: {key} was {state['config'][key]} and is {getattr(config, key)} from here on")
    safetensors.torch.load_model(model, str(folder / "model.safetensors"))
    for optimizer, saved in zip(optimizers, torch.load(folder / "optimizer.pt", weights_only=True)):
        groups = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, settings in zip(optimizer.param_groups, groups):
            group.update(settings)
    return state


def run_of(path: Path) -> tuple[Path, Path | None] | None:
    """The run that a path belongs to, and the checkpoint that it names or None. A run's folder names no checkpoint;
    its files `best` and `latest` and its checkpoint folders do. Returns None if the path belongs to no run."""
    if path.name in ("best", "latest") and path.is_file():
        return path.parent, path.parent / path.read_text()
    if (path / "checkpoint.json").exists():
        return path.parent, path
    if path.name == "best" and _folders(path.parent):
        raise UserError(f"{path.parent} has no best checkpoint, as only finetuning marks one: use {path.parent}")
    return (path, None) if path.is_dir() and not (path / "config.json").exists() else None


def load(path: Path, device: torch.device) -> tuple[GPT, Tokenizer, dict]:
    """Model, tokenizer and checkpoint.json of a run's newest intact checkpoint, or of the one that the path names:
    `out_dir/best`, `out_dir/step_00000500`. Raises UserError if there is none or it is damaged."""
    out_dir, folder = run_of(path) or (path, None)
    if folder is None:
        folder = find(out_dir, warn=lambda text: print(text, file=sys.stderr))
    elif damage := _damage(folder):
        raise UserError(f"checkpoint {folder} is damaged ({damage}): use another of {out_dir}")
    if folder is None:
        raise UserError(f"{out_dir} holds no checkpoint: train one with `python train.py config/pause.py`, "
                        f"or name another --out_dir")  # fmt: skip
    return read_model(folder, device)


def read_model(folder: Path, device: torch.device) -> tuple[GPT, Tokenizer, dict]:
    """Model, tokenizer and checkpoint.json of one intact checkpoint. Raises UserError if its settings are damaged."""
    state = read_state(folder)
    saved_tokenizer = folder.parent / "tokenizer"
    try:
        tokenizer = load_tokenizer(str(saved_tokenizer if saved_tokenizer.is_dir() else state["config"]["tokenizer"]))
        model = GPT(GPTConfig(**state["model"]))
        safetensors.torch.load_model(model, str(folder / "model.safetensors"), device=str(device))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/checkpoint.json is damaged ({first_line(error)}): use another checkpoint of "
                        f"{folder.parent}") from None  # fmt: skip
    return model.to(device).eval(), tokenizer, state
