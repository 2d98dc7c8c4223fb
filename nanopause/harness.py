"""A model under lm-evaluation-harness, whose tasks then run with pauses between context and continuation.

    context and M pauses | continuation      log p(continuation), its first token predicted at the last pause
    prompt and M pauses  | generation        through the engine

    from lm_eval import simple_evaluate
    simple_evaluate(Harness(model, tokenizer, pauses=10), tasks=["hellaswag", "arc_easy"])

Texts are cut into tokens and to length as the harness's own model for transformers does it, HFLM of
lm_eval.models.huggingface: without pauses the numbers are its numbers on the same weights.
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
    """model and tokenizer as the harness asks for them, with `pauses` pauses after every context.

    A continuation's log-probability is that of its tokens alone, under the softmax over all rows of the model's
    vocabulary, the pause's and padded ones included: that is HFLM's, and the same with pauses and without. What is
    generated is text alone, as the engine has it: a pause is never said.

    attention: "prefix" lets a context and its pauses read each other in both directions. max_length: tokens a pass may
    read, pauses included; None: the model's block_size. Contexts are cut from the left to fit, with one warning a call;
    n_cut counts them. batch_size: sequences a pass. seed: the i-th sampled generation draws with seed + i, so that a
    request that is repeated is answered anew. (simple_evaluate's use_cache does not tell settings apart: a file each.)
    """

    max_gen_toks = 256  # of a generation whose task does not say

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
        self.attention, self.seed, self.n_cut, self.engine = attention, seed, 0, None
        self.max_length = model.config.block_size if max_length is None else max_length
        self._device = model.head.weight.device
        check("batch_size", batch_size, 1, 2**20)
        check("max_length", self.max_length, 1, model.config.block_size)
        check("pauses", pauses, 0, self.max_length - 1)
        if attention not in ("causal", "prefix"):
            raise UserError(f"attention={attention!r} is neither 'causal' nor 'prefix'")
        last = tokenizer.pause_id if pauses else tokenizer.eot_id
        if last >= model.config.vocab_size:
            raise UserError(f"the tokenizer {tokenizer.name!r} has the id {last}, and the model's vocabulary only "
                            f"{model.config.vocab_size} rows: take the model's own tokenizer")  # fmt: skip

    # What the harness asks for

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.tokenizer.begin_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, behind the tokenizer's bos_id if it has one."""
        bos = [] if self.tokenizer.bos_id is None or add_special_tokens is False else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(string)

    def get_model_info(self) -> dict:
        """What the harness writes beside its results."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(self.model.head.weight.dtype),
            "pauses": self.pauses,
            "attention": self.attention,
            "max_length": self.max_length,
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every text, in nats, in windows of max_length tokens as HFLM's. There is no context but
        the tokens before, so there are no pauses, and attention is causal."""
        windows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, tokens in map(make_disjoint_window, rolling):
                windows.append((context, tokens))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, logprob, _ in self._score(windows, "causal", disable_tqdm):
            totals[owners[i]] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows every prompt and its pauses, up to an end of text or the first of the task's stop texts.

        Of a task's generation arguments until, max_gen_toks and its aliases, do_sample, temperature, top_p and top_k
        count; others raise UserError, unless they say what is the case anyway."""
        texts, n_cut = [""] * len(requests), 0
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
                    i, text = group[token.sequence], self.tokenizer.decode(ids[token.sequence])
                    for stop in until:
                        text = text.split(stop)[0]
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()
        bar.close()
        self._tell_cut(n_cut, len(requests))
        return texts

    # How it is computed

    def _options(self, arguments: dict) -> tuple[list[str], dict]:
        """Stop texts, the end of text's name among them as in HFLM, and the engine's options."""
        options = normalize_gen_kwargs(arguments, self.max_gen_toks)
        until = handle_stop_sequences(options.pop("until"), self.tokenizer.decode([self.eot_token_id]))
        # With do_sample and no temperature transformers has 1, normalize_gen_kwargs 0.
        temperature = float(arguments.get("temperature", 1)) if options.pop("do_sample") else 0.0
        made = {"max_new_tokens": options.pop("max_gen_toks"), "temperature": temperature,
                "top_k": int(options.pop("top_k", 0)), "top_p": float(options.pop("top_p", 1))}  # fmt: skip
        options.pop("temperature", None)
        for name, value in options.items():
            if (name, value) not in (("num_beams", 1), ("num_return_sequences", 1), ("use_cache", True)):
                raise UserError(f"the generation argument {name}={value!r} is none of until, max_gen_toks, do_sample, "
                                f"temperature, top_p and top_k: leave it out")  # fmt: skip
        return [stop for stop in until if stop], made

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Log-probability in nats, and whether greedy decoding says it, of every continuation; its tokens are the third
        of a request, those of the context the second."""
        pairs, n_cut = [], 0
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError(f"request {i} has a continuation without a token: give it text")
            room = self.max_length + 1 - self.pauses - len(continuation)
            if room < 1:
                raise UserError(f"request {i} has a continuation of {len(continuation)} tokens, and with {self.pauses} "
                                f"pauses at most {self.max_length - self.pauses} fit: raise max_length")  # fmt: skip
            n_cut += len(context) > room
            context = (context or [self.prefix_token_id])[-room:]
            pairs.append((append(context, self.pauses, self.tokenizer.pause_id), continuation))
        answers = [(0.0, False)] * len(pairs)
        for i, logprob, greedy in self._score(pairs, self.attention, disable_tqdm):
            answers[i] = logprob, greedy
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        self._tell_cut(n_cut, len(pairs))
        return answers

    def _tell_cut(self, n: int, total: int) -> None:
        self.n_cut += n
        if n:
            print(f"warning: {n} of {total} contexts were cut from the left to fit max_length={self.max_length} with "
                  f"{self.pauses} pauses", file=sys.stderr)  # fmt: skip

    def _score(self, pairs: list[Scored], attention: str, disable_tqdm: bool) -> Iterator[tuple[int, float, bool]]:
        """What `score` says of the pairs."""
        answers = score(self.model, pairs, attention, self.batch_size)
        yield from tqdm(answers, total=len(pairs), desc="loglikelihood", disable=disable_tqdm)
