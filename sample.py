"""Generate text with a trained model.

One prompt, or several; a file of prompts, one per line; or a conversation at the terminal:
    python sample.py --out_dir=out/pause --prompt="The function returns" --pauses=10 --show_pauses
    python sample.py --prompt="Return a" --prompt="Raises" --trace=out.html
    python sample.py --prompt_file=prompts.txt --json
    python sample.py --prompt_file=-
    python sample.py --out_dir=HuggingFaceTB/SmolLM2-135M-Instruct --chat
Pauses where the model is unsure, turned off once they no longer change its log-probabilities:
    python sample.py --prompt="Return a" --pauses=5 --pause_when=below_confidence --threshold=0.3 --stop_when_useless
"""

import codecs
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro

from nanopause import cli, errors, kernels
from nanopause.api import LanguageModel, load
from nanopause.engine import Engine, Generation, Token
from nanopause.errors import UserError
from nanopause.policy import PauseOptions, Policy, StopWhenUseless
from nanopause.tokenizer import Tokenizer
from nanopause.trace import page

# A prompt that imitates pauses without training: background, possible solutions, the best of them and why.
STEPWISE = """{prompt}

Answer in this order. First, the background: what is known about this problem. Then, the possible solutions, one by one.
Last, the best of them, and why.
"""
CONVERSATION = 4096  # tokens: the longest prompt of a conversation
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that a terminal obeys, except tab and newline


@dataclass
class Settings(PauseOptions):
    GROUPS: ClassVar[dict[str, str]] = {"generation": "out_dir", "policy": "pause_when"}  # of --help: first key

    out_dir: str = "out/pause"
    """Folder of a run (its newest intact checkpoint is used), a transformers folder, a GGUF file or a hub id."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeat the option for several texts. None: a new document."""
    prompt_file: str = ""
    """File with one prompt per line; - is standard input, at a terminal a conversation."""
    prompt_style: Literal["plain", "stepwise"] = "plain"
    """stepwise asks for background, solutions and the best of them: a baseline of pauses that needs no training."""
    filler: str = "."
    """Text that is repeated n_filler times after the prompt: a baseline of pauses that needs no training."""
    n_filler: int = 0
    """Number of fillers after the prompt. The tokenizer may merge them; the number of tokens is reported."""
    chat: bool = False
    """Prompts are messages, in the tokenizer's chat template. At a terminal, without a prompt: a conversation."""
    pauses: int | None = None
    """Pauses at each place. None: as many as finetuning had after the prompt, which is reported."""
    attention: Literal["causal", "prefix"] | None = None
    """prefix: prompt and pauses attend to each other in both directions. None: as in finetuning, else causal."""
    max_new_tokens: int = 200
    """Most tokens to generate per prompt."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this."""
    seed: int = 1337
    """Of sampling; prompt i has seed + i."""
    batch_size: int = 8
    """Prompts at a time."""
    show_pauses: bool = False
    """Print a mark for every pause."""
    json: bool = False
    """Print one JSON object per prompt, in the order of the prompts, instead of the text."""
    trace: str = ""
    """HTML file to write: every token shaded by its likelihood, with the likeliest tokens before and after pauses."""
    device: str = "auto"
    """cpu, cuda, …; auto: a GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights and cache; auto: bfloat16 on a GPU."""

    @property
    def is_conversation(self) -> bool:
        return self.prompt_file == "-" and sys.stdin.isatty()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(settings: Settings) -> Iterator[list[str]]:
    """Lists of prompts, each generated in one batch; in a conversation one at a time. Empty lines are skipped."""
    if settings.prompt and settings.prompt_file:
        raise UserError("--prompt and --prompt_file both name the text to continue: leave one out")
    if not settings.prompt_file:
        yield list(settings.prompt) or [""]
    elif settings.is_conversation:
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if line.strip():
                yield [line.rstrip("\r\n")]
    else:
        try:
            text = sys.stdin.read() if settings.prompt_file == "-" else Path(settings.prompt_file).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{settings.prompt_file} is not UTF-8 text ({error.reason} at byte {error.start}): "
                            f"convert it") from None  # fmt: skip
        yield [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def message(role: str, text: str) -> dict[str, str]:
    """A message of a chat, as chat templates have it. role: "user" or "assistant"."""
    return {"role": role, "content": text}


def styled(prompts: list[str], settings: Settings, tokenizer: Tokenizer) -> list[str]:
    """The prompts in their prompt_style and with their fillers."""
    if settings.prompt_style == "stepwise":
        prompts = [STEPWISE.format(prompt=prompt) for prompt in prompts]
    if not settings.n_filler or not prompts:
        return prompts
    filled = [prompt + settings.filler * settings.n_filler for prompt in prompts]
    n_tokens = len(tokenizer.encode(filled[0])) - len(tokenizer.encode(prompts[0]))
    print(f"filler: {settings.filler!r} × {settings.n_filler} makes {n_tokens} tokens", file=sys.stderr)
    return filled


# ---------------------------------------------------------------------------------------------------------------------
# Output


def visible(text: str) -> str:
    """The text; at a terminal its control characters are escaped, so that a model cannot control the terminal."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text) if sys.stdout.isatty() else text


class Printer:
    """Prints the texts in the order of their prompts, as they are generated; as JSON once they are finished.
    max_length: of the engine, in tokens."""

    def __init__(self, prompts: list[str], tokenizer: Tokenizer, settings: Settings, max_length: int):
        self.prompts, self.tokenizer, self.settings, self.max_length = prompts, tokenizer, settings, max_length
        self.generations = [Generation() for _ in prompts]
        self.current = 0  # the text that is being printed
        self.begin()

    def begin(self) -> None:
        self.n_printed = 0  # tokens of the current text
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        if self.current == len(self.prompts) or self.settings.json:
            return
        if len(self.prompts) > 1:
            print(f"--- {self.current + 1} of {len(self.prompts)}")
        if not (self.settings.chat and self.settings.is_conversation):  # the message is on the screen already
            print(visible(self.prompts[self.current]), end="\n" if self.settings.chat else "", flush=True)

    def end(self) -> None:
        if self.settings.json:
            print(as_json(self.prompts[self.current], self.generations[self.current], self.tokenizer), flush=True)
        else:
            print(flush=True)
            if self.generations[self.current].end == "context":
                print(f"text {self.current + 1} ends because it fills the context of {self.max_length} tokens",
                      file=sys.stderr)  # fmt: skip
        self.current += 1
        self.begin()

    def add(self, token: Token) -> None:
        self.generations[token.sequence].tokens.append(token)
        while self.current < len(self.prompts) and self.n_printed < len(self.generations[self.current].tokens):
            token = self.generations[self.current].tokens[self.n_printed]
            self.n_printed += 1
            if not self.settings.json:
                self.print(token)
            if token.end:
                self.end()

    def print(self, token: Token) -> None:
        if self.settings.show_pauses and token.pauses:
            print("<|pause|>" + f"×{token.pauses}" * (token.pauses > 1), end="")
        text = b"" if token.end == "eot" else self.tokenizer.decode_bytes([token.id])
        print(visible(self.decoder.decode(text, final=token.end is not None)), end="", flush=True)

    def close(self) -> None:
        """End the texts without a single token."""
        while self.current < len(self.prompts):
            self.end()


def as_json(prompt: str, generation: Generation, tokenizer: Tokenizer) -> str:
    """One line: the text, and for every token, an end of text included, its id, the pauses before it and its
    log-probability in nats."""
    return json.dumps({
        "prompt": prompt,
        "text": tokenizer.decode(generation.ids),
        "end": generation.end,
        "ids": [token.id for token in generation.tokens],
        "pauses": [token.pauses for token in generation.tokens],
        "logprobs": [token.logprob for token in generation.tokens],
    })  # fmt: skip


def added_seconds(engine: Engine, policy: Policy, prompt_lengths: list[int]) -> float:
    """Seconds that pauses added: typical prefills and decode steps, timed afterwards with and without pauses. The
    median of three differences, times the number of such steps."""
    n_prompt_pauses, n_pauses = policy.at_prompt, policy.per_token
    room = engine.max_length - 1 - max(n_prompt_pauses, n_pauses)
    context = max(1, min(round(statistics.mean(prompt_lengths)), room))

    @torch.no_grad()
    def seconds(n: int, n_cached: int, n_tokens: int, n_outputs: int) -> float:
        """Of a step that appends n_tokens to each of n sequences with n_cached tokens, and computes logits."""
        runner = engine.runner
        runner.slots.length[:n] = n_cached
        tokens = torch.zeros(n, n_tokens, dtype=torch.int64, device=runner.device)
        start = time.perf_counter()
        x = runner.append(tokens, torch.full((n,), n_tokens, device=runner.device))
        engine.model.head(x[:, -n_outputs:])[0, 0, 0].item()  # waits for the device
        return time.perf_counter() - start

    added, n = 0.0, engine.max_batch
    if engine.n_paused_prompts:
        differences = [seconds(1, 0, context + n_prompt_pauses, 2) - seconds(1, 0, context, 1) for _ in range(4)]
        added += engine.n_paused_prompts * statistics.median(differences[1:])  # the first warms up
    if engine.n_paused_decodes:
        differences = [seconds(n, context, 1 + n_pauses, 2) - seconds(n, context, 1, 1) for _ in range(4)]
        added += engine.n_paused_decodes * statistics.median(differences[1:])
    return max(added, 0.0)  # differences of short times can be negative


# ---------------------------------------------------------------------------------------------------------------------
# The script


def choose_policy(settings: Settings, model: LanguageModel) -> Policy:
    """The policy of the settings. Prints the number of pauses if it is the model's default, and the warning of
    LanguageModel.warn_of_pauses."""
    n_pauses = model.pauses if settings.pauses is None else settings.pauses
    if not n_pauses and (settings.pause_when != "after_prompt" or settings.stop_when_useless):
        raise UserError("--pause_when and --stop_when_useless need a number of pauses: add --pauses=5, say")
    policy = settings.policy(n_pauses)
    model.warn_of_pauses(policy)
    if settings.pauses is None and model.knows_pauses:
        text = "none, as training had no fixed number of them after a prompt; --pauses=10 adds 10"
        text = f"{n_pauses}, as in finetuning; --pauses=0 generates without" if n_pauses else text
        print(f"pauses: {text}", file=sys.stderr)
    return policy


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python sample.py", __doc__)
    errors.check("batch_size", settings.batch_size, 1, 2**20)
    errors.check("n_filler", settings.n_filler, 0, 2**20)
    errors.check("max_new_tokens", settings.max_new_tokens, 0, 2**31)
    if settings.chat and not settings.prompt and not settings.prompt_file:
        settings.prompt_file = "-"
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    model = load(settings.out_dir, settings.device, dtype)
    tokenizer, policy = model.tokenizer, choose_policy(settings, model)
    if settings.chat:
        tokenizer.encode_chat([message("user", "")])  # raises without a chat template
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal cannot show become question marks

    engine, prompts, lengths, generations, history, seconds = None, [], [], [], [], 0.0
    try:
        for group in read_prompts(settings):
            group = styled(group, settings, tokenizer)
            inputs = group
            if settings.chat:
                inputs = [tokenizer.encode_chat([*history, message("user", prompt)]) for prompt in group]
            engine = engine or model.engine(
                inputs, policy, settings.max_new_tokens, settings.batch_size, CONVERSATION * settings.is_conversation
            )
            try:
                tokens = engine.stream(
                    inputs, policy, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                    top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed + len(prompts),
                    attention=settings.attention or model.config.attention, trace=bool(settings.trace),
                )  # fmt: skip
            except UserError as error:
                if not settings.is_conversation:
                    raise
                print(f"error: {error}", file=sys.stderr)  # the conversation goes on
                if history:
                    print("the conversation is too long, so it begins again: repeat your message", file=sys.stderr)
                    history = []
                continue
            if settings.trace:
                Path(settings.trace).touch()  # fails before generation rather than after it
            kernels.choose(None, model.gpt.head.weight.device)  # reports which, before the text
            printer = Printer(group, tokenizer, settings, engine.max_length)
            prompts += group
            lengths += [max(1, model.n_tokens(prompt)) for prompt in inputs]
            generations += printer.generations
            start = time.perf_counter()
            try:
                for token in tokens:
                    printer.add(token)
                printer.close()
            finally:
                seconds += time.perf_counter() - start
            if settings.chat and settings.is_conversation:
                answer = tokenizer.decode(printer.generations[0].ids)
                history += [message("user", group[0]), message("assistant", answer)]
    except KeyboardInterrupt:
        print(file=sys.stderr)

    if settings.trace:
        text = page(settings.out_dir, prompts, generations, tokenizer)
        Path(settings.trace).write_text(text, "utf-8", errors="replace")
        print(f"written: {settings.trace}", file=sys.stderr)
    if not generations:
        return
    n_tokens = sum(len(generation.tokens) for generation in generations)
    n_paused = sum(generation.pauses for generation in generations)
    text = f"{n_tokens} tokens, {n_tokens / max(seconds, 1e-9):.0f} tokens/s, {n_paused} pauses"
    if engine.n_paused_prompts or engine.n_paused_decodes:
        added = added_seconds(engine, policy, lengths)
        text += f", which added about {1000 * added:.1f} of {1000 * seconds:.0f} ms"
    print(text, file=sys.stderr)
    if isinstance(policy, StopWhenUseless):
        print(policy.report(), file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
