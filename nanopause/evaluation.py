"""Evaluation of a checkpoint on tasks with M pauses in every prompt: answers, scores and costs.

    generated answers    by the engine, greedy by default; a prompt and its pauses are prefilled in one forward pass
    choices              log-likelihood of each choice after prompt and pauses: one sequence per choice

examples.jsonl has one object per example, appended when the example is finished, so that an interrupted evaluation can
continue. settings.json has the settings that all of them have in common. nanopause/results.py makes the table of them.
"""

import copy
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from nanopause.engine import Engine, Token
from nanopause.errors import UserError
from nanopause.files import replace_file
from nanopause.finetune import Position, continuation, with_pauses
from nanopause.model import GPT
from nanopause.policy import Policy
from nanopause.scoring import choice_flops, generation_flops, score
from nanopause.tasks import Example, Task
from nanopause.tasks.metrics import pass_at_k
from nanopause.tasks.task import first_line
from nanopause.tokenizer import Tokenizer, load_tokenizer

LENGTH_SAMPLE = 100  # examples on which two tokenizers are compared

# Settings


def words(text: str) -> list[str]:
    """The distinct items of a comma-separated list, in order."""
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def numbers(name: str, text: str) -> list[int]:
    """The distinct numbers of a comma-separated list, sorted. Raises UserError if one is not a whole number ≥ 0."""
    items = words(text)
    for item in items:
        if not (item.isascii() and item.isdecimal()):
            raise UserError(f"--{name}={text} must be whole numbers with commas, such as 0,10,50, not {item!r}")
    return sorted({int(item) for item in items})


def fingerprint(model: GPT) -> str:
    """The sha256 of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def claim(folder: Path, settings: dict, option: str = "results") -> None:
    """Write the settings to folder/settings.json, or check that they are equal to those already there. option: the
    command line's name of the folder. Raises UserError if the folder has results with other settings."""
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    try:
        saved = json.loads(file.read_text())
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        return write_json(file, settings)
    except ValueError:
        raise UserError(f"{file} is damaged: choose another --{option}") from None
    for key in {**saved, **settings}:
        if saved.get(key) != settings.get(key):
            raise UserError(f"{folder} has results with {key}={saved.get(key)}, not {key}={settings.get(key)}: choose "
                            f"another --{option}")  # fmt: skip


# JSON lines


def read_rows(file: Path) -> list[dict]:
    """The objects of a file of JSON lines; [] if there is no file. An incomplete last line, as an interrupted run
    leaves it, is removed from the file. Raises UserError if another line is not a JSON object."""
    if not file.exists():
        return []
    text = file.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        with open(file, "r+b") as stream:
            stream.truncate(len(complete))
    rows = []
    for number, line in enumerate(complete.split(b"\n")[:-1], 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):
            raise UserError(f"{file}, line {number}, is damaged: delete the line, and its example is evaluated "
                            f"again") from None  # fmt: skip
    return rows


def add_row(file: Path, row: dict) -> None:
    with open(file, "a") as stream:
        stream.write(json.dumps(row) + "\n")


def write_json(file: Path, content: dict) -> None:
    replace_file(file, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages on which scores or intervals depend."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("scipy", "transformers", "datasets", "rouge-score", "lm_eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


# Answers


class Decoding(NamedTuple):
    """How answers are generated. samples: texts per example, each with its own seed. temperature: 0 is greedy.
    pass_at: every k of pass@k, 1 to samples, for answers that are programs."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1337
    pass_at: tuple[int, ...] = (1,)


@dataclass
class Cell:
    """One task with one number of pauses: encodes its examples, answers and scores them.

    pauses: tokens in every prompt or, with a policy, at each place where it inserts pauses. Prompts are cut as in
    finetuning, to block_size less the pauses and the answer. An answer has at most max_new_tokens tokens of the task,
    but no more than half of block_size.

    Raises UserError if the pauses leave no room for a prompt, or if a policy or sampling is requested for a task
    without generation.
    """

    model: GPT
    tokenizer: Tokenizer
    task: Task
    examples: list[Example]
    pauses: int
    attention: str = "causal"
    batch_size: int = 8
    pause_position: Position = "append"
    cut: Literal["left", "right"] = "left"
    policy: Policy | None = None
    decoding: Decoding = Decoding()

    def __post_init__(self):
        task, policy, block_size = self.task, self.policy, self.model.config.block_size
        if not task.max_new_tokens and (policy or self.decoding.temperature):
            raise UserError(f"{task.name} is scored by likelihood, and nothing is generated: leave out --pause_when, "
                            f"--stop_when_useless, --temperature and --samples")  # fmt: skip
        if policy:
            policy.check_attention(self.attention)
        self.prompt_pauses, self.budget = (0, policy.budget) if policy else (self.pauses, 0)
        self.max_new_tokens = min(new_tokens(task, self.examples, self.tokenizer), block_size // 2)
        self.room = block_size - self.max_new_tokens - self.budget
        if self.room - self.prompt_pauses - (self.tokenizer.bos_id is not None) < 1:
            n, option = (self.budget, "pause_budget") if policy else (self.pauses, "pauses")
            answer = f" and {self.max_new_tokens} of them are for the answer" if self.max_new_tokens else ""
            raise UserError(f"{n} pauses leave no room for a prompt of {task.name}, as block_size is {block_size} "
                            f"tokens{answer}: lower --{option}")  # fmt: skip

    def prompt(self, text: str, room: int) -> tuple[list[int], int]:
        """The tokens of a text with its pauses, at most `room`, and the number of tokens that were cut."""
        tokens = self.tokenizer.encode(text)
        if not tokens and self.tokenizer.bos_id is None:
            tokens = [self.tokenizer.begin_id]
        return with_pauses(tokens, self.tokenizer, room, self.prompt_pauses, self.pause_position, self.cut)

    def max_length(self) -> int:
        """The most tokens that a sequence of the engine can have."""
        longest = max(len(self.prompt(example.prefix, self.room)[0]) for example in self.examples)
        return min(longest + self.max_new_tokens + self.budget, self.model.config.block_size)

    def answers(self, todo: list[int], engine: Engine | None) -> Iterator[dict]:
        """The answers to the examples with these indices, in the order in which they finish, as lines of examples.jsonl
        without scores and seconds. engine: needed only if the task's answers are generated.

        outputs: the generated texts, one per sample, with ends: why each ended (engine.Token); or log_likelihoods: log
        p of each choice in nats. tokens, prompt: without pauses, of the longest choice; cut: tokens cut from the
        prompt; generated and pauses: in all samples. flops: of all samples or choices."""
        return self._generate(todo, engine) if self.max_new_tokens else self._score_choices(todo)

    def _row(
        self, i: int, answer: dict, n_prompt: int, n_cut: int, n_generated: int, n_pauses: int, flops: int
    ) -> dict:
        example = self.examples[i]
        tokens = {"prompt": n_prompt, "cut": n_cut, "generated": n_generated, "pauses": n_pauses,
                  "limit": self.max_new_tokens}  # fmt: skip
        return {"task": self.task.name, "index": i, "pauses": self.pauses, "prompt": example.prefix,
                "example": digest(example), "references": list(example.references), **answer, "tokens": tokens,
                "flops": flops}  # fmt: skip

    def _generate(self, todo: list[int], engine: Engine) -> Iterator[dict]:
        """If the answer is the first line that is not blank, generation stops at a line feed. Samples that are blank
        up to there are generated again without this stop."""
        n, temperature, top_p, seed, _ = self.decoding
        prompts = {i: self.prompt(self.examples[i].prefix, self.room) for i in todo}
        samples: dict[int, dict[int, list[Token]]] = {i: {} for i in todo}
        remaining = [(i, j) for i in todo for j in range(n)]
        for until in [["\n"], []] if self.task.read is first_line else [[]]:
            blank, texts = [], [[] for _ in remaining]
            for token in engine.stream(
                [prompts[i][0] for i, _ in remaining], self.policy or 0, temperature=temperature, top_p=top_p,
                seed=[seed + i * n + j for i, j in remaining], max_new_tokens=self.max_new_tokens,
                attention=self.attention, until=until,
            ):  # fmt: skip
                tokens, (i, j) = texts[token.sequence], remaining[token.sequence]
                tokens.append(token)
                if token.end == "until" and not self._text(tokens).strip():
                    blank.append((i, j))
                elif token.end:
                    samples[i][j] = tokens
                    if len(samples[i]) == n:
                        yield self._answer(i, [samples[i].pop(j) for j in range(n)], *prompts[i])
            remaining = blank

    def _text(self, tokens: list[Token]) -> str:
        return self.tokenizer.decode([token.id for token in tokens if token.end != "eot"])

    def _answer(self, i: int, samples: list[list[Token]], prompt: list[int], n_cut: int) -> dict:
        pauses = [[token.pauses for token in tokens] for tokens in samples]
        return self._row(
            i,
            {"outputs": list(map(self._text, samples)), "ends": [tokens[-1].end for tokens in samples]},
            n_prompt=len(prompt) - self.prompt_pauses,
            n_cut=n_cut,
            n_generated=sum(map(len, samples)),
            n_pauses=len(samples) * self.prompt_pauses + sum(map(sum, pauses)),
            flops=sum(generation_flops(self.model.config, len(prompt), each) for each in pauses),
        )

    def _encode_choice(self, index: int, choice: str) -> tuple[list[int], list[int], int]:
        """Tokens of the prompt with pauses, tokens of the choice, and the number of prompt tokens cut. Prompt and
        choice are tokenized as one text, as in lm-evaluation-harness."""
        prefix = self.examples[index].prefix
        scored = continuation(self.tokenizer, prefix, choice)
        prompt, n_cut = self.prompt(prefix, self.room + 1 - len(scored))
        if not scored:
            raise UserError(f"example {index} of {self.task.name} has the choice {choice!r}, which is no token of the "
                            f"tokenizer: change or delete it")  # fmt: skip
        if len(prompt) + len(scored) > self.room + 1 or len(prompt) == self.pauses:
            raise UserError(
                f"example {index} of {self.task.name} has a choice of {len(scored)} tokens, and with {self.pauses} "
                f"pauses 1 to {self.model.config.block_size - self.pauses} fit: lower --pauses"
            )
        return prompt, scored, n_cut

    def _score_choices(self, todo: list[int]) -> Iterator[dict]:
        encoded = {i: [self._encode_choice(i, choice) for choice in self.examples[i].choices] for i in todo}
        owners = [(i, j) for i in todo for j in range(len(encoded[i]))]
        pairs = [encoded[i][j][:2] for i, j in owners]
        found: dict[int, dict[int, float]] = {i: {} for i in todo}
        for k, log_likelihood, _ in score(self.model, pairs, self.attention, self.batch_size):
            i, j = owners[k]
            found[i][j] = log_likelihood
            if len(found[i]) == len(encoded[i]):
                prompts, scored, n_cut = zip(*encoded[i])
                values = [found[i][j] for j in range(len(encoded[i]))]
                choices = self.examples[i].choices
                yield self._row(
                    i,
                    {"choices": list(choices), "log_likelihoods": values, "answer": choices[values.index(max(values))],
                     "label": self.examples[i].label},
                    n_prompt=max(map(len, prompts)) - self.pauses,
                    n_cut=max(n_cut),
                    n_generated=0,
                    n_pauses=self.pauses,
                    flops=sum(choice_flops(self.model.config, *map(len, pair)) for pair in zip(prompts, scored)),
                )  # fmt: skip

    def warm_up(self, todo: list[int], engine: Engine | None) -> None:
        """Answer a first batch and discard it, so that one-time costs (CUDA graphs, compilation) are not timed: one
        prompt in full, and of the others, to save time, only the last token."""
        if not self.max_new_tokens:
            next(self._score_choices(todo[:1]))
            return
        prompts = [self.prompt(self.examples[i].prefix, self.room)[0] for i in todo[: self.batch_size]]
        prompts[1:] = [prompt[-1:] for prompt in prompts[1:]]
        engine.generate(prompts, copy.deepcopy(self.policy) or 0, temperature=self.decoding.temperature,
                        top_p=self.decoding.top_p, max_new_tokens=2, attention=self.attention)  # fmt: skip

    def scored(self, row: dict) -> dict:
        """An answer with its scores: the mean over the samples; for programs, pass@k."""
        task, example = self.task, self.examples[row["index"]]
        if not self.max_new_tokens:
            return row | {"scores": task.score(row["log_likelihoods"], example)}
        answers = [task.read(text) for text in row["outputs"]]
        by_sample = [task.score(answer, example) for answer in answers]
        n = len(answers)
        if task.executes_code:
            n_passed = round(sum(scores["pass@1"] for scores in by_sample))
            scores = {f"pass@{k}": pass_at_k(n, n_passed, k) for k in self.decoding.pass_at}
        else:
            scores = {name: math.fsum(scores[name] for scores in by_sample) / n for name in by_sample[0]}
        return row | {"answers": answers, "scores": scores}

    def rows_of(self, rows: Iterable[dict], file: Path) -> dict[int, dict]:
        """The rows of this cell by index. Raises UserError if one belongs to an example that the data does not have."""
        found = {row["index"]: row for row in rows if (row["task"], row["pauses"]) == (self.task.name, self.pauses)}
        for i, row in found.items():
            if i >= len(self.examples) or row["example"] != digest(self.examples[i]):
                raise UserError(f"{file} has an example {i} of {self.task.name} that is not in this data: choose "
                                f"another --results")  # fmt: skip
        return found


def digest(example: Example) -> str:
    """A hash of an example, references and choices included."""
    return hashlib.sha256(repr(example).encode()).hexdigest()[:16]


def new_tokens(task: Task, examples: list[Example], tokenizer: Tokenizer) -> int:
    """The task's max_new_tokens, given in GPT-2 tokens, in tokens of this tokenizer. The factor is the ratio of both
    tokenizers' lengths of the first LENGTH_SAMPLE examples."""
    if tokenizer.name == "gpt2" or not task.max_new_tokens:
        return task.max_new_tokens
    gpt2 = load_tokenizer("gpt2")
    texts = [example.prefix + example.target for example in examples[:LENGTH_SAMPLE]]
    n_ours = sum(len(tokenizer.encode(text)) for text in texts)
    n_gpt2 = sum(len(gpt2.encode(text)) for text in texts)
    return math.ceil(Fraction(task.max_new_tokens * n_ours, n_gpt2))
