"""Pretrain a GPT, or finetune it on a task, with pauses or without.

On a laptop, minutes; on a GPU, seconds:
    python train.py config/pause.py
GPT-2 124M with pauses on OpenWebText, on one GPU, then on eight:
    python train.py config/pause.py config/openwebtext.py
    torchrun --standalone --nproc_per_node=8 train.py config/pause.py config/openwebtext.py
Go on from the weights of another run, or of a transformers checkpoint:
    python train.py config/pause.py --init_from=HuggingFaceTB/SmolLM2-135M --optimizer=adamw --learning_rate=1e-4
Finetune on a task, with pauses between prefix and target:
    python train.py config/finetune.py --task=gsm8k --init_from=out/pause --pauses=10
Continue a run that was stopped or killed:
    python train.py config/pause.py --resume
Every setting:
    python train.py --help
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import kernels
from data.pydocs import prepare_pydocs
from nanopause import checkpoint, errors, flops, hub, metrics
from nanopause.config import Config, load_config
from nanopause.data import Batch, Corpus, Insertion, TrainingBatches, prefetch, validation_batches
from nanopause.distributed import Processes
from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.finetune import TargetPauses, TaskBatches, described, load_pairs, n_generated, task_validation_batches
from nanopause.model import GPT
from nanopause.optimizer import make_optimizers, set_learning_rates, set_trainable
from nanopause.pauses import IGNORE
from nanopause.progress import Ticker
from nanopause.tokenizer import PretrainedTokenizer, Tokenizer, load_tokenizer

DATA = Path(__file__).resolve().parent / "data"
BAD_STEPS = 5  # non-finite steps in a row that end the run
SAMPLE_TOKENS = 512  # of the text at the end of a run, at most


def summed_loss(forward: nn.Module, batch: Batch, focal: float) -> torch.Tensor:
    """The sum of a batch's losses in nats."""
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
    """One step of the optimizers on this process's share of a batch with n_live targets in all processes.

    Returns the mean loss over those targets in nats, the norm of its gradient, and whether both are finite; where they
    are not, the weights stay as they were.
    """
    loss = torch.zeros((), device=processes.device)
    for micro_batch in micro_batches:
        # The processes' gradients meet once a step, with the last micro-batch.
        alone = processes.count > 1 and micro_batch is not micro_batches[-1]
        with forward.no_sync() if alone else contextlib.nullcontext():
            with autocast:
                part = summed_loss(forward, micro_batch, focal) / n_live
            (part * processes.count).backward()  # DDP averages where a sum is due
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(forward.parameters(), grad_clip or math.inf)
    loss, norm = torch.stack((loss, norm)).tolist()
    (loss,) = processes.sum(loss)
    finite = math.isfinite(loss) and math.isfinite(norm)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return loss, norm, finite


class Scores(NamedTuple):
    """loss: nats per target. bpb: bits per byte of the targets' text. exact_match: share of a task's examples whose
    whole target greedy decoding generates; None for a corpus."""

    loss: float
    bpb: float
    exact_match: float | None


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[Batch], tokenizer: Tokenizer, autocast: torch.autocast, processes: Processes
) -> Scores:
    """The scores of the batches of all processes."""
    nats = n_live = n_bytes = n_examples = n_right = 0
    for batch in batches:
        live = batch.targets[batch.targets != IGNORE]
        n_live, n_bytes = n_live + batch.n_live, n_bytes + int(tokenizer.token_bytes[live].sum())
        batch = batch.to(processes.device)
        with autocast:
            x, targets = model.hidden(batch.inputs, **batch.layout).flatten(0, 1), batch.targets.flatten()
            nats += kernels.linear_cross_entropy(x, model.head.weight, targets, reduction="sum").item()
            if batch.ends:
                n_examples += len(batch.ends)
                n_right += n_generated(model.head, x, targets, batch.ends)
    nats, n_live, n_bytes, n_examples, n_right = processes.sum(nats, n_live, n_bytes, n_examples, n_right)
    return Scores(nats / n_live, nats / math.log(2) / n_bytes, n_right / n_examples if n_examples else None)


def train(config: Config) -> None:
    """Train as the config says, in this process or in those that torchrun started."""
    stop = []  # SIGTERM ends the run after the step it arrives in
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    processes = Processes(config.device)
    device, out_dir = processes.device, Path(config.out_dir)
    if config.batch_size % processes.count:
        raise UserError(f"batch_size={config.batch_size} must be a multiple of the {processes.count} processes")
    if not config.resume and out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} already holds a run: add --resume to continue it, or choose another --out_dir")

    with Ticker(config.max_steps, enabled=processes.is_main) as ticker:
        # A model that is there: the run's own, or one to start from.
        state, inside, share_of = {}, None, (processes.rank, processes.count)
        found = checkpoint.find(out_dir, warn=ticker.say) if config.resume else None
        if found and (init_from := checkpoint.read_state(found)["config"]["init_from"]):
            model, tokenizer, state = checkpoint.read_model(found, device)
            config.init_from = config.init_from or init_from
        elif config.init_from:
            model, tokenizer, state = hub.load(config.init_from, device)
        else:
            model, tokenizer = None, load_tokenizer(config.tokenizer)
            if config.block_size == 0:
                raise UserError(f"block_size=0 is all that a model reads, and {out_dir} has none yet: add --init_from")
        if model:
            config = config.shaped(model.config, tokenizer)

        # Data: a task's pairs, or a corpus, of which the default prepares itself.
        if config.task:
            inside = TargetPauses(config, tokenizer) if config.placement in ("ran", "aaw", "dit") else None
            (training, about), (held_out, about_held_out) = (
                load_pairs(config, split, tokenizer, inside) for split in ("train", "validation")
            )
            of_task = tokenizer.pause_id, config.attention
            batches = TaskBatches(training, config.batch_size, *of_task, config.seed, *share_of, inside)
            about += f"\nheld out: {about_held_out}\nan example: {described(config)}"
        else:
            folder = DATA / config.dataset / tokenizer.name
            if config.dataset == "pydocs" and not folder.exists() and processes.is_main:
                prepare_pydocs(tokenizer.source)
            processes.wait()
            training, held_out = (Corpus(folder, split, tokenizer, config.text_length) for split in ("train", "val"))
            batches = TrainingBatches(training, config.batch_size, config.insertion, config.seed, *share_of)
            about = (
                f"{folder.relative_to(DATA.parent) if folder.is_relative_to(DATA) else folder}, "
                f"{len(training):,} blocks to train on, {len(held_out):,} held out; {config.insertion}"
            )

        # A new model where there is none, and optimizers, as new or from the newest intact checkpoint.
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        pausing, knew_pauses = config.pausing, state.get("knows_pauses", False)
        model = model.train() if model else GPT(config.gpt(tokenizer.vocab_size)).to(device)
        if state and pausing and not knew_pauses:
            hub.begin_rows(model, [tokenizer.pause_id], tokenizer.pause_id)
            ticker.say(f"{config.init_from} has not seen a pause: the pause's row begins as the mean embedding")
        set_trainable(model, config.trainable, tokenizer.pause_id)
        optimizers = make_optimizers(model, config)
        start = n_tokens = n_flops = 0
        if config.resume:
            if found:
                state = checkpoint.restore(found, model, optimizers, config, warn=ticker.say)
                start, n_tokens, n_flops = state["step"], state["tokens"], state["flops"]
            ticker.say(f"resume: {found or f'no checkpoint in {out_dir} yet'}, from step {start}")
        kernels.choose(None, device)  # says which
        forward = model
        if config.compile or (config.compile is None and device.type == "cuda"):
            forward = torch.compile(forward)
        if processes.count > 1:
            forward = DistributedDataParallel(forward, [device] if device.type == "cuda" else None)
        bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
        peak, peak_source = flops.peak_flops(device, torch.bfloat16 if bfloat16 else torch.float32)
        processes.wait()
        log = metrics.Metrics(config, start) if processes.is_main else None
        if isinstance(tokenizer, PretrainedTokenizer) and processes.is_main and not found:
            tokenizer.save(out_dir / "tokenizer")
        ticker.say(
            f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config.n_layer} layers, "
            f"{config.n_embd} wide, {config.block_size} tokens long\n"
            f"data: {about}\n"
            f"device: {processes.count} × {device.type}, {'bfloat16' if bfloat16 else 'float32'}, "
            f"{peak / 1e12:.3g} TFLOP/s each ({peak_source})"
        )

        def validation(n_blocks: int, insertion: Insertion) -> Iterable[Batch]:
            if config.task:
                return task_validation_batches(held_out, n_blocks, config.micro_batch_size, *of_task, *share_of)
            return validation_batches(held_out, n_blocks, config.micro_batch_size, insertion, config.seed, *share_of)

        def save(best: bool = False) -> None:
            knows_pauses = pausing or knew_pauses
            checkpoint.save(out_dir, done, model, optimizers, config, tokens=n_tokens, flops=n_flops,
                            knows_pauses=knows_pauses, best=best)  # fmt: skip

        evaluation = tokenizer, autocast, processes
        n_bad, done = 0, start
        seconds = tokens_since = flops_since = 0.0  # since the last line of metrics
        for batch in prefetch(batches, start, config.max_steps, device):
            begin, scored, n_scored_live = time.perf_counter(), 0 * batch.lengths, batch.n_live
            if inside and inside.placement == "dit":
                scored = batch.lengths
                with autocast:
                    batch = inside.chosen_by(forward, batch, config.micro_batch_size)
            lengths = batch.lengths
            n_live, n_pauses, n_new, n_pairs, n_scored, n_scored_pairs, n_scored_live, stopping = processes.sum(
                batch.n_live, batch.n_pauses, lengths.sum(), (lengths**2).sum(), scored.sum(), (scored**2).sum(),
                n_scored_live, len(stop),
            )  # fmt: skip
            if stopping:
                break
            share = set_learning_rates(optimizers, done, config)
            micro_batches = list(batch.split(config.micro_batch_size))
            loss, norm, finite = train_step(
                forward, optimizers, micro_batches, max(1, n_live), config.grad_clip, autocast, processes, config.focal
            )
            n_bad = 0 if finite else n_bad + 1
            if n_bad:
                ticker.say(f"step {done}: loss {loss}, gradient norm {norm}: skipped")
            if n_bad == BAD_STEPS:
                raise UserError(
                    f"loss or gradient was not finite {BAD_STEPS} steps in a row, up to step {done}: "
                    f"the checkpoints in {out_dir} stand; lower --learning_rate"
                )
            seconds += time.perf_counter() - begin
            done += 1

            n_tokens, tokens_since = n_tokens + int(n_new), tokens_since + n_new
            length = n_pairs / n_new  # sequences of this length, as many tokens of them, have as many pairs to attend
            n_step_flops = flops.training_flops(model.config, length, batch_size=n_new / length, n_live=int(n_live))
            if n_scored:  # the pass that finds the least likely targets
                length = n_scored_pairs / n_scored
                n_step_flops += flops.forward_flops(model.config, length, batch_size=n_scored / length,
                                                    n_live=int(n_scored_live))  # fmt: skip
            n_flops, flops_since = n_flops + n_step_flops, flops_since + n_step_flops
            rate, mfu = tokens_since / seconds, flops_since / seconds / peak / processes.count
            last = done == config.max_steps
            logged, evaluated = done % config.log_interval == 0 or last, done % config.eval_interval == 0 or last
            ticker.step(
                done, f"step {done}: loss {loss:.3f}, {rate:,.0f} tokens/s, MFU {mfu:.0%}", logged and not evaluated
            )
            row = {
                "step": done,
                "loss": loss,
                "tokens": n_tokens,
                "flops": n_flops,
                "tokens_per_second": rate,
                "mfu": mfu,
                "learning_rate": config.learning_rate * share,
                "grad_norm": norm,
                "pause_share": n_pauses / n_new,
            }
            best = False
            if evaluated:
                n_blocks = len(held_out) if last and not config.task else config.eval_blocks
                scores = evaluate(model, validation(n_blocks, Insertion()), *evaluation)
                row["val_loss"], row["val_bpb"] = scores.loss, scores.bpb
                text = f"loss {scores.loss:.3f}, {scores.bpb:.3f} bits per byte"
                if scores.exact_match is not None:
                    row["val_exact_match"] = scores.exact_match
                    text += f", exact match {scores.exact_match:.3f}"
                if config.pausing and not config.task:
                    pauses = validation(n_blocks, replace(config.insertion, all_slots=False))
                    scores = evaluate(model, pauses, *evaluation)
                    row["val_loss_pauses"], row["val_bpb_pauses"] = scores.loss, scores.bpb
                    text += f"; with pauses {scores.loss:.3f}, {scores.bpb:.3f}"
                if config.task and processes.is_main:
                    best = all(row["val_loss"] < before.get("val_loss", math.inf) for before in log.rows)
                    text += ", the lowest so far" if best else ""
                ticker.say(f"step {done}: training loss {loss:.3f}; held out {text}")
            if processes.is_main and (logged or evaluated):
                log.log(row)
            if logged:
                seconds = tokens_since = flops_since = 0.0
            if processes.is_main and (best or (n_bad == 0 and (done % config.checkpoint_interval == 0 or last))):
                save(best)

        if done < config.max_steps:
            if processes.is_main and done > start:
                save()
            ticker.say(f"stopped by SIGTERM after step {done} of {out_dir}: continue with --resume")
        elif processes.is_main:
            metrics.plot(log.rows, out_dir / "loss.png", out_dir.name)
            prompt, temperature = (held_out[0].prompt, 0.0) if config.task else ("", 0.7)
            (sample,) = Engine(model.eval(), tokenizer, max_batch=1, max_length=config.block_size).generate(
                [prompt], max_new_tokens=min(SAMPLE_TOKENS, config.block_size), temperature=temperature,
                seed=config.seed, attention=config.attention,
            )  # fmt: skip
            hidden = tokenizer.pause_id, tokenizer.bos_id
            shown = [id for id in prompt if id not in hidden] if config.task else []
            if config.pausing and not config.task:
                ticker.say("validation with pauses: they take the place of text in a block, so its tokens have less "
                           "context than without; docs/evidence.md has what this means")  # fmt: skip
            ticker.say(f"\na sample:\n{tokenizer.decode(shown)}{sample.text}\n\nwritten: {out_dir} (checkpoints, "
                       f"metrics.jsonl, loss.png)\ntry: python sample.py --out_dir={out_dir}\n"
                       f"     python -m nanopause.compare {out_dir} OTHER_RUN")  # fmt: skip
        if processes.is_main:
            log.finish()
        processes.close()


def main() -> None:
    train(load_config(sys.argv[1:]))


if __name__ == "__main__":
    errors.run(main)
