"""A model as one object, for notebooks and scripts.

model = nanopause.load("out/pause")
print(model.generate("Return a", pauses=10))
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from nanopause import hub
from nanopause.config import Config
from nanopause.distributed import choose_device
from nanopause.engine import Engine, Generation
from nanopause.model import GPT
from nanopause.policy import AfterPrompt, Policy
from nanopause.tokenizer import Tokenizer


def load(source: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> "LanguageModel":
    """Load a run of train.py, one of its checkpoints, a transformers folder, a GGUF file or a hub id.

    device: "auto" is a GPU where there is one. dtype: of weights and cache; None: bfloat16 on a GPU, else float32.
    Raises UserError where there is no such model, or it is damaged or not supported."""
    chosen = choose_device(device)
    gpt, tokenizer, state = hub.load(source, chosen)
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return LanguageModel(gpt.to(dtype).eval(), tokenizer, state)


class LanguageModel:
    """gpt: the torch module. config: of its training; the defaults of Config where it was not trained here.
    knows_pauses: whether it was trained with pauses."""

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, state: dict):
        self.gpt, self.tokenizer = gpt, tokenizer
        self.config = Config(**state["config"]) if state else Config()
        self.knows_pauses = state.get("knows_pauses", False)
        self._engine: Engine | None = None

    def generate(
        self,
        prompts: str | Sequence[str | list[int]],
        pauses: int | Policy | None = None,
        *,
        max_new_tokens: int = 200,
        batch_size: int = 8,
        **options,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or each of several: a text, or a list of token ids.

        pauses: that many after the prompt, or a policy; None: as many as in finetuning. batch_size: most prompts at a
        time. Other options and errors: Engine.submit. Returns a Generation, which prints as its text, or a list."""
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        policy = self.config.prefix_pauses if pauses is None else pauses
        policy = policy if isinstance(policy, Policy) else AfterPrompt(policy)
        longest = max((len(self.tokenizer.encode(p)) if isinstance(p, str) else len(p) for p in several), default=0)
        length = min(self.gpt.config.block_size, longest + 1 + max_new_tokens + policy.budget)
        batch_size = max(1, min(batch_size, len(several)))
        if self._engine is None or self._engine.max_batch != batch_size or self._engine.max_length < length:
            self._engine = Engine(self.gpt, self.tokenizer, batch_size, length)
        options.setdefault("attention", self.config.attention)
        generations = self._engine.generate(several, policy, max_new_tokens=max_new_tokens, **options)
        return generations[0] if isinstance(prompts, str) else generations
