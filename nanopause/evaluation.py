"""Evaluation of a checkpoint on tasks with M pauses in every prompt: answers, scores and costs.

    generated answers    by the engine, greedy by default; a prompt and its pauses are prefilled in one forward pass
    choices              log-likelihood of each choice after prompt and pauses: one sequence per choice

examples.jsonl has one object per example, appended when the example is finished, so that an interrupted evaluation can
continue. settings.json has the settings that all of them have in common.
"""

import copy
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import torch

from nanopause.engine import Engine, Token
from nanopause.errors import UserError, needs
from nanopause.files import replace_file
from nanopause.finetune import Position, continuation, with_pauses
from nanopause.flops import forward_flops
from nanopause.intervals import Interval, bootstrap_interval, is_binary, mcnemar, normal_interval, t_interval, wilson
from nanopause.model import GPT, GPTConfig
from nanopause.policy import Policy
from nanopause.scoring import score
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


# Answers


class Decoding(NamedTuple):
    """How answers are generated. samples: texts per example, each with its own seed. temperature: 0 is greedy.
    pass_at: every k of pass@k, 1 to samples, for answers that are programs."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1337
    pass_at: tuple[int, ...] = (1,)


class Answer(NamedTuple):
    """A model's answer to an example. Numbers of generated tokens, pauses and FLOPs are sums over all samples."""

    index: int  # of the example
    outputs: tuple[str, ...] | list[float]  # the generated texts, one per sample; or each choice's log p in nats
    ends: tuple[str, ...]  # why each text ended, see engine.Token; () for choices
    n_prompt: int  # tokens of the prompt without pauses; for choices, of the longest prompt
    n_cut: int  # tokens cut from the prompt
    n_generated: int
    n_pauses: int  # in prompts and generated texts; for choices, in one prompt
    flops: int


class Cell:
    """One task with one number of pauses: encodes its examples, answers and scores them.

    pauses: tokens in every prompt or, with a policy, at each place where it inserts pauses. Prompts are cut as in
    finetuning, to block_size less the pauses and the answer. An answer has at most max_new_tokens tokens of the task,
    but no more than half of block_size.

    Raises UserError if the pauses leave no room for a prompt, or if a policy or sampling is requested for a task
    without generation.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        task: Task,
        examples: list[Example],
        pauses: int,
        attention: str = "causal",
        batch_size: int = 8,
        pause_position: Position = "append",
        cut: Literal["left", "right"] = "left",
        policy: Policy | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008, it is immutable
    ):
        self.model, self.tokenizer = model, tokenizer
        self.task, self.examples = task, examples
        self.pauses, self.attention, self.batch_size = pauses, attention, batch_size
        self.policy, self.decoding = policy, decoding
        self.prompt_pauses = 0 if policy else pauses
        self.placing = self.prompt_pauses, pause_position, cut
        if not task.max_new_tokens and (policy or decoding.temperature):
            raise UserError(f"{task.name} is scored by likelihood, and nothing is generated: leave out --pause_when, "
                            f"--stop_when_useless, --temperature and --samples")  # fmt: skip
        if policy:
            policy.check_attention(attention)
        block_size = model.config.block_size
        self.max_new_tokens = min(new_tokens(task, examples, tokenizer), block_size // 2)
        self.room = block_size - self.max_new_tokens - (policy.budget if policy else 0)
        if self.room - self.prompt_pauses - (tokenizer.bos_id is not None) < 1:
            n, option = (policy.budget, "pause_budget") if policy else (pauses, "pauses")
            answer = f" and {self.max_new_tokens} of them are for the answer" if self.max_new_tokens else ""
            raise UserError(f"{n} pauses leave no room for a prompt of {task.name}, as block_size is {block_size} "
                            f"tokens{answer}: lower --{option}")  # fmt: skip

    def prompt(self, text: str, room: int) -> tuple[list[int], int]:
        """The tokens of a text with its pauses, at most `room`, and the number of tokens that were cut."""
        empty = [] if self.tokenizer.bos_id is not None else [self.tokenizer.begin_id]
        return with_pauses(self.tokenizer.encode(text) or empty, self.tokenizer, room, *self.placing)

    def max_length(self) -> int:
        """The most tokens that a sequence of the engine can have."""
        longest = max(len(self.prompt(example.prefix, self.room)[0]) for example in self.examples)
        pauses = self.policy.budget if self.policy else 0
        return min(longest + self.max_new_tokens + pauses, self.model.config.block_size)

    def answers(self, todo: list[int], engine: Engine | None) -> Iterator[Answer]:
        """The answers to the examples with these indices, in the order in which they finish. engine: needed only if the
        task's answers are generated."""
        return self._generate(todo, engine) if self.max_new_tokens else self._score_choices(todo)

    def _generate(self, todo: list[int], engine: Engine) -> Iterator[Answer]:
        """If the answer is the first line that is not blank, generation stops at a line feed. Samples that are blank
        up to there are generated again without this stop."""
        prompts = {i: self.prompt(self.examples[i].prefix, self.room) for i in todo}
        samples: dict[int, dict[int, list[Token]]] = {i: {} for i in todo}
        remaining = [(i, sample) for i in todo for sample in range(self.decoding.samples)]
        for until in [["\n"], []] if self.task.read is first_line else [[]]:
            blank = []
            for (i, sample), tokens in self._stream(remaining, prompts, engine, until):
                if tokens[-1].end == "until" and not self._text(tokens).strip():
                    blank.append((i, sample))
                    continue
                samples[i][sample] = tokens
                if len(samples[i]) == self.decoding.samples:
                    yield self._answer(i, [tokens for _, tokens in sorted(samples.pop(i).items())], *prompts[i])
            remaining = blank

    def _stream(
        self, remaining: list[tuple[int, int]], prompts: dict, engine: Engine, until: list[str]
    ) -> Iterator[tuple[tuple[int, int], list[Token]]]:
        """Pairs (example, sample) and their tokens, in the order in which they finish."""
        n, temperature, top_p, seed, _ = self.decoding
        tokens = [[] for _ in remaining]
        for token in engine.stream(
            [prompts[i][0] for i, _ in remaining], self.policy or 0, temperature=temperature, top_p=top_p,
            seed=[seed + i * n + sample for i, sample in remaining], max_new_tokens=self.max_new_tokens,
            attention=self.attention, until=until,
        ):  # fmt: skip
            tokens[token.sequence].append(token)
            if token.end:
                yield remaining[token.sequence], tokens[token.sequence]

    def _text(self, tokens: list[Token]) -> str:
        return self.tokenizer.decode([token.id for token in tokens if token.end != "eot"])

    def _answer(self, index: int, samples: list[list[Token]], prompt: list[int], n_cut: int) -> Answer:
        pauses = [[token.pauses for token in tokens] for tokens in samples]
        return Answer(
            index,
            outputs=tuple(map(self._text, samples)),
            ends=tuple(tokens[-1].end for tokens in samples),
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

    def _score_choices(self, todo: list[int]) -> Iterator[Answer]:
        choices = {i: [self._encode_choice(i, choice) for choice in self.examples[i].choices] for i in todo}
        pairs = [(prompt, scored) for i in todo for prompt, scored, _ in choices[i]]
        owners = [(i, j) for i in todo for j in range(len(choices[i]))]
        scores: dict[int, dict[int, float]] = {i: {} for i in todo}
        for number, value, _ in score(self.model, pairs, self.attention, self.batch_size):
            i, j = owners[number]
            scores[i][j] = value
            if len(scores[i]) == len(choices[i]):
                yield Answer(
                    i,
                    outputs=[scores[i][j] for j in range(len(choices[i]))],
                    ends=(),
                    n_prompt=max(len(prompt) for prompt, _, _ in choices[i]) - self.pauses,
                    n_cut=max(n_cut for _, _, n_cut in choices[i]),
                    n_generated=0,
                    n_pauses=self.pauses,
                    flops=sum(choice_flops(self.model.config, len(prompt), len(t)) for prompt, t, _ in choices[i]),
                )

    def warm_up(self, todo: list[int], engine: Engine | None) -> None:
        """Answer a few examples and discard the answers, so that one-time costs are not timed: on a GPU a whole batch,
        as a CUDA graph is captured per batch size; on a CPU, where prefill is slow, one prompt and the last tokens of
        the others."""
        is_gpu = self.model.head.weight.device.type == "cuda"
        if not self.max_new_tokens:
            for _ in self._score_choices(todo[: self.batch_size if is_gpu else 1]):
                pass
            return
        prompts = [self.prompt(self.examples[i].prefix, self.room)[0] for i in todo[: self.batch_size]]
        if not is_gpu:
            prompts[1:] = [prompt[-1:] for prompt in prompts[1:]]
        engine.generate(prompts, copy.deepcopy(self.policy) or 0, temperature=self.decoding.temperature,
                        top_p=self.decoding.top_p, max_new_tokens=2, attention=self.attention)  # fmt: skip

    def row(self, answer: Answer, seconds: float) -> dict:
        """An example's line of examples.jsonl."""
        example = self.examples[answer.index]
        row = {"task": self.task.name, "index": answer.index, "pauses": self.pauses, "prompt": example.prefix,
               "example": digest(example)}  # fmt: skip
        if self.max_new_tokens:
            read = [self.task.read(text) for text in answer.outputs]
            scores = self._scores([self.task.score(text, example) for text in read])
            row |= {"outputs": list(answer.outputs), "answers": read, "references": list(example.references),
                    "ends": list(answer.ends)}  # fmt: skip
        else:
            log_likelihoods = answer.outputs
            scores = self.task.score(log_likelihoods, example)
            best = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
            row |= {"choices": list(example.choices), "log_likelihoods": log_likelihoods,
                    "answer": example.choices[best], "label": example.label,
                    "references": list(example.references)}  # fmt: skip
        return row | {
            "scores": scores,
            "tokens": {
                "prompt": answer.n_prompt,
                "cut": answer.n_cut,
                "generated": answer.n_generated,
                "pauses": answer.n_pauses,
                "limit": self.max_new_tokens,
            },
            "flops": answer.flops,
            "seconds": seconds,
        }

    def _scores(self, by_sample: list[dict[str, float]]) -> dict[str, float]:
        """The mean of each score over the samples; for programs, pass@k."""
        n = len(by_sample)
        if self.task.executes_code:
            n_passed = round(sum(scores["pass@1"] for scores in by_sample))
            return {f"pass@{k}": pass_at_k(n, n_passed, k) for k in self.decoding.pass_at}
        return {name: math.fsum(scores[name] for scores in by_sample) / n for name in by_sample[0]}

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


def timed(answers: Iterable[Answer]) -> Iterator[tuple[Answer, float]]:
    """Each answer with the seconds until it was available; time that the caller spends between two is not counted."""
    start = perf_counter()
    for answer in answers:
        yield answer, perf_counter() - start
        start = perf_counter()


# FLOPs


def generation_flops(config: GPTConfig, n_prompt: int, pauses: Sequence[int]) -> int:
    """FLOPs of prefill of n_prompt tokens, pauses included, and of one decode step per generated token but the last.

    pauses: number that a policy inserted before each generated token, fused with the step of the token before. Pauses
    that were rolled back are not counted."""
    flops, context = 0, 0
    n_new = n_prompt
    for n in pauses:
        flops += forward_flops(config, n_new + n, context=context, n_live=2 if n else 1)
        context += n_new + n
        n_new = 1
    return flops


def choice_flops(config: GPTConfig, n_prompt: int, n_scored: int) -> int:
    """FLOPs of the forward pass over prompt, pauses and choice. The last token of the choice is not an input."""
    return forward_flops(config, n_prompt + n_scored - 1, n_live=n_scored)


# Statistics


INTERVAL_METHODS = {  # keys of "method" and their description in a footnote
    "wilson": "Wilson's interval where every score is 0 or 1",
    "t": "Student's t where scores lie between 0 and 1",
    "normal": "1.96 standard errors to each side for lm-evaluation-harness",
    "bootstrap": "the percentile bootstrap over examples for a difference",
}


def _figure(value: float, method: str, interval: Interval | None) -> dict:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high, "method": method if interval else None}


def mean(values: list[float]) -> dict:
    """The mean of scores in [0, 1] of independent examples, and its 95% interval: "value", "low", "high", and "method",
    a key of INTERVAL_METHODS. The last three are None if the scores have no interval."""
    value = math.fsum(values) / len(values)
    if is_binary(values):
        return _figure(value, "wilson", wilson(round(math.fsum(values)), len(values)))
    interval = t_interval(values)
    return _figure(value, "t", interval and (max(0.0, interval[0]), min(1.0, interval[1])))


def paired_difference(values: list[float], base: list[float]) -> dict:
    """The mean difference of two scores of each example, in the form of `mean`, and "p" of McNemar's test; None unless
    every score is 0 or 1."""
    gains = [x - y for x, y in zip(values, base)]
    p = mcnemar(sum(x > 0 for x in gains), sum(x < 0 for x in gains)) if is_binary([*values, *base]) else None
    return _figure(math.fsum(gains) / len(gains), "bootstrap", bootstrap_interval(gains)) | {"p": p}


def harness_figure(value: float, stderr: float | None, n: int) -> dict:
    """A metric of lm-evaluation-harness with its 95% interval, in the form of `mean`. stderr: the harness's standard
    error.

    Among n scores in [0, 1] with mean p, only scores that are all 0 or 1 reach the largest standard error,
    √(p(1−p)/(n−1)). A metric with this standard error is therefore a proportion and has Wilson's interval."""
    if stderr is not None and n > 1 and 0 <= value <= 1 and math.isclose(n * value, round(n * value), abs_tol=1e-6):
        if math.isclose(stderr, math.sqrt(value * (1 - value) / (n - 1)), rel_tol=1e-6, abs_tol=1e-12):
            return _figure(value, "wilson", wilson(round(n * value), n))
    return _figure(value, "normal", normal_interval(value, stderr))


def summaries(rows: Iterable[dict]) -> list[dict]:
    """A row of the table for every task and number of pauses that has all of the task's examples. Differences are to
    the row with the fewest pauses, which comes first."""
    cells: dict[str, dict[int, dict[int, dict]]] = {}
    for row in rows:
        cells.setdefault(row["task"], {}).setdefault(row["pauses"], {})[row["index"]] = row
    results = []
    for by_pauses in cells.values():
        n = max(map(len, by_pauses.values()))
        complete = [by_pauses[pauses] for pauses in sorted(by_pauses) if len(by_pauses[pauses]) == n]
        results.append(summary(complete[0]))
        results += [summary(rows, complete[0]) for rows in complete[1:]]
    return results


def summary(rows: dict[int, dict], first: dict[int, dict] | None = None) -> dict:
    """A row of the table from rows of examples.jsonl by index. first: the rows with the fewest pauses, to which the
    difference of the primary metric is taken, paired by example."""
    examples = list(rows.values())
    n = len(examples)
    names = list(examples[0]["scores"])
    result = {
        "task": examples[0]["task"],
        "by": "nanopause",
        "pauses": examples[0]["pauses"],
        "n": n,
        "metrics": {name: mean([row["scores"][name] for row in examples]) for name in names},
        "n_cut": sum(row["tokens"]["cut"] > 0 for row in examples),
        "max_new_tokens": examples[0]["tokens"]["limit"],
        "n_unfinished": sum(end in ("length", "context") for row in examples for end in row.get("ends", ())),
        "prompt_tokens": sum(row["tokens"]["prompt"] for row in examples) / n,
        "generated_tokens": sum(row["tokens"]["generated"] for row in examples) / n,
        "pauses_per_example": sum(row["tokens"]["pauses"] for row in examples) / n,
        "flops_per_example": sum(row["flops"] for row in examples) / n,
        "seconds_per_example": sum(row["seconds"] for row in examples) / n,
    }
    if first:
        primary = names[0]
        values = [row["scores"][primary] for row in examples]
        base = [first[i]["scores"][primary] for i in rows]
        result["difference"] = paired_difference(values, base)
    return result


def format_figure(figure: dict | None, sign: str = "") -> str:
    """value [low, high]; the value alone if there is no interval. sign: "+" gives positive numbers a sign too."""
    if figure is None:
        return "–"
    shown = [figure["value"]] if figure["low"] is None else [figure["value"], figure["low"], figure["high"]]
    digits = 4 if max(map(abs, shown)) < 10 else 2
    value, *limits = (f"{number:{sign}.{digits}f}" for number in shown)
    return f"{value} [{', '.join(limits)}]" if limits else value


def format_p(p: float) -> str:
    return f"p = {p:.3g}" if p >= 0.001 else "p < 0.001"


def interval_note(results: list[dict]) -> str:
    """A footnote that defines the brackets and p-values of the results; "" if they have none."""
    differences = [row["difference"] for row in results if "difference" in row]
    figures = [*(figure for row in results for figure in row["metrics"].values()), *differences]
    methods = {figure["method"] for figure in figures}
    parts = []
    if methods - {None}:
        described = [text for name, text in INTERVAL_METHODS.items() if name in methods]
        parts.append(f"brackets: 95% intervals ({'; '.join(described)})")
        if None in methods:
            parts.append("no brackets: all scores or differences are equal, or no standard error is known")
    if any(figure["p"] is not None for figure in differences):
        parts.append("p: probability of a difference at least as large if pauses have no effect (McNemar's exact test)")
    return "; ".join(parts)


def panel_name(row: dict) -> str:
    return row["task"] if row["by"] == "nanopause" else f"{row['task']} ({row['by']})"


def table(results: list[dict]):
    """The results as a table of rich. The column "in all", pauses per example in prompts and generated texts of all
    samples, is left out if it always equals the number of pauses."""
    from rich.table import Table

    rendered = Table()
    has_total = any(row.get("pauses_per_example", row["pauses"]) != row["pauses"] for row in results)
    for name in ("task", "pauses", *["in all"] * has_total, "metrics", "difference", "n", "GFLOPs", "ms"):
        rendered.add_column(name, justify="left" if name in ("task", "metrics") else "right")
    before = None
    for row in results:
        if before not in (None, (row["task"], row["by"])):
            rendered.add_section()
        before = row["task"], row["by"]
        difference = format_figure(row.get("difference"), sign="+")
        if "difference" in row and (p := row["difference"]["p"]) is not None:
            difference += f"\n{format_p(p)}"
        rendered.add_row(
            panel_name(row), str(row["pauses"]),
            *[f"{row['pauses_per_example']:.3g}" if "pauses_per_example" in row else "–"] * has_total,
            "\n".join(f"{name} {format_figure(figure)}" for name, figure in row["metrics"].items()),
            difference, f"{row['n']:,}",
            f"{row['flops_per_example'] / 1e9:.3g}" if "flops_per_example" in row else "–",
            f"{1000 * row['seconds_per_example']:.3g}",
        )  # fmt: skip
    return rendered


def panels(n: int) -> tuple:
    """A matplotlib figure and its n axes, at most three per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, n)
    rows = -(-n // columns)
    size = (max(6, 4.6 * columns), 3.4 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, axes.flat[:n]


def plot(results: list[dict], file: Path, title: str, place: str = "in the prompt") -> None:
    """The primary metric against the number of pauses, one panel per task. Error bars are 95% intervals."""
    import matplotlib.pyplot as plt

    by_task = {}
    for row in results:
        by_task.setdefault((row["task"], row["by"]), []).append(row)
    figure, axes = panels(len(by_task))
    for axis, rows in zip(axes, by_task.values()):
        metric = next(iter(rows[0]["metrics"]))
        figures = [row["metrics"][metric] for row in rows]
        values = [figure["value"] for figure in figures]
        limits = [[math.nan if figure[key] is None else figure[key] for figure in figures] for key in ("low", "high")]
        errors = [[abs(limit - value) for limit, value in zip(side, values)] for side in limits]  # nan draws no bar
        pauses = [row["pauses"] for row in rows]
        axis.errorbar(pauses, values, errors, color="tab:red", marker="o", markersize=5, capsize=4, linewidth=1.5)
        axis.set_xticks(pauses)
        axis.set_title(f"{panel_name(rows[0])}, {rows[0]['n']:,} examples", fontsize=10)
        axis.set(xlabel=f"pauses {place} (tokens)", ylabel=f"{metric.replace('_', ' ')}, 95% interval")
        axis.grid(alpha=0.3)
        if min(values) >= 0 and not any(low < 0 for low in limits[0]):
            axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)


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


# lm-evaluation-harness


def harness_tasks(names: list[str], folder: str = ""):
    """A TaskManager of the harness that can load these tasks and groups, with their data already loaded once. folder:
    YAML files of additional tasks. Raises UserError if the harness is not installed, a task or its data cannot be
    loaded, or a task executes generated code."""
    needs("lm_eval", "harness")
    from lm_eval.tasks import TaskManager

    if folder and not Path(folder).is_dir():
        raise UserError(f"--harness_path={folder} is not a folder")
    # Listing the harness's own tasks takes ten seconds, so local tasks are tried without them first.
    for include_defaults in (False, True) if folder else (True,):
        manager = TaskManager(include_path=folder or None, include_defaults=include_defaults)
        try:
            for name in names:
                _try_to_load(manager, name)
            return manager
        except UserError:
            if include_defaults:
                raise


def _try_to_load(manager, name: str) -> None:
    if name not in manager.all_tasks:
        near = get_close_matches(name, manager.all_tasks, 1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists their names"
        raise UserError(f"lm-evaluation-harness has no task {name!r}: {hint}")
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # from the network, the data or the task's own code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"lm-evaluation-harness cannot load {name!r} ({reason}): download its data where there is a "
                        f"network, or name local tasks by --harness_path") from None  # fmt: skip
    if unsafe := [task for task, loaded in tasks.items() if getattr(loaded, "UNSAFE_CODE", False)]:
        raise UserError(f"the task {unsafe[0]!r} executes generated code: use lm-eval itself, in a sandbox")


def harness_results(lm, name: str, manager, limit: int | None) -> list[dict]:
    """The results of a task of the harness, or of a group and its tasks, with the harness's standard errors; see
    `with_intervals`. lm: a nanopause.harness.Harness. All rows of a group have the same seconds_per_example.

    harness.jsonl caches them by the task's name. After a change of the task's YAML or data, delete that file."""
    from lm_eval import simple_evaluate

    n_cut = lm.n_cut
    start = perf_counter()
    evaluated = simple_evaluate(lm, tasks=[name], task_manager=manager, limit=limit, log_samples=False)
    seconds = perf_counter() - start
    counts = evaluated.get("n-samples", {})
    n_total = sum(count["effective"] for count in counts.values())
    rows = []
    for task, values in {**evaluated["results"], **evaluated.get("groups", {})}.items():
        if metrics := _harness_metrics(values):
            n = counts[task]["effective"] if task in counts else n_total
            rows.append({"task": task, "by": "harness", "pauses": lm.pauses, "n": n, "metrics": metrics,
                         "n_cut": lm.n_cut - n_cut, "seconds_per_example": seconds / n_total})  # fmt: skip
    return rows


def _harness_metrics(values: dict) -> dict[str, dict]:
    """Value and standard error by metric, from the harness's keys `metric,filter` and `metric_stderr,filter`."""
    metrics = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{metric}_stderr,{kind}")
            is_known = isinstance(error, float) and math.isfinite(error)
            name = metric if kind == "none" else f"{metric} ({kind})"
            metrics[name] = {"value": value, "stderr": error if is_known else None}
    return metrics


def with_intervals(row: dict) -> dict:
    """A row of `harness_results` as a row of results.json."""
    figures = {name: harness_figure(**figure, n=row["n"]) for name, figure in row["metrics"].items()}
    return {**row, "metrics": figures}
