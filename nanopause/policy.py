"""Policies decide when generation pauses.

A policy offers a number of pauses after the prompt and after every generated token. The engine computes them in the
same step as the token before them (fused with the decode step). The policy then decides, from the logits without
pauses, which sequences commit them and sample from the logits after the pauses; for the others they are rolled back.
All of it runs on the device, for all sequences of a batch at once.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanopause.errors import UserError, check, check_whole


class Policy:
    """Interface between the engine and a policy. All counts are pauses per sequence. repr(policy) must show every
    setting: a CUDA graph is used again for equal ones."""

    at_prompt = 0  # offered after the prompt
    per_token = 0  # offered after every generated token
    budget = 0  # maximum number of committed pauses
    certain = False  # the pauses are always committed
    asks = False  # the model can request pauses by sampling <|pause|>

    def wants(self, logprobs: Tensor, requests: Tensor | None) -> Tensor:
        """Mask of the sequences that pause before their next token, bool [n].

        logprobs: float32 [n, V], of the next text token, without pauses. requests: bool [n], sequences that
        sampled <|pause|>; None unless `self.asks`."""
        return torch.ones_like(logprobs[:, 0], dtype=torch.bool)

    def observe(self, gain: Tensor, paused: Tensor) -> None:
        """Called after sampling. gain: float [n], increase of the sampled token's log-probability by the pauses, in
        nats; valid where `paused`, bool [n]."""

    def is_off(self) -> Tensor | bool:
        """Whether the policy has stopped pausing, bool []."""
        return False

    def tensors(self) -> list[Tensor]:
        """The policy's measurements, updated in place."""
        return []

    def to(self, device: torch.device) -> None:
        """Move the measurements to a device."""

    def check_attention(self, attention: str) -> None:
        """Raises UserError if no pauses would remain: a prompt of a prefix-LM cannot attend to pauses that may be
        rolled back, so only pauses after generated tokens are left."""
        if attention == "prefix" and self.at_prompt and not (self.certain or self.per_token):
            raise UserError("pauses after the prompt cannot be rolled back where the prompt attends to them: "
                            "use attention=causal or a policy that always commits them")  # fmt: skip


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
    """`pauses` pauses before a token if the highest next-token probability is below `threshold`; at most `budget`
    pauses per text."""

    threshold: float
    pauses: int
    budget: int = 1000

    def __post_init__(self):
        check("threshold", self.threshold, 0, 1)
        check_whole("pauses", self.pauses, 1, 2**31)
        check_whole("budget", self.budget, 0, 2**31)
        self.at_prompt = self.per_token = self.pauses

    def wants(self, logprobs, requests):
        return logprobs.amax(-1).exp() < self.threshold


@dataclass
class OnRequest(Policy):
    """`pauses` pauses where the model samples <|pause|>, at most `budget` per text; a text token follows them.

    For models that were trained with a loss on pauses or prompted with pauses: others never sample <|pause|>.
    """

    pauses: int
    budget: int = 1000
    asks = True

    def __post_init__(self):
        check_whole("pauses", self.pauses, 1, 2**31)
        check_whole("budget", self.budget, 0, 2**31)
        self.at_prompt = self.per_token = self.pauses

    def wants(self, logprobs, requests):
        return requests


@dataclass(eq=False)  # instances hold measurements, so equal settings do not make them equal
class StopWhenUseless(Policy):
    """Turns a policy off, for all later texts, once its pauses no longer change the log-probabilities.

    Each use of pauses is measured by |log p(token | pauses) − log p(token | no pauses)|, where token is the one sampled
    after them. The policy is turned off when, after at least `min_count` measurements, mean + z · standard deviation /
    √count < `min_change` nats. The test is repeated at every step, hence the high z. It measures the size of the
    change, not whether it is an improvement. On a GPU it also measures the steps that were scheduled before a text of
    `until` was seen. It is never `certain`, as it may turn pauses off: prompts cannot attend to them in a prefix-LM,
    and pauses after a prompt that do not fit into the context are left out.
    """

    policy: Policy
    min_change: float = 0.01
    min_count: int = 50
    z: float = 3.0

    def __post_init__(self):
        if not isinstance(self.policy, Policy):
            raise UserError(f"policy={self.policy!r} must be a policy, such as AfterPrompt(10)")
        check("min_change", self.min_change, 0, 1e6)
        check_whole("min_count", self.min_count, 2, 2**31)
        self.at_prompt, self.per_token = self.policy.at_prompt, self.policy.per_token
        self.budget, self.asks = self.policy.budget, self.policy.asks
        self.sums = torch.zeros(3, dtype=torch.float64)  # of 1, change and change²

    def to(self, device):
        self.sums = self.sums.to(device)
        self.policy.to(device)

    def _mean_and_bound(self) -> tuple[Tensor, Tensor]:
        """The mean change in nats, and the half-width of its confidence interval."""
        count = self.sums[0].clamp(min=1)
        mean = self.sums[1] / count
        variance = (self.sums[2] / count - mean**2).clamp(min=0) * count / (count - 1).clamp(min=1)
        return mean, self.z * (variance / count).sqrt()

    def tensors(self):
        return [self.sums, *self.policy.tensors()]

    def is_off(self):
        mean, bound = self._mean_and_bound()
        return self.policy.is_off() | (self.sums[0] >= self.min_count) & (mean + bound < self.min_change)

    def wants(self, logprobs, requests):
        return self.policy.wants(logprobs, requests) & ~self.is_off()

    def observe(self, gain, paused):
        change = torch.where(paused, gain.abs(), 0).double()
        self.sums += torch.stack((paused.sum(), change.sum(), (change**2).sum()))
        self.policy.observe(gain, paused)

    def report(self) -> str:
        """The measurements as one sentence."""
        if not self.sums[0]:
            return "pausing was not measured: no pause"
        mean, bound = (x.item() for x in self._mean_and_bound())
        state = "turned off" if self.is_off() else "left on"
        return (f"pausing {state} after {int(self.sums[0])} times: it changed the log-probability of the next token by "
                f"{mean:.4f} ± {bound:.4f} nats; it is turned off below {self.min_change:g}")  # fmt: skip


@dataclass
class PauseOptions:
    """Command-line options of a policy."""

    pause_when: Literal["after_prompt", "below_confidence", "on_request"] = "after_prompt"
    """Pause after the prompt; before tokens less likely than the threshold; or where the model samples <|pause|>."""
    threshold: float | None = None
    """For below_confidence: pause if no next token has at least this probability. None: 0.5."""
    pause_budget: int | None = None
    """For below_confidence and on_request: maximum number of pauses per text. None: 100."""
    stop_when_useless: bool = False
    """Turn pauses off once they no longer change the log-probabilities. A resumed run measures again from zero."""

    def resolved(self) -> dict[str, str | float | int | bool]:
        """The options, with None replaced by the default. Raises UserError if an option does not apply to
        pause_when."""
        if self.threshold is not None and self.pause_when != "below_confidence":
            raise UserError(f"threshold={self.threshold} is of below_confidence: add --pause_when=below_confidence")
        if self.pause_budget is not None and self.pause_when == "after_prompt":
            raise UserError(f"pause_budget={self.pause_budget} is of below_confidence and on_request: add --pause_when")
        return {"pause_when": self.pause_when, "threshold": 0.5 if self.threshold is None else self.threshold,
                "pause_budget": 100 if self.pause_budget is None else self.pause_budget,
                "stop_when_useless": self.stop_when_useless}  # fmt: skip

    def policy(self, pauses: int) -> Policy:
        """The policy that these options describe, with `pauses` pauses at each place. Raises UserError as `resolved`,
        and if the budget is smaller than `pauses`."""
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
