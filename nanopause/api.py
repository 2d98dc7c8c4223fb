"""A model as one object, for notebooks and scripts.

model = nanopause.load("out/pause")
print(model.generate("Return a", pauses=10))
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short

import torch

from nanopause import hub
from nanopause.config import Config
from nanopause.distributed import choose_device
from nanopause.engine import Engine, Generation
from nanopause.errors import UserError, check_whole
from nanopause.model import GPT
from nanopause.policy import AfterPrompt, Policy
from nanopause.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # a text or token ids


def load(source: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> "LanguageModel":
    """Load a run of train.py, one of its checkpoints, a transformers folder, a GGUF file or a hub id.

    device: "auto" is a GPU if there is one. dtype: of weights and cache; None: bfloat16 on a GPU, else float32.
    Raises UserError if there is no such model, or it is damaged or not supported."""
    chosen = choose_device(device)
    gpt, tokenizer, state = hub.load(source, chosen)
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return LanguageModel(str(source), gpt.to(dtype).eval(), tokenizer, state)


class LanguageModel:
    """source: the argument of load. gpt: the torch module. config: of its training here, else the defaults of Config.
    knows_pauses: whether it was trained with pauses. pauses: after every prompt by default, as in its finetuning."""

    def __init__(self, source: str, gpt: GPT, tokenizer: Tokenizer, state: dict):
        self.source, self.gpt, self.tokenizer = source, gpt, tokenizer
        self.config = Config(**state.get("config", {}))
        self.knows_pauses: bool = state["knows_pauses"]
        self.pauses: int = state["pauses"]
        self._engine: Engine | None = None
        self._has_warned = False

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        pauses: int | Policy | None = None,
        *,
        max_new_tokens: int = 200,
        batch_size: int = 8,
        **options,
    ) -> Generation | list[Generation]:
        """Continue one prompt or several, each a text or token ids.

        pauses: that many after the prompt, or a policy; None: `self.pauses`. A model that does not know pauses prints a
        warning. batch_size: most prompts at a time. Other options and errors: Engine.submit. Returns a Generation,
        which prints as its text, for a text or a list of ids, else a list."""
        if not isinstance(prompts, Sequence):
            raise UserError(f"prompts={short(prompts)} must be a text, token ids or a list of them")
        is_one = isinstance(prompts, str) or all(isinstance(prompt, int) for prompt in prompts) and len(prompts) > 0
        several = [prompts] if is_one else list(prompts)
        policy = self.pauses if pauses is None else pauses
        policy = policy if isinstance(policy, Policy) else AfterPrompt(policy)
        self.warn_of_pauses(policy)
        engine = self.engine(several, policy, max_new_tokens, batch_size)
        options.setdefault("attention", self.config.attention)
        generations = engine.generate(several, policy, max_new_tokens=max_new_tokens, **options)
        return generations[0] if is_one else generations

    def n_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt; 0 for what is neither a text nor token ids, which the engine refuses."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return len(ids) if isinstance(ids, Sequence) else 0

    def warn_of_pauses(self, policy: Policy) -> None:
        """Print a warning, once, if the policy pauses and the model was never trained with pauses."""
        if policy.budget and not (self.knows_pauses or self._has_warned):
            print(f"warning: {self.source} was never trained with pauses, which may spoil or end its text: train it "
                  f"with pauses, or generate with pauses=0", file=sys.stderr)  # fmt: skip
            self._has_warned = True

    def engine(
        self, prompts: Sequence[Prompt], policy: Policy, max_new_tokens: int, batch_size: int, n_longest: int = 0
    ) -> Engine:
        """An Engine with room for these prompts, for later ones of n_longest tokens, and for their pauses and new
        tokens: the last one if it has it."""
        check_whole("max_new_tokens", max_new_tokens, 0, 2**31)
        check_whole("batch_size", batch_size, 1, 2**20)
        longest = max(n_longest, *map(self.n_tokens, prompts), 0)
        length = min(self.gpt.config.block_size, longest + 1 + max_new_tokens + policy.budget)
        batch_size = max(1, min(batch_size, len(prompts)))
        if self._engine is None or self._engine.max_batch != batch_size or self._engine.max_length < length:
            self._engine = Engine(self.gpt, self.tokenizer, batch_size, length)
        return self._engine
