"""lm-evaluation-harness: its tasks run with pauses between context and continuation.

    context and M pauses | continuation      log p(continuation); the last pause predicts the first token
    prompt and M pauses  | generation        by the engine

    from lm_eval import simple_evaluate
    simple_evaluate(Harness(model, tokenizer, pauses=10), tasks=["hellaswag", "arc_easy"])

Texts are tokenized and truncated as by the harness's own model for transformers, HFLM of lm_eval.models.huggingface:
without pauses the results equal HFLM's on the same weights.
(pip install -e '.[harness]')
"""

import math
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Literal

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nanopause.engine import Engine
from nanopause.errors import UserError, check
from nanopause.model import GPT
from nanopause.pauses import append
from nanopause.scoring import Scored, choice_flops, generation_flops, score
from nanopause.tokenizer import Tokenizer


class Harness(TemplateLM):
    """A model and its tokenizer under the harness's interface, with `pauses` pauses after every context.

    A continuation's log-probability sums over its text tokens only. The softmax is over all ids of the model's
    vocabulary, pause and padding included, as in HFLM, with and without pauses. Generations contain text only: the
    engine never emits a pause.

    attention: "prefix" makes attention within a context and its pauses bidirectional. batch_size: sequences per forward
    pass. Contexts that do not fit into block_size, with pauses and answer, are cut from the left, with one warning per
    call; n_cut counts them, and flops sums the FLOPs of all requests. Every sampled generation has its own seed.
    (simple_evaluate's use_cache does not depend on these settings: use one cache file for each.)

    Raises UserError for settings that are out of range or do not fit the model.
    """

    max_gen_toks = 256  # default for tasks that do not set it

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        pauses: int = 0,
        batch_size: int = 8,
        attention: Literal["causal", "prefix"] = "causal",
    ):
        super().__init__()
        self.model, self.tokenizer, self.pauses = model, tokenizer, pauses
        self.batch_size, self.attention = batch_size, attention
        self.max_length, self.n_cut, self.flops = model.config.block_size, 0, 0
        self._device = model.head.weight.device
        check("batch_size", batch_size, 1, 2**20)
        check("pauses", pauses, 0, self.max_length - 1)
        if attention not in ("causal", "prefix"):
            raise UserError(f"attention={attention!r} is neither 'causal' nor 'prefix': choose one of them")
        last = tokenizer.pause_id if pauses else tokenizer.eot_id
        if last >= model.config.vocab_size:
            raise UserError(f"the tokenizer {tokenizer.name!r} has the id {last}, and the model's vocabulary only "
                            f"{model.config.vocab_size} rows: use the model's own tokenizer")  # fmt: skip

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer, self.batch_size, self.max_length)

    # The harness's interface

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The id that replaces an empty context."""
        return self.tokenizer.begin_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, after the tokenizer's bos_id if it has one."""
        bos = [] if self.tokenizer.bos_id is None or add_special_tokens is False else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(string)

    def get_model_info(self) -> dict:
        """Model information that the harness stores with its results."""
        return {"pauses": self.pauses, "attention": self.attention, "model_dtype": str(self.model.head.weight.dtype)}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every text, in nats, in windows of max_length tokens as in HFLM. There is no separate
        context, so there are no pauses and attention is causal."""
        windows, text_of_window = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, tokens in map(make_disjoint_window, rolling):
                windows.append((context, tokens))
                text_of_window.append(i)
        totals = [0.0] * len(requests)
        for i, logprob, _ in self._score(windows, "causal", disable_tqdm):
            totals[text_of_window[i]] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The generation after every prompt and its pauses, up to an end of text or the first of the task's stop texts.

        Supports the generation arguments until, max_gen_toks and its aliases, do_sample, temperature, top_p and top_k.
        Raises UserError for others, unless they have the value that applies anyway."""
        texts, groups, n_cut = [""] * len(requests), {}, 0
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        for group in groups.values():
            until, options = self._options(requests[group[0]].args[1])
            room = self.max_length - self.pauses - options["max_new_tokens"]
            if room < 1:
                raise UserError(f"block_size={self.max_length} has no room for a prompt, {self.pauses} pauses and "
                                f"max_gen_toks={options['max_new_tokens']}: set a lower max_gen_toks")  # fmt: skip
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
            n_cut += sum(len(prompt) > room for prompt in prompts)
            prompts = [prompt[-room:] for prompt in prompts]
            tokens = [[] for _ in group]
            for token in self.engine.stream(prompts, self.pauses, attention=self.attention, until=until, **options):
                k = token.sequence
                tokens[k].append(token)
                if token.end:
                    text = self.tokenizer.decode([each.id for each in tokens[k] if each.end != "eot"])
                    for stop in until:
                        text = text.split(stop)[0]
                    texts[group[k]] = text
                    n_tokens = len(prompts[k]) + self.pauses
                    self.flops += generation_flops(self.model.config, n_tokens, len(tokens[k]) * [0])
                    self.cache_hook.add_partial("generate_until", requests[group[k]].args, text)
                    bar.update()
        bar.close()
        self._report_cut(n_cut, len(requests))
        return texts

    # Implementation

    def _options(self, arguments: dict) -> tuple[list[str], dict]:
        """Stop texts, including the end-of-text token's name as in HFLM, and the engine's options."""
        options = normalize_gen_kwargs(arguments, self.max_gen_toks)
        until = handle_stop_sequences(options.pop("until"), self.tokenizer.decode([self.eot_token_id]))
        # With do_sample and no temperature, transformers uses 1 but normalize_gen_kwargs returns 0.
        temperature = float(arguments.get("temperature", 1)) if options.pop("do_sample") else 0.0
        engine_options = {
            "max_new_tokens": options.pop("max_gen_toks"),
            "temperature": temperature,
            "top_k": int(options.pop("top_k", 0)),
            "top_p": float(options.pop("top_p", 1)),
        }
        options.pop("temperature", None)
        for name, value in options.items():
            if (name, value) not in (("num_beams", 1), ("num_return_sequences", 1), ("use_cache", True)):
                raise UserError(f"the generation argument {name}={value!r} is none of until, max_gen_toks, do_sample, "
                                f"temperature, top_p and top_k: leave it out")  # fmt: skip
        return [stop for stop in until if stop], engine_options

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Log-probability of every continuation in nats, and whether greedy decoding generates it. A request is (texts,
        tokens of the context, tokens of the continuation)."""
        pairs, n_cut = [], 0
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError(f"request {i} has a continuation without a token: the continuation must not be empty")
            room = self.max_length + 1 - self.pauses - len(continuation)
            if room < 1:
                raise UserError(f"request {i} has a continuation of {len(continuation)} tokens, and with {self.pauses} "
                                f"pauses at most {self.max_length - self.pauses} fit: use fewer pauses")  # fmt: skip
            n_cut += len(context) > room
            context = (context or [self.prefix_token_id])[-room:]
            pairs.append((append(context, self.pauses, self.tokenizer.pause_id), continuation))
        results = [(0.0, False)] * len(pairs)
        for i, logprob, is_greedy in self._score(pairs, self.attention, disable_tqdm):
            results[i] = logprob, is_greedy
            self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        self._report_cut(n_cut, len(pairs))
        return results

    def _report_cut(self, n: int, total: int) -> None:
        """Count the contexts that were cut and print a warning."""
        self.n_cut += n
        if n:
            print(f"warning: {n} of {total} contexts were cut from the left to fit block_size={self.max_length} with "
                  f"{self.pauses} pauses", file=sys.stderr)  # fmt: skip

    def _score(self, pairs: list[Scored], attention: str, disable_tqdm: bool) -> Iterator[tuple[int, float, bool]]:
        """`score` with a progress bar."""
        self.flops += sum(choice_flops(self.model.config, *map(len, pair)) for pair in pairs)
        scores = score(self.model, pairs, attention, self.batch_size)
        yield from tqdm(scores, total=len(pairs), desc="loglikelihood", disable=disable_tqdm)


# evaluate.py --harness


def load_tasks(names: list[str], folder: str = "") -> lm_eval.tasks.TaskManager:
    """A TaskManager that has loaded these tasks and groups, and their data, once. folder: YAML files of additional
    tasks. Raises UserError if a task or its data cannot be loaded, or a task executes generated code."""
    if folder and not Path(folder).is_dir():
        raise UserError(f"--harness_path={folder} is not a folder")
    # Listing the harness's own tasks takes ten seconds, so local tasks are tried without them first.
    for include_defaults in (False, True) if folder else (True,):
        manager = lm_eval.tasks.TaskManager(include_path=folder or None, include_defaults=include_defaults)
        try:
            for name in names:
                _try_to_load(manager, name)
            return manager
        except UserError:
            if include_defaults:
                raise


def _try_to_load(manager: lm_eval.tasks.TaskManager, name: str) -> None:
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


def evaluate(lm: Harness, name: str, manager: lm_eval.tasks.TaskManager, limit: int | None) -> list[dict]:
    """The results of a task of the harness, or of a group and its tasks, for results.harness_summaries. FLOPs and
    seconds are means over all examples of the group. evaluate.py keeps them in harness.jsonl: delete that file after a
    change of a task's YAML or data."""
    n_cut, flops, start = lm.n_cut, lm.flops, perf_counter()
    evaluated = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=manager, limit=limit)
    seconds, flops, n_cut = perf_counter() - start, lm.flops - flops, lm.n_cut - n_cut
    counts = {task: count["effective"] for task, count in evaluated["n-samples"].items()}
    n = sum(counts.values())
    return [
        {"task": task, "by": "harness", "pauses": lm.pauses, "n": counts.get(task, n), "metrics": metrics,
         "n_cut": n_cut, "pauses_per_example": lm.pauses, "flops_per_example": flops / n,
         "seconds_per_example": seconds / n}
        for task, values in {**evaluated["results"], **evaluated.get("groups", {})}.items()
        if (metrics := _metrics(values, evaluated["samples"].get(task, [])))
    ]  # fmt: skip


def _metrics(values: dict, samples: list[dict]) -> dict[str, dict]:
    """Every metric's value, its standard error, and the scores of single examples where the value is their mean; the
    last two are None otherwise. The harness's keys are `metric,filter` and `metric_stderr,filter`."""
    metrics = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{metric}_stderr,{kind}")
            some = sorted((each for each in samples if each["filter"] == kind), key=lambda each: each["doc_id"])
            scores = [each.get(metric) for each in some]
            is_mean = bool(scores) and all(isinstance(score, (int, float)) for score in scores)
            is_mean = is_mean and math.isclose(math.fsum(scores) / len(scores), value, abs_tol=1e-9)
            metrics[metric if kind == "none" else f"{metric} ({kind})"] = {
                "value": value,
                "stderr": error if isinstance(error, float) and math.isfinite(error) else None,
                "scores": list(map(float, scores)) if is_mean else None,
            }
    return metrics
