"""Adapter for lm-evaluation-harness: its tasks run with pauses between context and continuation.

    context and M pauses | continuation      log p(continuation); the last pause predicts the first token
    prompt and M pauses  | generation        by the engine

    from lm_eval import simple_evaluate
    simple_evaluate(Harness(model, tokenizer, pauses=10), tasks=["hellaswag", "arc_easy"])

Texts are tokenized and truncated as by the harness's own model for transformers, HFLM of lm_eval.models.huggingface:
without pauses the results equal HFLM's on the same weights.
(pip install -e '.[harness]')
"""

import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nanopause.engine import Engine
from nanopause.errors import UserError, check
from nanopause.model import GPT
from nanopause.pauses import append
from nanopause.scoring import Scored, score
from nanopause.tokenizer import Tokenizer


class Harness(TemplateLM):
    """A model and its tokenizer under the harness's interface, with `pauses` pauses after every context.

    A continuation's log-probability sums over its text tokens only. The softmax is over all ids of the model's
    vocabulary, pause and padding included, as in HFLM, with and without pauses. Generations contain text only: the
    engine never emits a pause.

    attention: "prefix" makes attention within a context and its pauses bidirectional. max_length: maximum tokens of a
    forward pass, pauses included; None: the model's block_size. Longer contexts are cut from the left, with one warning
    per call; n_cut counts them. batch_size: sequences per forward pass. seed: the i-th sampled generation uses seed +
    i, so that a repeated request is sampled independently. (simple_evaluate's use_cache does not depend on these
    settings: use one cache file for each.)

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
        max_length: int | None = None,
        seed: int = 1337,
    ):
        super().__init__()
        self.model, self.tokenizer, self.pauses, self.batch_size = model, tokenizer, pauses, batch_size
        self.attention, self.seed = attention, seed
        self.n_cut, self.engine = 0, None
        self.max_length = model.config.block_size if max_length is None else max_length
        self._device = model.head.weight.device
        check("batch_size", batch_size, 1, 2**20)
        check("max_length", self.max_length, 1, model.config.block_size)
        check("pauses", pauses, 0, self.max_length - 1)
        if attention not in ("causal", "prefix"):
            raise UserError(f"attention={attention!r} is neither 'causal' nor 'prefix': choose one of them")
        last = tokenizer.pause_id if pauses else tokenizer.eot_id
        if last >= model.config.vocab_size:
            raise UserError(f"the tokenizer {tokenizer.name!r} has the id {last}, and the model's vocabulary only "
                            f"{model.config.vocab_size} rows: use the model's own tokenizer")  # fmt: skip

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
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(self.model.head.weight.dtype),
            "pauses": self.pauses,
            "attention": self.attention,
            "max_length": self.max_length,
        }

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
        texts = [""] * len(requests)
        n_cut = 0
        arguments = [repr(request.args[1]) for request in requests]
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        for _, group in groupby(sorted(range(len(requests)), key=arguments.__getitem__), arguments.__getitem__):
            group = list(group)
            until, options = self._options(requests[group[0]].args[1])
            room = self.max_length - self.pauses - options["max_new_tokens"]
            if room < 1:
                raise UserError(f"max_length={self.max_length} has no room for a prompt, {self.pauses} pauses and "
                                f"max_gen_toks={options['max_new_tokens']}: set a lower max_gen_toks")  # fmt: skip
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
            n_cut += sum(len(prompt) > room for prompt in prompts)
            if self.engine is None:
                self.engine = Engine(self.model, self.tokenizer, self.batch_size, self.max_length)
            ids = [[] for _ in group]
            prompts = [prompt[-room:] for prompt in prompts]
            for token in self.engine.stream(
                prompts, self.pauses, seed=self.seed, attention=self.attention, until=until, **options
            ):
                if token.end != "eot":
                    ids[token.sequence].append(token.id)
                if token.end:
                    i = group[token.sequence]
                    text = self.tokenizer.decode(ids[token.sequence])
                    for stop in until:
                        text = text.split(stop)[0]
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
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
                                f"pauses at most {self.max_length - self.pauses} fit: raise max_length")  # fmt: skip
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
            print(f"warning: {n} of {total} contexts were cut from the left to fit max_length={self.max_length} with "
                  f"{self.pauses} pauses", file=sys.stderr)  # fmt: skip

    def _score(self, pairs: list[Scored], attention: str, disable_tqdm: bool) -> Iterator[tuple[int, float, bool]]:
        """`score` with a progress bar."""
        scores = score(self.model, pairs, attention, self.batch_size)
        yield from tqdm(scores, total=len(pairs), desc="loglikelihood", disable=disable_tqdm)
