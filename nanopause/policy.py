"""When to pause. What pauses are is pauses.py; what they cost is the engine's step.

A policy says how many pauses follow the prompt and how many ride along with every token; the engine reads them in the
same step, and the policy then says, from what the model would say without them, whether they count. If not, they are
taken back. All of it happens on the device, for all sequences of a batch at once. (On a CPU the policy may be asked
first, and pauses that do not count are then not read.)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanopause.errors import UserError, check, check_whole


class Policy:
    """What the engine asks. The numbers are pauses of one sequence."""

    at_prompt = 0  # behind the prompt
    per_token = 0  # behind every token that the model wrote
    budget = 0  # kept, in all
    certain = False  # kept whatever the model would say without them
    asks = False  # the model may say <|pause|> itself

    def wants(self, logprobs: Tensor, asks: Tensor | None) -> Tensor:
        """Which sequences pause before their next token, bool [n].

        logprobs: float32 [n, V], of the text that may come next, without pauses. asks: bool [n], where the model would
        say <|pause|>; None unless `asks` is set."""
        return torch.ones_like(logprobs[:, 0], dtype=torch.bool)

    def observe(self, gain: Tensor, paused: Tensor) -> None:
        """gain: float [n], by how many nats the pauses raised the log-probability of what was said after them; it
        counts where `paused`, bool [n]."""

    def is_off(self) -> Tensor | bool:
        """Whether it has stopped pausing, bool []."""
        return False

    def tensors(self) -> list[Tensor]:
        """What it measures."""
        return []

    def to(self, device: torch.device) -> None:
        """Move what it measures to a device."""

    def check_attention(self, attention: str) -> None:
        """Raises UserError where a prompt would read pauses that may be taken back."""
        if attention == "prefix" and self.at_prompt and not (self.certain or self.per_token):
            raise UserError("pauses after the prompt cannot be taken back where the prompt reads them: "
                            "use attention=causal or a policy that keeps them")  # fmt: skip


@dataclass
class Never(Policy):
    """No pauses."""


@dataclass
class AfterPrompt(Policy):
    """`pauses` pauses after the prompt [Goyal et al. 2023, Algorithm 3]."""

    pauses: int
    certain = True

    def __post_init__(self):
        check_whole("pauses", self.pauses, 0, 2**31)
        self.at_prompt = self.budget = self.pauses


@dataclass
class BelowConfidence(Policy):
    """`pauses` pauses before a token whose highest probability is below `threshold`, at most `budget` pauses a text."""

    threshold: float
    pauses: int
    budget: int = 1000

    def __post_init__(self):
        check("threshold", self.threshold, 0, 1)
        check_whole("pauses", self.pauses, 1, 2**31)
        check_whole("budget", self.budget, 0, 2**31)
        self.at_prompt = self.per_token = self.pauses

    def wants(self, logprobs, asks):
        return logprobs.amax(-1).exp() < self.threshold


@dataclass
class OnRequest(Policy):
    """`pauses` pauses where the model says <|pause|>, at most `budget` pauses a text; after them it says text.

    For models whose training had a loss on pauses, or that were prompted with them: others never ask.
    """

    pauses: int
    budget: int = 1000
    asks = True

    def __post_init__(self):
        check_whole("pauses", self.pauses, 1, 2**31)
        check_whole("budget", self.budget, 0, 2**31)
        self.at_prompt = self.per_token = self.pauses

    def wants(self, logprobs, asks):
        return asks


@dataclass(eq=False)  # it measures: two of them are not the same
class StopWhenUseless(Policy):
    """A policy that is turned off, for all texts that follow, once it is clear that its pauses change nothing.

    Every pause is measured by |log p(said | pauses) − log p(said | none)|, said being the token said after them, and
    stops when after `min_count` measures their mean is below `min_change` nats with confidence: mean + z · standard
    deviation / √count < min_change. It is looked at every time, hence the high z. Whether a change is for the better,
    this cannot know. Pauses after the prompt that have no room are left out.
    """

    policy: Policy
    min_change: float = 0.01
    min_count: int = 50
    z: float = 3.0

    def __post_init__(self):
        check("min_change", self.min_change, 0, 1e6)
        check_whole("min_count", self.min_count, 2, 2**31)
        self.at_prompt, self.per_token = self.policy.at_prompt, self.policy.per_token
        self.budget, self.asks = self.policy.budget, self.policy.asks
        self.sums = torch.zeros(3, dtype=torch.float64)  # of 1, change and change²

    def to(self, device):
        self.sums = self.sums.to(device)
        self.policy.to(device)

    def _mean_and_bound(self) -> tuple[Tensor, Tensor]:
        """The mean change, and by how much it may be off."""
        count = self.sums[0].clamp(min=1)
        mean = self.sums[1] / count
        variance = (self.sums[2] / count - mean**2).clamp(min=0) * count / (count - 1).clamp(min=1)
        return mean, self.z * (variance / count).sqrt()

    def tensors(self):
        return [self.sums, *self.policy.tensors()]

    def is_off(self):
        mean, bound = self._mean_and_bound()
        return self.policy.is_off() | (self.sums[0] >= self.min_count) & (mean + bound < self.min_change)

    def wants(self, logprobs, asks):
        return self.policy.wants(logprobs, asks) & ~self.is_off()

    def observe(self, gain, paused):
        counts = paused & ~self.is_off()  # once it is off, the figures that turned it off stay
        change = torch.where(counts, gain.abs(), 0).double()
        self.sums += torch.stack((counts.sum(), change.sum(), (change**2).sum()))
        self.policy.observe(gain, paused)

    def report(self) -> str:
        """What was measured, in a sentence."""
        if not self.sums[0]:
            return "pausing was not measured: no pause"
        mean, bound = (x.item() for x in self._mean_and_bound())
        state = "turned off" if self.is_off() else "left on"
        return (f"pausing {state} after {int(self.sums[0])} times: it changed the log-probability of what was said by "
                f"{mean:.4f} ± {bound:.4f} nats; below {self.min_change:g} it is useless")  # fmt: skip


@dataclass
class PauseOptions:
    """What a script lets its user choose."""

    pause_when: Literal["after_prompt", "below_confidence", "on_request"] = "after_prompt"
    """After the prompt; before tokens that are less likely than the threshold; or where the model says <|pause|>."""
    threshold: float | None = None
    """Of below_confidence: the highest probability of a token from which on there is no pause. None: 0.5."""
    pause_budget: int | None = None
    """Of below_confidence and on_request: pauses that a text may have. None: 100."""
    stop_when_useless: bool = False
    """Turn pauses off once it is clear that they change nothing of what the model says. After a break it is measured
    anew."""

    def resolved(self) -> dict[str, str | float | int | bool]:
        """The options, with what None stands for. Raises UserError where one says nothing beside the others."""
        if self.threshold is not None and self.pause_when != "below_confidence":
            raise UserError(f"threshold={self.threshold} is of below_confidence: add --pause_when=below_confidence")
        if self.pause_budget is not None and self.pause_when == "after_prompt":
            raise UserError(f"pause_budget={self.pause_budget} is of below_confidence and on_request: add --pause_when")
        return {"pause_when": self.pause_when, "threshold": 0.5 if self.threshold is None else self.threshold,
                "pause_budget": 100 if self.pause_budget is None else self.pause_budget,
                "stop_when_useless": self.stop_when_useless}  # fmt: skip

    def policy(self, pauses: int) -> Policy:
        """The policy of `pauses` pauses wherever there are any."""
        options = self.resolved()
        threshold, budget = options["threshold"], options["pause_budget"]
        if pauses == 0:
            return Never()
        if self.pause_when != "after_prompt" and pauses > budget:
            raise UserError(f"pause_budget={budget} is less than the {pauses} pauses of one place: raise it")
        if self.pause_when == "after_prompt":
            policy = AfterPrompt(pauses)
        elif self.pause_when == "below_confidence":
            policy = BelowConfidence(threshold, pauses, budget)
        else:
            policy = OnRequest(pauses, budget)
        return StopWhenUseless(policy) if self.stop_when_useless else policy
