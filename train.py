"""Pretrain a GPT, or finetune it on a task, with pauses or without.

A small model with pauses, in minutes on a laptop and in seconds on a GPU:
    python train.py config/pause.py
GPT-2 124M with pauses on OpenWebText, on one GPU, then on eight:
    python train.py config/pause.py config/openwebtext.py
    torchrun --standalone --nproc_per_node=8 train.py config/pause.py config/openwebtext.py
Start from the weights of another run, or of a transformers checkpoint:
    python train.py config/pause.py --init_from=HuggingFaceTB/SmolLM2-135M --optimizer=adamw --learning_rate=1e-4
Finetune on a task, with pauses between prefix and target:
    python train.py config/finetune.py --task=gsm8k --init_from=out/pause --pauses=10
Continue a run that was stopped or killed:
    python train.py config/pause.py --resume

Ctrl-C and SIGTERM save a checkpoint after the running step; a second Ctrl-C stops at once.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nanopause import checkpoint, errors, flops, hub, kernels, metrics
from nanopause.config import Config, load_config
from nanopause.data import Batch, Corpus, Insertion, TrainingBatches, prefetch, validation_batches
from nanopause.distributed import Processes, stop_signals
from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.finetune import (
    TargetPauses,
    TaskBatches,
    described,
    load_pairs,
    n_generated,
    sha256_of,
    task_validation_batches,
)
from nanopause.model import GPT
from nanopause.optimizer import make_optimizers, set_learning_rates, set_trainable
from nanopause.pauses import IGNORE
from nanopause.progress import Ticker
from nanopause.scripts.data import DATA
from nanopause.scripts.data.pydocs import prepare_pydocs
from nanopause.tokenizer import PretrainedTokenizer, Tokenizer, load_tokenizer

BAD_STEPS = 5  # non-finite steps in a row that end the run
SAMPLE_TOKENS = 512  # most tokens of the sample at the end of a run


# ---------------------------------------------------------------------------------------------------------------------
# A step


def summed_loss(forward: nn.Module, batch: Batch, focal: float) -> torch.Tensor:
    """The sum of a batch's losses in nats; focal: γ of the focal loss, 0 for cross-entropy."""
    if not focal:
        return forward(batch.inputs, batch.targets, reduction="sum", **batch.layout)
    losses = forward(batch.inputs, batch.targets, reduction="none", **batch.layout)
    # (1 − p)^γ · −log p [Lin et al. 2017, equation 4]; a power below 1 has no gradient at 0.
    return ((-torch.expm1(-losses)).clamp(min=1e-12) ** focal * losses).sum()


def train_step(
    forward: nn.Module,
    optimizers: list[Optimizer],
    micro_batches: list[Batch],
    n_live: float,
    grad_clip: float,
    autocast: torch.autocast,
    processes: Processes,
    focal: float = 0.0,
) -> tuple[float, float, bool]:
    """One optimizer step on this process's share of a batch with n_live unmasked targets in all processes.

    Returns the mean loss over those targets in nats, the norm of its gradient, and whether both are finite. If they are
    not, the weights stay as they were."""
    loss = torch.zeros((), device=processes.device)
    for micro_batch in micro_batches:
        # DDP reduces gradients once per step, with the last micro-batch.
        is_local = processes.count > 1 and micro_batch is not micro_batches[-1]
        with forward.no_sync() if is_local else contextlib.nullcontext():
            with autocast:
                part = summed_loss(forward, micro_batch, focal) / n_live
            (part * processes.count).backward()  # DDP takes the mean where a sum is due
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(forward.parameters(), grad_clip or math.inf)
    loss, norm = torch.stack((loss, norm)).tolist()
    (loss,) = processes.sum(loss)
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    for optimizer in optimizers:
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
    return loss, norm, is_finite


@dataclass
class Counts:
    """Numbers of one step, or of several: of this process, and after `summed` of all of them."""

    live: float = 0  # unmasked targets
    pauses: float = 0
    tokens: float = 0
    flops: float = 0
    stopped: float = 0  # stop signals received

    def summed(self, processes: Processes) -> "Counts":
        return Counts(*processes.sum(*astuple(self)))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other))))


# ---------------------------------------------------------------------------------------------------------------------
# Validation


class Scores(NamedTuple):
    """loss: nats per target. bpb: bits per byte of the targets' text. exact_match: share of a task's examples whose
    whole target greedy decoding generates; None for a corpus."""

    loss: float
    bpb: float
    exact_match: float | None


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[Batch], n: int, tokenizer: Tokenizer, autocast: torch.autocast, processes: Processes,
    ticker: Ticker,
) -> Scores:  # fmt: skip
    """The scores over the batches of all processes; n: blocks or examples in those of this process."""
    n_done = 0
    nats = n_live = n_bytes = n_examples = n_right = 0
    for batch in batches:
        n_done += len(batch.lengths)
        ticker.update(f"validation: {n_done / n:.0%}")
        n_live += batch.n_live
        n_bytes += int(tokenizer.token_bytes[batch.targets[batch.targets != IGNORE]].sum())
        batch = batch.to(processes.device)
        targets = batch.targets.flatten()
        with autocast:
            x = model.hidden(batch.inputs, **batch.layout).flatten(0, 1)
            nats += kernels.linear_cross_entropy(x, model.head.weight, targets, reduction="sum").item()
            if batch.ends:
                n_examples += len(batch.ends)
                n_right += n_generated(model.head, x, targets, batch.ends)
    nats, n_live, n_bytes, n_examples, n_right = processes.sum(nats, n_live, n_bytes, n_examples, n_right)
    return Scores(nats / n_live, nats / math.log(2) / n_bytes, n_right / n_examples if n_examples else None)


# ---------------------------------------------------------------------------------------------------------------------
# What a run begins with


class Start(NamedTuple):
    """model: loaded, or None for a new one. state: checkpoint.json of what it was loaded from. found: the checkpoint
    of this run that training continues from."""

    config: Config
    model: GPT | None
    tokenizer: Tokenizer
    state: dict
    found: Path | None


def load_start(config: Config, device: torch.device, ticker: Ticker) -> Start:
    """The run's newest intact checkpoint with --resume, or the model of --init_from, or none."""
    found = checkpoint.find(Path(config.out_dir), warn=ticker.say) if config.resume else None
    if found and (init_from := checkpoint.read_state(found)["config"]["init_from"]):
        model, tokenizer, state = checkpoint.read_model(found, device)
        config.init_from = config.init_from or init_from
    elif config.init_from:
        model, tokenizer, state = hub.load(config.init_from, device)
    elif config.block_size == 0:
        raise UserError(f"block_size=0 is the whole context of a model, and {config.out_dir} has none yet: "
                        f"add --init_from")  # fmt: skip
    else:
        return Start(config, None, load_tokenizer(config.tokenizer), {}, found)
    config = config.shaped(model.config, tokenizer)
    if config.block_size > model.config.block_size:
        ticker.say(f"block_size={config.block_size} is longer than the {model.config.block_size} tokens that "
                   f"{config.init_from} was trained with: RoPE is extended, so it needs training")  # fmt: skip
        model.extend(config.block_size)
    return Start(config, model, tokenizer, state, found)


class Data(NamedTuple):
    """batches[step]: this process's share. validation(n, insertion): batches of n blocks or examples. validation_set:
    all of them. about: for the log. sha256: of training and validation data. target_pauses: pauses that are placed
    among the tokens of targets."""

    batches: TrainingBatches | TaskBatches
    validation: Callable[[int, Insertion], Iterable[Batch]]
    validation_set: Corpus | list
    about: str
    sha256: str
    target_pauses: TargetPauses | None = None


def open_data(config: Config, tokenizer: Tokenizer, processes: Processes) -> Data:
    """A task's examples, or a corpus; the default one is prepared at first use."""
    share = processes.rank, processes.count
    if config.task:
        target_pauses = TargetPauses(config, tokenizer) if config.placement in ("ran", "aaw", "dit") else None
        training, about = load_pairs(config, "train", tokenizer, target_pauses)
        held_out, about_validation = load_pairs(config, "validation", tokenizer, target_pauses)
        layout = tokenizer.pause_id, config.attention

        def validation(n: int, insertion: Insertion) -> Iterable[Batch]:
            return task_validation_batches(held_out, n, config.micro_batch_size, *layout, *share)

        batches = TaskBatches(training, config.batch_size, *layout, config.seed, *share, target_pauses)
        about += f"\ndata: {about_validation}\nan example: {described(config)}"
        return Data(batches, validation, held_out, about, sha256_of(training + held_out), target_pauses)

    folder = DATA / config.dataset / tokenizer.name
    if config.dataset == "pydocs" and not folder.exists() and processes.is_main:
        prepare_pydocs(tokenizer.source)
    processes.wait()
    training, held_out = (Corpus(folder, split, tokenizer, config.text_length) for split in ("train", "val"))

    def validation(n: int, insertion: Insertion) -> Iterable[Batch]:
        return validation_batches(held_out, n, config.micro_batch_size, insertion, config.seed, *share)

    batches = TrainingBatches(training, config.batch_size, config.insertion, config.seed, *share)
    shown = folder.relative_to(DATA.parent) if folder.is_relative_to(DATA) else folder
    about = f"{shown}, {len(training):,} training blocks, {len(held_out):,} validation blocks; {config.insertion}"
    return Data(batches, validation, held_out, about, training.sha256)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(config: Config) -> None:
    """Train as the config says, in this process or in those that torchrun started.

    SIGTERM ends it after the running step, with a checkpoint; so does SIGINT (Ctrl-C), which then raises
    KeyboardInterrupt. Raises UserError if the config does not fit the model, the data or the folder."""
    processes, out_dir = Processes(config.device), Path(config.out_dir)
    if config.batch_size % processes.count:
        raise UserError(f"batch_size={config.batch_size} must be a multiple of the {processes.count} processes")
    if not config.resume and has_files(out_dir):
        raise UserError(f"{out_dir} already holds a run: add --resume to continue it, or choose another --out_dir")
    with stop_signals() as signals, Ticker(config.max_steps, enabled=processes.is_main) as ticker:
        _train(config, processes, out_dir, signals, ticker)
    processes.close()


def _train(config: Config, processes: Processes, out_dir: Path, signals: list[int], ticker: Ticker) -> None:
    device = processes.device
    ticker.begin("loading the model")
    config, model, tokenizer, state, found = load_start(config, device, ticker)
    ticker.begin("loading the data")
    data = open_data(config, tokenizer, processes)

    # ---- model and optimizers, new or from the checkpoint
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    model = model.train() if model else GPT(config.gpt(tokenizer.vocab_size)).to(device)
    knew_pauses = state.get("knows_pauses", False)
    if state and config.pausing and not knew_pauses:
        hub.begin_rows(model, [tokenizer.pause_id], tokenizer.pause_id)
        ticker.say(f"{config.init_from} was trained without pauses: the pause's embedding starts as the mean embedding")
    set_trainable(model, config.trainable, tokenizer.pause_id)
    optimizers = make_optimizers(model, config)
    start, total = 0, Counts()
    if found:
        state = checkpoint.restore(found, model, optimizers, config, ticker.say, data.sha256)
        start, total = state["step"], Counts(tokens=state["tokens"], flops=state["flops"])
        ticker.say(f"resume: {found}, from step {start}")
    elif config.resume:
        ticker.say(f"resume: there is no checkpoint in {out_dir}, so this run starts at step 0")

    # ---- device, precision, compilation, processes
    kernels.choose(None, device)  # reports which
    forward = model
    if is_compiled := config.compile or (config.compile is None and device.type == "cuda"):
        forward = torch.compile(forward)
    if processes.count > 1:
        forward = DistributedDataParallel(forward, [device] if device.type == "cuda" else None)
    is_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16)
    ticker.begin("measuring the peak FLOP/s of this device")
    peak, peak_source = flops.peak_flops(device, dtype)
    processes.wait()
    log = metrics.Metrics(config, start, warn=ticker.say) if processes.is_main else None
    if isinstance(tokenizer, PretrainedTokenizer) and processes.is_main and not found:
        tokenizer.save(out_dir / "tokenizer")
    ticker.say(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config.n_layer} layers, "
        f"width {config.n_embd}, context {config.block_size} tokens\n"
        f"data: {data.about}\n"
        f"device: {processes.count} × {device.type}, {'bfloat16' if is_bfloat16 else 'float32'}, "
        f"{peak / 1e12:.3g} TFLOP/s each ({peak_source})"
    )

    def save(step: int, is_best: bool = False) -> None:
        with ticker.during("saving a checkpoint"):
            checkpoint.save(
                out_dir, step, model, optimizers, config, tokens=int(total.tokens), flops=total.flops,
                knows_pauses=config.pausing or knew_pauses, best=is_best, data_sha256=data.sha256,
            )  # fmt: skip

    def validate(insertion: Insertion, is_last: bool) -> Scores:
        n = config.final_eval_blocks if is_last and not config.task else config.eval_blocks
        n_own = -(-min(n, len(data.validation_set)) // processes.count)
        with ticker.during("validation"):
            return evaluate(model, data.validation(n, insertion), n_own, tokenizer, autocast, processes, ticker)

    # ---- the loop
    step, n_bad_steps = start, 0
    seconds, recent = 0.0, Counts()  # since the last line of metrics
    ticker.begin("the first step" + ", which compiles the model" * is_compiled)
    for batch in prefetch(data.batches, start, config.max_steps, device):
        begin = time.perf_counter()
        selection_flops = 0
        if data.target_pauses and data.target_pauses.placement == "dit":
            # A forward pass finds the targets that the model finds least likely.
            selection_flops = flops.step_flops(model.config, batch.lengths, batch.n_live) / 3
            with autocast:
                batch = data.target_pauses.chosen_by(forward, batch, config.micro_batch_size)
        counts = Counts(
            batch.n_live, batch.n_pauses, batch.lengths.sum(),
            flops.step_flops(model.config, batch.lengths, batch.n_live) + selection_flops, len(signals),
        ).summed(processes)  # fmt: skip
        if counts.stopped:
            break
        lr_share = set_learning_rates(optimizers, step, config)
        loss, norm, is_finite = train_step(
            forward, optimizers, list(batch.split(config.micro_batch_size)), max(1, counts.live), config.grad_clip,
            autocast, processes, config.focal,
        )  # fmt: skip
        n_bad_steps = 0 if is_finite else n_bad_steps + 1
        if n_bad_steps:
            ticker.say(f"step {step}: loss {loss}, gradient norm {norm}: skipped")
        if n_bad_steps == BAD_STEPS:
            raise UserError(f"loss or gradient was not finite {BAD_STEPS} steps in a row, up to step {step}: "
                            f"the checkpoints in {out_dir} stand; lower --learning_rate")  # fmt: skip
        step += 1
        seconds += time.perf_counter() - begin
        total += counts
        recent += counts

        is_last = step == config.max_steps
        is_logged = step % config.log_interval == 0 or is_last
        is_evaluated = step % config.eval_interval == 0 or is_last
        mfu = recent.flops / seconds / peak / processes.count if peak else None
        if mfu and mfu > 1:  # the peak was measured while other programs used the device: show no MFU
            flops.forget_peak(device, dtype)
            peak = mfu = None
        row = {
            "step": step,
            "loss": loss,
            "tokens": int(total.tokens),
            "flops": total.flops,
            "tokens_per_second": recent.tokens / seconds,
            "mfu": mfu,
            "learning_rate": config.learning_rate * lr_share,
            "grad_norm": norm,
            "pause_share": counts.pauses / counts.tokens,
        }
        text = f"step {step}: loss {loss:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
        ticker.step(step, text + (f", MFU {mfu:.0%}" if mfu else ""), is_logged and not is_evaluated)
        is_best = False
        if is_evaluated:
            scores = validate(Insertion(), is_last)
            row |= {"val_loss": scores.loss, "val_bpb": scores.bpb}
            text = f"loss {scores.loss:.3f}, {scores.bpb:.3f} bits per byte"
            if scores.exact_match is not None:
                row["val_exact_match"] = scores.exact_match
                text += f", exact match {scores.exact_match:.3f}"
            if config.pausing and not config.task:
                scores = validate(replace(config.insertion, all_slots=False), is_last)
                row |= {"val_loss_pauses": scores.loss, "val_bpb_pauses": scores.bpb}
                text += f"; with pauses {scores.loss:.3f}, {scores.bpb:.3f} ({about_pauses(config)})"
            if config.task and processes.is_main:
                is_best = all(scores.loss < before.get("val_loss", math.inf) for before in log.rows)
                text += ", the lowest so far" if is_best else ""
            ticker.say(f"step {step}: training loss {loss:.3f}; validation {text}")
        if processes.is_main and (is_logged or is_evaluated):
            log.log(row)
        if is_logged:
            seconds, recent = 0.0, Counts()
        is_due = n_bad_steps == 0 and (step % config.checkpoint_interval == 0 or is_last)
        if processes.is_main and (is_best or is_due):
            save(step, is_best)

    # ---- the end
    is_stopped = step < config.max_steps
    if processes.is_main:
        if is_stopped and step > start:
            save(step)
        elif not is_stopped:
            with ticker.during("drawing loss.png"):
                metrics.plot(log.rows, out_dir / "loss.png", out_dir.name, about_pauses(config))
            with ticker.during("generating a sample"):
                show_end(config, model, tokenizer, data, ticker)
        log.finish()
    if is_stopped:
        name = signal.Signals(signals[0]).name if signals else "a signal to another process"
        message = f"stopped by {name} after step {step}: the same command with --resume continues"
        if signal.SIGINT in signals:
            raise KeyboardInterrupt(message)
        ticker.say(message)


def about_pauses(config: Config) -> str:
    """How a validation with pauses differs from the one without."""
    if config.placement == "between":
        return "the same text, with pauses between its tokens"
    return "they replace text in a block: less context per token"


def show_end(config: Config, model: GPT, tokenizer: Tokenizer, data: Data, ticker: Ticker) -> None:
    """A sample of the trained model, and what to do next."""
    prompt = data.validation_set[0].prompt if config.task else ""
    (sample,) = Engine(model.eval(), tokenizer, max_batch=1, max_length=config.block_size).generate(
        [prompt], max_new_tokens=min(SAMPLE_TOKENS, config.block_size), temperature=0.0 if config.task else 0.7,
        seed=config.seed, attention=config.attention,
    )  # fmt: skip
    shown = [id for id in prompt if id not in (tokenizer.pause_id, tokenizer.bos_id)] if config.task else []
    ticker.say(f"\na sample:\n{tokenizer.decode(shown)}{sample.text}\n\nwritten: {config.out_dir} (checkpoints, "
               f"metrics.jsonl, loss.png)\ntry: python sample.py --out_dir={config.out_dir}\n"
               f"     python -m nanopause.compare {config.out_dir} OTHER_RUN")  # fmt: skip


def has_files(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def main() -> None:
    config = load_config(sys.argv[1:], __doc__)
    # A job's command may always contain --resume; a person who types it continues a run that exists.
    if config.resume and not has_files(Path(config.out_dir)) and sys.stdin and sys.stdin.isatty():
        raise UserError(f"{config.out_dir} holds no run: check --out_dir, or start one without --resume")
    train(config)


if __name__ == "__main__":
    errors.run(main)
