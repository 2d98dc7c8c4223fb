"""The README (model card) of an exported checkpoint, generated from its run."""

import importlib.metadata
from pathlib import Path

import nanopause
from nanopause import checkpoint, metrics
from nanopause.config import Config
from nanopause.finetune import described
from nanopause.model import GPT
from nanopause.tokenizer import Tokenizer

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pause-tokens]
---

# {name}

A language model with *pause tokens* ([Goyal et al. 2023](https://arxiv.org/abs/2310.02226)): some `<|pause|>` tokens,
id {pause_id}, follow the prompt, and the answer is generated from the last of them. Made with nanopause.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # the folder of this file, or its hub id
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("Return a", return_tensors="pt")
model.generate(**inputs, max_new_tokens=50)  # without pauses
model.generate(**inputs, max_new_tokens=50, custom_generate=folder, trust_remote_code=True, pauses=10)
```

Software that takes token ids needs pauses as ids at the end of the prompt: `ids + 10 * [{pause_id}]`. {vllm}
"""
VLLM = "In vLLM, use `prompt_token_ids`."
NO_VLLM = "vLLM does not support this model: its MLPs are gated by ReLU, and vLLM supports SiLU gates only."


def card(source: str, folder: Path, model: GPT, tokenizer: Tokenizer, state: dict) -> str:
    """The text of the card. folder: of the export. state: of hub.load."""
    config = state.get("config", {})
    out_dir, _ = checkpoint.run_of(Path(source)) or (Path(source), None)
    rows = {"architecture": f"{model.config.n_layer} layers, {model.config.n_embd} wide, "
                            f"{sum(p.numel() for p in model.parameters()):,} parameters",
            "context": f"{model.config.block_size:,} tokens, pauses included",
            "tokenizer": f"{tokenizer.name}, {tokenizer.pause_id:,} ids of text"}  # fmt: skip
    if config:
        rate = config["pause_rate"]
        rows |= {
            "started from": Path(config["init_from"]).name or "random weights",
            "trained on": f"{Path(config['dataset']).name}, sequences of {config['block_size']} tokens",
            "steps": f"{state['step']:,}",
            "tokens": f"{state['tokens']:,}",
            "pauses in training": f"{rate} per token, {rate / (1 + rate):.1%} of the positions" if rate else "none",
        }
        if config["task"]:
            rows |= {
                "trained on": f"{config['task']}, {config['batch_size']} pairs per step",
                "an example": described(Config(**config)),
            }
            del rows["pauses in training"]
        logged = [row for row in metrics.read(out_dir / "metrics.jsonl") if row["step"] <= state["step"]]
        for key, name in (("loss", "training loss"), ("val_loss", "validation loss"),
                          ("val_loss_pauses", "validation loss with pauses")):  # fmt: skip
            if with_key := [row for row in logged if key in row]:
                rows[name] = f"{with_key[-1][key]:.3f} nats per token at step {with_key[-1]['step']:,}"
        rows["trained with"] = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    else:
        rows["made from"] = Path(source).name
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions["nanopause"] = nanopause.__version__
    rows["exported with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return TEMPLATE.format(name=out_dir.name, folder=folder.name, pause_id=tokenizer.pause_id, rows=table,
                           vllm=NO_VLLM if model.config.mlp == "relu2" else VLLM)  # fmt: skip
