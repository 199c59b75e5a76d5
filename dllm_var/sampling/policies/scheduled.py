"""Policies that commit a given number of positions per step, and two that leave such a schedule early."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.objectives.base import KeyedNoise
from dllm_var.sampling.policies.base import (
    BlockView,
    Decision,
    State,
    UnmaskingPolicy,
    mean_where,
    top_n,
)

ONE_AT_A_TIME = 1 << 30  # steps; no block has as many positions, so that each step commits one


@dataclass(eq=False)
class FixedSteps(UnmaskingPolicy):
    """Fills each block in a fixed number of steps, the best-scored positions first (LLaDA 2502.09992, section 2.4).

    A block of K positions commits K // steps of them at each step, and one more at each of the first K % steps.

    Args:
        steps: Denoising steps per block; a block shorter than this takes one step per position.
        score: What makes a position good: `confidence`, `margin` (p1 - p2), `entropy` (low is good) or `random`.
        seed: Seed of the `random` score.
    """

    steps: int = 8
    score: Literal["confidence", "margin", "entropy", "random"] = "confidence"
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "steps")

    def decide(self, view: BlockView, state: State) -> Decision:
        positions = view.changeable.sum(dim=1)
        due = positions // self.steps + (view.step < positions % self.steps)
        scores = self._scores(view)
        return Decision(commit=top_n(scores, view.masked, due.clamp_min(1)), scores=scores)

    def _scores(self, view: BlockView) -> Tensor:
        if self.score == "confidence":
            return view.confidence
        if self.score == "entropy":
            return -view.entropy
        if self.score == "margin":
            return view.probability_margin
        return KeyedNoise(self.seed).uniform(view.key, view.tokens.size(1), stream=3)


@dataclass(eq=False)
class Sequential(UnmaskingPolicy):
    """Commits the leftmost masked positions, `count` of them per step."""

    count: int = 1

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "count")

    def decide(self, view: BlockView, state: State) -> Decision:
        return Decision(commit=view.masked & (view.masked.cumsum(dim=1) <= self.count))


@dataclass(eq=False)
class FirstHitting(UnmaskingPolicy):
    """Commits one random masked position per step, at the time the first of them would unmask (BD3-LM 2503.09573).

    That time falls by u^(1 / masked) per step (first-hitting sampler, 2409.02908); models without a time input do not
    read it, so only the order is left of it: uniform over what is masked, and drawn with `seed`.
    """

    seed: int = 0

    def decide(self, view: BlockView, state: State) -> Decision:
        scores = KeyedNoise(self.seed).uniform(view.key, view.tokens.size(1), stream=4)
        one = view.masked.any(dim=1).long()
        return Decision(commit=top_n(scores, view.masked, one), scores=scores)


@dataclass(eq=False)
class _EarlyExit(UnmaskingPolicy):
    """Fills what is left of a block once the mean logit margin of its masked positions reaches a threshold.

    The margin is top-1 minus top-2 logit; `threshold` gives the bar for the share of each block that is committed [R].
    """

    base: UnmaskingPolicy | None = None

    def __post_init__(self) -> None:
        self.base = self.base or FixedSteps(steps=ONE_AT_A_TIME)

    @abstractmethod
    def threshold(self, share: Tensor) -> Tensor: ...

    def initial_state(self, block_length: int) -> State:
        assert self.base is not None
        return self.base.initial_state(block_length)

    def decide(self, view: BlockView, state: State) -> Decision:
        assert self.base is not None
        decision = self.base.decide(view, state)
        decision.finish_block = mean_where(view.logit_margin, view.masked) >= self.threshold(view.block_share)
        return decision


@dataclass(eq=False)
class Prophet(_EarlyExit):
    """Fills what is left of a block once the mean logit margin of its masked positions is large enough (2508.19982).

    The threshold falls with the share of the block that is committed: `high` below 0.33, `middle` below 0.67, `low`
    after. The released code fills a whole canvas at once, as this does with `FixedLengthSampler` and no block length.
    It differs in two things: its margin is the mean over a few answer positions that the caller must know (the five
    behind a forced "The answer is"), committed ones included; and its progress is (step + 1) / steps of a number of
    steps fixed in advance, with one token per step one token ahead of the share here.

    Args:
        base: Policy of the steps before; one token per step when None.
        high: Threshold in the first third of a block.
        middle: Threshold in its second third.
        low: Threshold in its last third.
    """

    high: float = 7.5
    middle: float = 5.0
    low: float = 2.5

    def threshold(self, share: Tensor) -> Tensor:
        return torch.where(share < 0.33, self.high, torch.where(share < 0.67, self.middle, self.low))


@dataclass(eq=False)
class SchED(_EarlyExit):
    """As Prophet with a smooth threshold, and only if no masked prediction changed since the last step (2512.02892).

    The threshold is low + (high - low) f(t); t is the share of the block that is committed. The released code, which
    decodes a whole canvas in a fixed number of steps, has t = step / (steps - 1) instead.

    Args:
        base: Policy of the steps before; one token per step when None.
        high: Threshold at the beginning of a block.
        low: Threshold at its end.
        shape: How the threshold falls: `cosine` f = (1 + cos pi t) / 2, `linear` f = 1 - t or `exponential`
            f = exp(-rate t), which does not quite reach `low`.
        rate: Rate of the exponential shape; the paper tries 2, 4, 8 and 16.

    Raises:
        UserError: Unless 0 <= low <= high and rate is above 0.
    """

    high: float = 7.5
    low: float = 2.5
    shape: Literal["cosine", "linear", "exponential"] = "cosine"
    rate: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.low <= self.high and self.rate > 0):
            raise UserError(f"SchED needs 0 <= low <= high and rate > 0, got {self.low}, {self.high} and {self.rate}")

    def initial_state(self, block_length: int) -> State:
        return {**super().initial_state(block_length), "sched_most_likely": torch.full((block_length,), -1)}

    def decide(self, view: BlockView, state: State) -> Decision:
        decision = super().decide(view, state)
        assert decision.finish_block is not None
        changed = view.masked & (view.most_likely != state["sched_most_likely"])
        decision.finish_block &= ~changed.any(dim=1)
        state["sched_most_likely"].copy_(view.most_likely)
        return decision

    def threshold(self, share: Tensor) -> Tensor:
        if self.shape == "linear":
            fall = 1 - share
        elif self.shape == "exponential":
            fall = torch.exp(-self.rate * share)
        else:
            fall = (1 + torch.cos(math.pi * share)) / 2
        return self.low + (self.high - self.low) * fall
