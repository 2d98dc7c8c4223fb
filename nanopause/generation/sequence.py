"""A prompt on its way through the engine, and the tokens that come out."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Token(NamedTuple):
    """A generated token. Log-probabilities are in nats, at temperature 1, over text tokens (pauses excluded)."""

    sequence: int  # index of the prompt
    id: int
    pauses: int  # committed before it
    logprob: float
    logprob_without: float  # before the pauses; NaN for the first token of a prefix-LM with pauses
    end: str | None  # why it is the last: "eot", "until", "length" (max_new_tokens), "context" (max_length)
    top: list[tuple[int, float]]  # with trace: the likeliest ids and their log-probabilities
    top_without: list[tuple[int, float]]  # the same before the pauses


@dataclass(repr=False)
class Generation:
    """All tokens of one prompt. text: decoded, without the end of text; printing shows it."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""

    @property
    def ids(self) -> list[int]:
        """The tokens of the text."""
        return [token.id for token in self.tokens if token.end != "eot"]

    @property
    def pauses(self) -> int:
        return sum(token.pauses for token in self.tokens)

    @property
    def logprobs(self) -> list[float]:
        """In nats, of each of `tokens`, an end of text included."""
        return [token.logprob for token in self.tokens]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {len(self.tokens)} tokens, {self.pauses} pauses, end={self.end!r})"

    @property
    def end(self) -> str:
        """Why it ended, see Token."""
        return self.tokens[-1].end if self.tokens else "length"


@dataclass(eq=False)
class Sequence:
    """A prompt and how far it is. The host may schedule tokens before it has received the last ones."""

    index: int
    prompt: list[int]
    seed: int
    state: Literal["waiting", "prefill", "decode", "finished"] = "waiting"
    slot: int = -1  # of the cache
    n_prefilled: int = 0  # tokens of the prompt that are scheduled or in the cache
    n_scheduled: int = 0  # generated tokens, scheduled
    n_received: int = 0  # generated tokens, received
    n_pauses: int = 0  # committed, as far as received
    tail: bytes = b""  # last bytes of the text: a stop text may begin in them
