"""What a step of DIT costs: train.py's step over the same pairs of GSM8K, by where the pauses go.

DIT's has two forward passes and one backward, over M_DIT more tokens a pair [Kim et al. 2025]; the first pass keeps
nothing for gradients. Times and FLOPs are over those of plain finetuning (sft). GPT-2 with random weights, AdamW.
"""

from copy import deepcopy

import torch

from bench.harness import GPT2, OURS, ROOT, Bench, Shape, number, race, wall_clock
from nanopause import flops
from nanopause.config import load_config
from nanopause.distributed import Processes
from nanopause.finetune import TargetPauses, TaskBatches, load_pairs
from nanopause.model import GPT, GPTConfig
from nanopause.optimizer import make_optimizers
from nanopause.tokenizer import load_tokenizer
from train import train_step

PLACEMENTS = ("sft", "appd", "ran", "aaw", "dit")
MODELS = {"124M": dict(n_layer=12, n_head=12, n_embd=768), "small": dict(n_layer=3, n_head=4, n_embd=128)}
BLOCK_SIZE = 512


def shapes(device: str, quick: bool) -> list[Shape]:
    if quick:
        return [{"model": "small", "batch": 2}]
    return [{"model": "124M", "batch": batch} for batch in ((4, 64) if device == "cuda" else (4,))]  # 4: the paper's


class Step:
    """A step of train.py with one placement, over the first batch of its run."""

    def __init__(self, placement: str, shape: Shape, model: GPT, device: torch.device, data_dir: str):
        folder = ROOT / "config"
        self.config = load_config([
            str(folder / "dit.py"), str(folder / "tasks" / "gsm8k_dit.py"), f"--placement={placement}", "--limit=256",
            f"--block_size={BLOCK_SIZE}", f"--batch_size={shape['batch']}", f"--micro_batch_size={shape['batch']}",
            f"--device={device}", f"--data_dir={data_dir}", "--learning_rate=0",
        ])  # fmt: skip
        self.device, self.tokenizer = device, load_tokenizer("gpt2")
        self.inside = TargetPauses(self.config, self.tokenizer) if placement in ("ran", "aaw", "dit") else None
        pairs, self.source = load_pairs(self.config, "train", self.tokenizer, self.inside)
        batches = TaskBatches(pairs, shape["batch"], self.tokenizer.pause_id, "causal", self.config.seed, 0, 1,
                              self.inside)  # fmt: skip
        self.batch, self.model = batches[0].to(device), model
        self.forward = torch.compile(model) if device.type == "cuda" else model
        self.optimizers = make_optimizers(model, self.config)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        self.processes = Processes(str(device))

    def __call__(self):
        """The step; its batch, with its pauses."""
        batch = self.batch
        if self.config.placement == "dit":
            with self.autocast:
                batch = self.inside.chosen_by(self.forward, batch, self.config.micro_batch_size)
        train_step(self.forward, self.optimizers, [batch], batch.n_live, self.config.grad_clip, self.autocast,
                   self.processes)  # fmt: skip
        return batch

    def flops(self) -> float:
        """Of a step, without the optimizer's."""
        batch, config = self(), self.model.config
        head = 2 * config.n_embd * config.vocab_size  # of a live row
        total = sum(flops.training_flops(config, int(n), n_live=0) for n in batch.lengths) + 3 * head * batch.n_live
        if self.config.placement == "dit":
            total += sum(flops.forward_flops(config, int(n), n_live=0) for n in self.batch.lengths)
            total += head * self.batch.n_live
        return float(total)


def measure(bench: Bench, shape: Shape, data_dir: str, sources: list[str]) -> None:
    torch.manual_seed(0)
    vocab_size = load_tokenizer("gpt2").vocab_size
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=BLOCK_SIZE, **MODELS[shape["model"]], **GPT2))
    model = model.to(bench.device)
    steps = {placement: Step(placement, shape, deepcopy(model), bench.device, data_dir) for placement in PLACEMENTS}
    work = {placement: step.flops() for placement, step in steps.items()}
    samples = race(steps, wall_clock, bench.seconds)
    for placement, step in steps.items():
        batch = step()
        bench.rows.append(bench.row(
            "step", shape | {"placement": placement}, OURS, samples[placement], samples["sft"],
            tokens=int(batch.lengths.sum()), pauses=batch.n_pauses, flops=work[placement],
            flops_ratio=work[placement] / work["sft"], error=None,
        ))  # fmt: skip
    sources.append(steps["sft"].source)


def main(quick: bool = False, data_dir: str = "") -> None:
    """What a step of DIT costs, beside its baselines.

    Args:
        quick: A small model.
        data_dir: Folder with gsm8k_train.jsonl. Empty: the hub.
    """
    bench, sources = Bench("dit", quick), []
    for shape in shapes(bench.device.type, quick):
        bench.attempt(measure, shape, data_dir, sources)
    bench.write(source=", ".join(set(sources)))
    bench.show(
        lambda row: f"a step of {row['shape']['batch']} pairs of GSM8K, times one without pauses",
        lambda row: "",
        first={"ms": lambda row: number(row["p50_ms"]), "time": lambda row: f"{row['ratio']:.2f}",
               "FLOPs": lambda row: f"{row['flops_ratio']:.2f}", "tokens": lambda row: str(row["tokens"]),
               "of them pauses": lambda row: str(row["pauses"])},
        hidden=("batch",),
    )  # fmt: skip
    bench.finish()
