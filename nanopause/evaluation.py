"""A checkpoint's answers to tasks with M pauses in every prompt, their scores, and what they cost.

    generated answers    through the engine, greedy unless asked to sample: a prompt and its pauses are one pass
    choices              the likelihood of each after prompt and pauses: a pass a choice

examples.jsonl has an object an example, written as it ends, so that what broke off goes on; settings.json has what all
of them were made with.
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

SAMPLE = 100  # examples by which lengths in two tokenizers are compared

# What was asked for


def words(text: str) -> list[str]:
    """The items of a list with commas, each once."""
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def numbers(name: str, text: str) -> list[int]:
    """The numbers of a list with commas, each once, in their order. Raises UserError: one is not whole, or below 0."""
    items = words(text)
    for item in items:
        if not (item.isascii() and item.isdecimal()):
            raise UserError(f"--{name}={text} must be whole numbers with commas, such as 0,10,50, and {item!r} is none")
    return sorted({int(item) for item in items})


def fingerprint(model: GPT) -> str:
    """The sha256 of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def claim(folder: Path, settings: dict, option: str = "results") -> None:
    """Make the folder, which --option names, that of these settings. Raises UserError where it has results of
    others."""
    file, settings = folder / "settings.json", json.loads(json.dumps(settings))
    try:
        then = json.loads(file.read_text())
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        return write_json(file, settings)
    except ValueError:
        raise UserError(f"{file} is damaged: choose another --{option}") from None
    for key in {**then, **settings}:
        if then.get(key) != settings.get(key):
            raise UserError(f"{folder} has results with {key}={then.get(key)}, and these would be with "
                            f"{key}={settings.get(key)}: choose another --{option}")  # fmt: skip


# Lines on the disk


def read_rows(file: Path) -> list[dict]:
    """The objects of a file of JSON lines. A last line that a kill cut short is deleted. Raises UserError for others
    that are none."""
    if not file.exists():
        return []
    text = file.read_bytes()
    if len(whole := text[: text.rfind(b"\n") + 1]) < len(text):
        with open(file, "r+b") as stream:
            stream.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):
            raise UserError(f"{file}, line {number}: damaged; delete that line, and its example runs again") from None
    return rows


def add_row(file: Path, row: dict) -> None:
    with open(file, "a") as stream:
        stream.write(json.dumps(row) + "\n")


# Answers


class Decoding(NamedTuple):
    """How answers are generated. samples: texts an example, each with a seed of its own; temperature 0 is greedy.
    pass_at: the k of pass@k, 1 to samples, of answers that are programs."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1337
    pass_at: tuple[int, ...] = (1,)


class Answer(NamedTuple):
    """What a model made of an example. said: the texts that it wrote, one a sample, or every choice's log-likelihood in
    nats. Numbers of tokens and FLOPs are those of all samples."""

    index: int
    said: tuple[str, ...] | list[float]
    ends: tuple[str, ...]  # why the texts ended, see engine.Token
    n_prompt: int  # tokens that were read, without pauses; of a choice the longest prompt
    n_cut: int  # tokens that were cut from its left
    n_generated: int
    n_pauses: int  # in the prompts and in the texts; of a choice its prompt's
    flops: int


class Cell:
    """One task with one number of pauses: how its examples are read, answered and scored.

    pauses: tokens of every prompt, or with a policy pauses wherever it has any. A prompt is cut as in finetuning, to
    what the model reads less its pauses and the answer. An answer may take max_new_tokens, but no more than half of
    what the model reads.

    Raises UserError where the pauses leave no room, or a policy or samples are asked for and nothing is generated.
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
        decoding: Decoding = Decoding(),  # noqa: B008, which cannot change
    ):
        self.model, self.tokenizer, self.task, self.examples = model, tokenizer, task, examples
        self.pauses, self.attention, self.batch_size = pauses, attention, batch_size
        self.policy, self.decoding, self.in_prompt = policy, decoding, 0 if policy else pauses
        self.placing = self.in_prompt, pause_position, cut
        if not task.max_new_tokens and (policy or decoding.temperature):
            raise UserError(f"{task.name} is scored by likelihood, and nothing is generated: leave out --pause_when, "
                            f"--stop_when_useless, --temperature and --samples")  # fmt: skip
        if policy:
            policy.check_attention(attention)
        self.max_new_tokens = min(new_tokens(task, examples, tokenizer), model.config.block_size // 2)
        self.room = model.config.block_size - self.max_new_tokens - (policy.budget if policy else 0)
        if self.room - self.in_prompt - (tokenizer.bos_id is not None) < 1:
            answer = f", and the answer may take {self.max_new_tokens}" if self.max_new_tokens else ""
            n, key = (policy.budget, "pause_budget") if policy else (pauses, "pauses")
            raise UserError(f"{n} pauses leave no room for a prompt of {task.name}: the model reads "
                            f"{model.config.block_size} tokens{answer}; lower --{key}")  # fmt: skip

    def prompt(self, text: str, room: int) -> tuple[list[int], int]:
        """A text with its pauses in at most `room` tokens, and how many of its tokens are cut."""
        empty = [] if self.tokenizer.bos_id is not None else [self.tokenizer.begin_id]
        return with_pauses(self.tokenizer.encode(text) or empty, self.tokenizer, room, *self.placing)

    def max_length(self) -> int:
        """Tokens that an engine has to hold, at most."""
        longest = max(len(self.prompt(example.prefix, self.room)[0]) for example in self.examples)
        pauses = self.policy.budget if self.policy else 0
        return min(longest + self.max_new_tokens + pauses, self.model.config.block_size)

    def answers(self, todo: list[int], engine: Engine | None) -> Iterator[Answer]:
        """The examples of these indices, as they end. engine: where the task's answers are generated."""
        return self._generated(todo, engine) if self.max_new_tokens else self._chosen(todo)

    def _generated(self, todo: list[int], engine: Engine) -> Iterator[Answer]:
        prompts = {i: self.prompt(self.examples[i].prefix, self.room) for i in todo}
        written: dict[int, dict[int, list[Token]]] = {i: {} for i in todo}
        which = [(i, sample) for i in todo for sample in range(self.decoding.samples)]
        for until in [["\n"], []] if self.task.read is first_line else [[]]:
            again = []
            for (i, sample), tokens in self._ended(which, prompts, engine, until):
                if tokens[-1].end == "until" and not self._text(tokens).strip():
                    again.append((i, sample))  # the answer is the first line that is not blank
                    continue
                written[i][sample] = tokens
                if len(written[i]) == self.decoding.samples:
                    yield self._answer(i, [tokens for _, tokens in sorted(written.pop(i).items())], *prompts[i])
            which = again

    def _ended(
        self, which: list[tuple[int, int]], prompts: dict, engine: Engine, until: list[str]
    ) -> Iterator[tuple[tuple[int, int], list[Token]]]:
        """Samples of examples, and their tokens, as they end."""
        made, (n, temperature, top_p, seed, _) = [[] for _ in which], self.decoding
        for token in engine.stream(
            [prompts[i][0] for i, _ in which], self.policy or 0, temperature=temperature, top_p=top_p,
            seed=[seed + i * n + sample for i, sample in which], max_new_tokens=self.max_new_tokens,
            attention=self.attention, until=until,
        ):  # fmt: skip
            made[token.sequence].append(token)
            if token.end:
                yield which[token.sequence], made[token.sequence]

    def _text(self, tokens: list[Token]) -> str:
        return self.tokenizer.decode([token.id for token in tokens if token.end != "eot"])

    def _answer(self, index: int, samples: list[list[Token]], prompt: list[int], n_cut: int) -> Answer:
        pauses = [[token.pauses for token in tokens] for tokens in samples]
        return Answer(
            index, tuple(map(self._text, samples)), tuple(tokens[-1].end for tokens in samples),
            len(prompt) - self.in_prompt, n_cut, sum(map(len, samples)),
            len(samples) * self.in_prompt + sum(map(sum, pauses)),
            sum(generation_flops(self.model.config, len(prompt), each) for each in pauses),
        )  # fmt: skip

    def _chosen(self, todo: list[int]) -> Iterator[Answer]:
        """Prompt and choice are cut into tokens as one text, as lm-evaluation-harness does it."""
        pairs, owners, reads = [], [], {i: [] for i in todo}
        for i in todo:
            for choice in self.examples[i].choices:
                scored = continuation(self.tokenizer, self.examples[i].prefix, choice)
                prompt, n_cut = self.prompt(self.examples[i].prefix, self.room + 1 - len(scored))
                if len(prompt) + len(scored) > self.room + 1 or len(prompt) == self.pauses or not scored:
                    raise UserError(
                        f"example {i} of {self.task.name} has a choice of {len(scored)} tokens, and with {self.pauses} "
                        f"pauses 1 to {self.model.config.block_size - self.pauses} fit: lower --pauses"
                    )
                pairs.append((prompt, scored))
                owners.append((i, len(reads[i])))
                reads[i].append((len(prompt), len(scored), n_cut))
        values, left = {i: [0.0] * len(reads[i]) for i in todo}, {i: len(reads[i]) for i in todo}
        scores = score(self.model, pairs, self.attention, self.batch_size)
        for (i, j), value in ((owners[number], value) for number, value, _ in scores):
            values[i][j] = value
            left[i] -= 1
            if not left[i]:
                flops = sum(choice_flops(self.model.config, n, m) for n, m, _ in reads[i])
                n_read, _, n_cut = map(max, zip(*reads[i]))
                yield Answer(i, values[i], (), n_read - self.pauses, n_cut, 0, self.pauses, flops)

    def warm_up(self, todo: list[int], engine: Engine | None) -> None:
        """Answer a few examples for nothing, so that what happens at first is not timed; on a CPU, where prompts take
        long, one, and the ends of others. On a GPU a step of a size that none of them has is captured while it is."""
        gpu = self.model.head.weight.device.type == "cuda"
        if self.max_new_tokens == 0:
            return [_ for _ in self._chosen(todo[: self.batch_size if gpu else 1])] and None
        prompts = [self.prompt(self.examples[i].prefix, self.room)[0] for i in todo[: self.batch_size]]
        prompts[1:] = prompts[1:] if gpu else [prompt[-1:] for prompt in prompts[1:]]
        engine.generate(prompts, copy.deepcopy(self.policy) or 0, temperature=self.decoding.temperature,
                        top_p=self.decoding.top_p, max_new_tokens=2, attention=self.attention)  # fmt: skip

    def row(self, answer: Answer, seconds: float) -> dict:
        """The line of an example in examples.jsonl."""
        example = self.examples[answer.index]
        row = {"task": self.task.name, "index": answer.index, "pauses": self.pauses, "prompt": example.prefix,
               "example": digest(example)}  # fmt: skip
        if self.max_new_tokens:
            read = [self.task.read(text) for text in answer.said]
            scores = self._scores([self.task.score(one, example) for one in read])
            row |= {"outputs": list(answer.said), "answers": read, "references": list(example.references),
                    "ends": list(answer.ends)}  # fmt: skip
        else:
            said, scores = answer.said, self.task.score(answer.said, example)
            best = max(range(len(said)), key=said.__getitem__)
            row |= {"choices": list(example.choices), "log_likelihoods": said, "answer": example.choices[best],
                    "label": example.label, "references": list(example.references)}  # fmt: skip
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

    def _scores(self, of_samples: list[dict[str, float]]) -> dict[str, float]:
        """The samples' means, and of programs pass@k."""
        if self.task.executes_code:
            n_passed = round(sum(scores["pass@1"] for scores in of_samples))
            return {f"pass@{k}": pass_at_k(len(of_samples), n_passed, k) for k in self.decoding.pass_at}
        return {name: math.fsum(s[name] for s in of_samples) / len(of_samples) for name in of_samples[0]}

    def rows_of(self, rows: Iterable[dict], file: Path) -> dict[int, dict]:
        """Those of this cell, by index. Raises UserError where they are of other examples."""
        mine = {row["index"]: row for row in rows if (row["task"], row["pauses"]) == (self.task.name, self.pauses)}
        for i, row in mine.items():
            if i >= len(self.examples) or row["example"] != digest(self.examples[i]):
                raise UserError(f"{file} has an example {i} of {self.task.name} that is not in this data: choose "
                                f"another --results")  # fmt: skip
        return mine


def digest(example: Example) -> str:
    """What tells an example from any other, references and choices included."""
    return hashlib.sha256(repr(example).encode()).hexdigest()[:16]


def new_tokens(task: Task, examples: list[Example], tokenizer: Tokenizer) -> int:
    """The task's max_new_tokens, which counts GPT-2's tokens, in this tokenizer's: by how many of each the first
    examples take."""
    if tokenizer.name == "gpt2" or not task.max_new_tokens:
        return task.max_new_tokens
    texts = [example.prefix + example.target for example in examples[:SAMPLE]]
    ours, gpt2 = (sum(len(t.encode(text)) for text in texts) for t in (tokenizer, load_tokenizer("gpt2")))
    return math.ceil(Fraction(task.max_new_tokens * ours, gpt2))


def timed(answers: Iterable[Answer]) -> Iterator[tuple[Answer, float]]:
    """Each, and the seconds that it took to come; what is done with it between two is not counted."""
    since = perf_counter()
    for answer in answers:
        yield answer, perf_counter() - since
        since = perf_counter()


# What it costs


def generation_flops(config: GPTConfig, n_read: int, pauses: Sequence[int]) -> int:
    """FLOPs of a pass over n_read tokens, prompt and its pauses, and one over every generated token but the last.

    pauses: of a policy, before each generated token, in the pass of the token before it. Those that a policy took back
    are not counted."""
    flops, context, n_new = 0, 0, n_read
    for n in pauses:
        flops += forward_flops(config, n_new + n, context=context, n_live=2 if n else 1)
        context, n_new = context + n_new + n, 1
    return flops


def choice_flops(config: GPTConfig, n_read: int, n_scored: int) -> int:
    """FLOPs of the pass over prompt, pauses and a choice, whose last token is not read."""
    return forward_flops(config, n_read + n_scored - 1, n_live=n_scored)


# Figures of all examples


INTERVAL_METHODS = {  # of an interval, and how a footnote describes it
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
    a key of INTERVAL_METHODS. The last three are None where the scores have no interval."""
    n, value = len(values), math.fsum(values) / len(values)
    if is_binary(values):
        return _figure(value, "wilson", wilson(round(math.fsum(values)), n))
    interval = t_interval(values)
    return _figure(value, "t", interval and (max(0.0, interval[0]), min(1.0, interval[1])))


def paired_difference(values: list[float], base: list[float]) -> dict:
    """The mean difference of the scores of the same examples, as `mean`, and "p", McNemar's; None unless every score is
    0 or 1."""
    gains = [x - y for x, y in zip(values, base)]
    p = mcnemar(sum(x > 0 for x in gains), sum(x < 0 for x in gains)) if is_binary([*values, *base]) else None
    return _figure(math.fsum(gains) / len(gains), "bootstrap", bootstrap_interval(gains)) | {"p": p}


def harness_figure(value: float, stderr: float | None, n: int) -> dict:
    """A metric of lm-evaluation-harness with its 95% interval, as `mean`. stderr: the harness's own standard error.

    Of n scores in [0, 1] with this mean, those that are all 0 or 1 have the largest standard error, √(p(1−p)/(n−1)). So
    one that is equal to it shows that the metric is a proportion."""
    if stderr is not None and n > 1 and 0 <= value <= 1 and math.isclose(n * value, round(n * value), abs_tol=1e-6):
        if math.isclose(stderr, math.sqrt(value * (1 - value) / (n - 1)), rel_tol=1e-6, abs_tol=1e-12):
            return _figure(value, "wilson", wilson(round(n * value), n))
    return _figure(value, "normal", normal_interval(value, stderr))


def summaries(rows: Iterable[dict]) -> list[dict]:
    """A line of the table for every task and number of pauses that has all of the task's examples; the fewest pauses
    first, from which the others' difference is taken."""
    cells: dict[str, dict[int, dict[int, dict]]] = {}
    for row in rows:
        cells.setdefault(row["task"], {}).setdefault(row["pauses"], {})[row["index"]] = row
    made = []
    for by_pauses in cells.values():
        n = max(map(len, by_pauses.values()))
        whole = [by_pauses[pauses] for pauses in sorted(by_pauses) if len(by_pauses[pauses]) == n]
        made += [summary(rows, whole[0] if rows is not whole[0] else None) for rows in whole]
    return made


def summary(rows: dict[int, dict], first: dict[int, dict] | None = None) -> dict:
    """A line of the table. first: the rows with the fewest pauses, from which the primary metric's difference is taken
    example by example."""
    some, n = list(rows.values()), len(rows)
    names = list(some[0]["scores"])
    primary = names[0]
    made = {
        "task": some[0]["task"],
        "by": "nanopause",
        "pauses": some[0]["pauses"],
        "n": n,
        "metrics": {name: mean([row["scores"][name] for row in some]) for name in names},
        "n_cut": sum(row["tokens"]["cut"] > 0 for row in some),
        "max_new_tokens": some[0]["tokens"]["limit"],
        "n_unfinished": sum(end in ("length", "context") for row in some for end in row.get("ends", ())),
        "prompt_tokens": sum(row["tokens"]["prompt"] for row in some) / n,
        "generated_tokens": sum(row["tokens"]["generated"] for row in some) / n,
        "pauses_per_example": sum(row["tokens"]["pauses"] for row in some) / n,
        "flops_per_example": sum(row["flops"] for row in some) / n,
        "seconds_per_example": sum(row["seconds"] for row in some) / n,
    }
    if first:
        values = [row["scores"][primary] for row in rows.values()]
        base = [first[i]["scores"][primary] for i in rows]
        made["difference"] = paired_difference(values, base)
    return made


def format_figure(figure: dict | None, sign: str = "") -> str:
    """value [low, high]; the value alone where there is no interval. sign: "+" shows that of positive numbers too."""
    if figure is None:
        return "–"
    shown = [figure["value"]] if figure["low"] is None else [figure["value"], figure["low"], figure["high"]]
    digits = 4 if max(map(abs, shown)) < 10 else 2
    value, *limits = (f"{number:{sign}.{digits}f}" for number in shown)
    return f"{value} [{', '.join(limits)}]" if limits else value


def format_p(p: float) -> str:
    return f"p = {p:.3g}" if p >= 0.001 else "p < 0.001"


def interval_note(results: list[dict]) -> str:
    """What brackets and p-values of the results are, for a footnote; empty where they have none."""
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
    """The results as rich shows them. in all: the pauses that an example's prompts and texts had, of all samples, where
    they are not those of one prompt."""
    from rich.table import Table

    made, before = Table(), None
    in_all = any(row.get("pauses_per_example", row["pauses"]) != row["pauses"] for row in results)
    for name in ("task", "pauses", *["in all"] * in_all, "metrics", "difference", "n", "GFLOPs", "ms"):
        made.add_column(name, justify="left" if name in ("task", "metrics") else "right")
    for row in results:
        if before not in (None, (row["task"], row["by"])):
            made.add_section()
        before = row["task"], row["by"]
        difference = format_figure(row.get("difference"), sign="+")
        if "difference" in row and (p := row["difference"]["p"]) is not None:
            difference += f"\n{format_p(p)}"
        made.add_row(
            panel_name(row), str(row["pauses"]),
            *[f"{row['pauses_per_example']:.3g}" if "pauses_per_example" in row else "–"] * in_all,
            "\n".join(f"{name} {format_figure(figure)}" for name, figure in row["metrics"].items()),
            difference, f"{row['n']:,}",
            f"{row['flops_per_example'] / 1e9:.3g}" if "flops_per_example" in row else "–",
            f"{1000 * row['seconds_per_example']:.3g}",
        )  # fmt: skip
    return made


def panels(n: int) -> tuple:
    """A figure of matplotlib and its n axes, three in a row at most."""
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
    """The primary metric against the number of pauses, a panel a task; error bars are 95% intervals."""
    import matplotlib.pyplot as plt

    of_task = {}
    for row in results:
        of_task.setdefault((row["task"], row["by"]), []).append(row)
    figure, axes = panels(len(of_task))
    for axis, rows in zip(axes, of_task.values()):
        metric = next(iter(rows[0]["metrics"]))
        figures = [row["metrics"][metric] for row in rows]
        values = [figure["value"] for figure in figures]
        limits = [[math.nan if figure[key] is None else figure[key] for figure in figures] for key in ("low", "high")]
        errors = [[abs(limit - value) for limit, value in zip(side, values)] for side in limits]  # nan: no bar
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


def write_json(file: Path, what: dict) -> None:
    replace_file(file, json.dumps(what, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of Python and of what a score or its interval depends on, where it is installed."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("scipy", "transformers", "datasets", "rouge-score", "lm_eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


# lm-evaluation-harness


def harness_tasks(names: list[str], folder: str = ""):
    """The harness's TaskManager, after it has loaded tasks, groups and their data. folder: YAML files of tasks besides
    its own. Raises UserError: not installed, no such folder or task, data out of reach, or code that it would run."""
    needs("lm_eval", "harness")
    from lm_eval.tasks import TaskManager

    if folder and not Path(folder).is_dir():
        raise UserError(f"--harness_path={folder} is not a folder")
    # The harness's own tasks take ten seconds to list, so local ones are looked for alone first.
    for with_its_own in (False, True) if folder else (True,):
        manager = TaskManager(include_path=folder or None, include_defaults=with_its_own)
        try:
            for name in names:
                _try_to_load(manager, name)
            return manager
        except UserError:
            if with_its_own:
                raise


def _try_to_load(manager, name: str) -> None:
    if name not in manager.all_tasks:
        near = get_close_matches(name, manager.all_tasks, 1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` has their names"
        raise UserError(f"lm-evaluation-harness has no task {name!r}: {hint}")
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # of the network, the data or the task's own code
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"lm-evaluation-harness cannot load {name!r} ({why}): download its data where there is a "
                        f"network, or name local tasks by --harness_path") from None  # fmt: skip
    if unsafe := [task for task, loaded in tasks.items() if getattr(loaded, "UNSAFE_CODE", False)]:
        raise UserError(f"the task {unsafe[0]!r} runs code that a model wrote: use lm-eval itself, in a sandbox")


def harness_results(lm, name: str, manager, limit: int | None) -> list[dict]:
    """The results of a task of the harness, or of a group and its tasks, with the harness's own standard errors in
    place of intervals, see `with_intervals`. They are kept by the task's name: after a change of its YAML or data
    delete harness.jsonl.

    lm: a nanopause.harness.Harness. Its time is that of everything, the same for all of a group's rows."""
    from lm_eval import simple_evaluate

    n_cut, start = lm.n_cut, perf_counter()
    found = simple_evaluate(lm, tasks=[name], task_manager=manager, limit=limit, log_samples=False)
    seconds, counts = perf_counter() - start, found.get("n-samples", {})
    n, made = sum(count["effective"] for count in counts.values()), []
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        metrics = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            metrics[metric if kind == "none" else f"{metric} ({kind})"] = {
                "value": value, "stderr": error if isinstance(error, float) and math.isfinite(error) else None
            }  # fmt: skip
        if metrics:
            made.append({"task": task, "by": "harness", "pauses": lm.pauses,
                         "n": counts[task]["effective"] if task in counts else n, "metrics": metrics,
                         "n_cut": lm.n_cut - n_cut, "seconds_per_example": seconds / n})  # fmt: skip
    return made


def with_intervals(row: dict) -> dict:
    """A row of `harness_results` as a row of results.json."""
    figures = {name: harness_figure(**figure, n=row["n"]) for name, figure in row["metrics"].items()}
    return {**row, "metrics": figures}
