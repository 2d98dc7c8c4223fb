"""Write text with a model that train.py made.

One prompt, or several; a file of them, a line each; or a conversation of prompts at the terminal:
    python sample.py --out_dir=out/pause --prompt="The function returns" --pauses=10 --show_pauses
    python sample.py --prompt="Return a" --prompt="Raises" --trace=out.html
    python sample.py --prompt_file=prompts.txt --json
    python sample.py --prompt_file=-
Pauses where the model is unsure, turned off once they are seen to change nothing:
    python sample.py --prompt="Return a" --pauses=5 --pause_when=below_confidence --threshold=0.3 --stop_when_useless
"""

import codecs
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import kernels
from nanopause import cli, errors, hub
from nanopause.config import Config
from nanopause.distributed import Processes
from nanopause.engine import Engine, Generation, Token
from nanopause.errors import UserError
from nanopause.policy import PauseOptions, Policy, StopWhenUseless
from nanopause.tokenizer import Tokenizer
from nanopause.trace import page

# The untrained imitation of pauses by a prompt alone: background, possible solutions, the best of them and why.
STEPWISE = """{prompt}

Answer in this order. First, the background: what is known about this problem. Then, the possible solutions, one by one.
Last, the best of them, and why.
"""


CONVERSATION = 4096  # tokens of its longest prompt that a conversation has room for


@dataclass
class Settings(PauseOptions):
    out_dir: str = "out/pause"
    """Folder of a run, whose newest intact checkpoint is read; or a transformers folder, a GGUF file or a hub id."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; several times for several texts. None: a new document."""
    prompt_file: str = ""
    """File with a prompt a line; - is standard input, at a terminal a conversation of prompts."""
    prompt_style: Literal["plain", "stepwise"] = "plain"
    """stepwise asks for background, solutions and the best of them: pauses imitated by a prompt, without training."""
    filler: str = "."
    """Text that is repeated n_filler times after the prompt: the baseline of pauses that nobody trained."""
    n_filler: int = 0
    """How often the filler stands after the prompt. A tokenizer may make fewer tokens of it, which is told."""
    pauses: int | None = None
    """Pauses, wherever they go. None: after the prompt, as many as prompts had in finetuning."""
    attention: Literal["causal", "prefix"] | None = None
    """prefix: prompt and pauses read each other both ways. None: as the run was finetuned, else causal."""
    max_new_tokens: int = 200
    """Tokens to write at most, a prompt."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 does not restrict."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this."""
    seed: int = 1337
    """Of the sampling; the i-th prompt has seed + i."""
    batch_size: int = 8
    """Prompts at a time."""
    show_pauses: bool = False
    """Print a mark for every pause."""
    json: bool = False
    """Print one JSON object a prompt, in the order of the prompts, instead of the text."""
    trace: str = ""
    """HTML file to write: every token shaded by its likelihood, with what was likeliest before and after pauses."""
    device: str = "auto"
    """cpu, cuda, …; auto takes a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights and cache; auto is bfloat16 on a GPU."""


def read_prompts(settings: Settings) -> Iterator[list[str]]:
    """Prompts, those that are answered together; at a terminal one after the other. Empty lines are none."""
    if settings.prompt and settings.prompt_file:
        raise UserError("--prompt and --prompt_file both say what to continue: leave one out")
    if not settings.prompt_file:
        yield list(settings.prompt) or [""]
    elif settings.prompt_file == "-" and sys.stdin.isatty():
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


class Printer:
    """Prints the texts in the order of their prompts: each as far as it has come, or in JSON when it has ended."""

    def __init__(self, prompts: list[str], tokenizer: Tokenizer, settings: Settings):
        self.prompts, self.tokenizer, self.settings = prompts, tokenizer, settings
        self.made = [Generation() for _ in prompts]
        self.current = self.printed = 0  # the text whose turn it is, and how many of its tokens are printed
        self.begin()

    def begin(self) -> None:
        self.printed = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        if self.current < len(self.prompts) and not self.settings.json:
            print(self.prompts[self.current], end="", flush=True)

    def end(self) -> None:
        if self.settings.json:
            print(as_json(self.prompts[self.current], self.made[self.current], self.tokenizer), flush=True)
        else:
            print(flush=True)
        self.current += 1
        self.begin()

    def add(self, token: Token) -> None:
        self.made[token.sequence].tokens.append(token)
        while self.current < len(self.prompts) and self.printed < len(self.made[self.current].tokens):
            token = self.made[self.current].tokens[self.printed]
            self.printed += 1
            if not self.settings.json:
                self.print(token)
            if token.end:
                self.end()

    def print(self, token: Token) -> None:
        if self.settings.show_pauses and token.pauses:
            print("<|pause|>" + f"×{token.pauses}" * (token.pauses > 1), end="")
        text = b"" if token.end == "eot" else self.tokenizer.decode_bytes([token.id])
        print(self.decoder.decode(text, final=token.end is not None), end="", flush=True)

    def close(self) -> None:
        """End the texts that got no token at all."""
        while self.current < len(self.prompts):
            self.end()


def as_json(prompt: str, generation: Generation, tokenizer: Tokenizer) -> str:
    """A line: the text, and of every token, an end of text included, its id, the pauses before it and its
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
    return added


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python sample.py", __doc__)
    errors.check("batch_size", settings.batch_size, 1, 2**20)
    errors.check("n_filler", settings.n_filler, 0, 2**20)
    errors.check("max_new_tokens", settings.max_new_tokens, 0, 2**31)
    device = Processes(settings.device).device
    model, tokenizer, state = hub.load(settings.out_dir, device)
    trained = Config(**state["config"]) if state else Config()
    settings.attention = settings.attention or trained.attention
    settings.pauses = trained.prefix_pauses if settings.pauses is None else settings.pauses
    if not settings.pauses and (settings.pause_when != "after_prompt" or settings.stop_when_useless):
        raise UserError("--pause_when and --stop_when_useless ask how many pauses: add --pauses=5, say")
    policy = settings.policy(settings.pauses)
    if settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda"):
        model = model.bfloat16()
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    engine, prompts, generations, seconds = None, [], [], 0.0
    conversation = settings.prompt_file == "-" and sys.stdin.isatty()
    try:
        for group in read_prompts(settings):
            if settings.prompt_style == "stepwise":
                group = [STEPWISE.format(prompt=prompt) for prompt in group]
            if settings.n_filler and group:
                filled = [prompt + settings.filler * settings.n_filler for prompt in group]
                n = len(tokenizer.encode(filled[0])) - len(tokenizer.encode(group[0]))
                print(f"filler: {settings.filler!r} × {settings.n_filler} makes {n} tokens", file=sys.stderr)
                group = filled
            if engine is None:
                # A conversation's prompts are not known yet.
                longest = (
                    CONVERSATION
                    if conversation
                    else max((len(tokenizer.encode(prompt)) for prompt in group), default=0)
                )
                length = min(model.config.block_size, longest + 1 + settings.max_new_tokens + policy.budget)
                engine = Engine(model, tokenizer, max(1, min(settings.batch_size, len(group))), length)
            try:
                tokens = engine.stream(
                    group, policy, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                    top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed + len(prompts),
                    attention=settings.attention, trace=bool(settings.trace),
                )  # fmt: skip
            except UserError as error:
                if not conversation:
                    raise
                print(f"error: {error}", file=sys.stderr)  # the conversation goes on
                continue
            if settings.trace:
                Path(settings.trace).touch()  # fails now rather than when all is said
            kernels.choose(None, device)  # says which, before the text
            printer = Printer(group, tokenizer, settings)
            prompts, generations = prompts + group, generations + printer.made
            start = time.perf_counter()
            try:
                for token in tokens:
                    printer.add(token)
                printer.close()
            finally:
                seconds += time.perf_counter() - start
    except KeyboardInterrupt:
        print(file=sys.stderr)
    if settings.trace:
        text = page(settings.out_dir, prompts, generations, tokenizer)
        Path(settings.trace).write_text(text, "utf-8", errors="replace")
        print(f"written: {settings.trace}", file=sys.stderr)
    if not generations:
        return
    n_tokens, n_pauses = (sum(f(g) for g in generations) for f in (lambda g: len(g.tokens), lambda g: g.pauses))
    text = f"{n_tokens} tokens, {n_tokens / max(seconds, 1e-9):.0f} tokens/s, {n_pauses} pauses"
    if engine.n_paused_prompts or engine.n_paused_decodes:
        added = added_seconds(engine, policy, [max(1, len(tokenizer.encode(prompt))) for prompt in prompts])
        text += f", which added about {1000 * added:.1f} of {1000 * seconds:.0f} ms"
    print(text, file=sys.stderr)
    if isinstance(policy, StopWhenUseless):
        print(policy.report(), file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
