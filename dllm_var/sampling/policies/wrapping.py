"""Policies around another one: they leave a block early, or let the other see one part of it at a time."""

import math
from abc import abstractmethod
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.sampling.policies.base import (
    BlockView,
    ConfidenceThreshold,
    Decision,
    State,
    UnmaskingPolicy,
    mean_where,
)
from dllm_var.sampling.policies.committing import ONE_AT_A_TIME, FixedSteps


@dataclass(eq=False)
class SubBlocks(UnmaskingPolicy):
    """Fills a block from left to right in parts of equal length, each by another policy (Fast-dLLM v2, 2509.26328).

    Args:
        base: Policy that fills a part; `ConfidenceThreshold(0.9)` when None. It counts the steps of the whole block.
        length: Positions of a part, counted from where the block begins.
        first_alone: Whether a block's first step commits its first position and no other. The released code takes this
            token from the forward that stores the block before, so that every later forward sees it.
    """

    base: UnmaskingPolicy | None = None
    length: int = 8
    first_alone: bool = False

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "length")
        self.base = self.base or ConfidenceThreshold()
        self.scores_committed = self.base.scores_committed

    def initial_state(self, block_length: int) -> State:
        assert self.base is not None
        return self.base.initial_state(block_length)

    def decide(self, view: BlockView, state: State) -> Decision:
        assert self.base is not None
        place = torch.arange(view.masked.size(1), device=view.masked.device)
        leftmost = view.masked.int().argmax(dim=1, keepdim=True)
        part = place // self.length == leftmost // self.length  # [R, K]
        seen = copy(view)
        seen.masked, seen.changeable = view.masked & part, view.changeable & part
        decision = self.base.decide(seen, state)
        decision.commit = decision.commit & part
        if decision.finish_block is not None:
            decision.commit, decision.finish_block = decision.commit | (part & decision.finish_block[:, None]), None
        scores = view.confidence if decision.scores is None else decision.scores
        decision.scores = scores.masked_fill(~part, -torch.inf)
        if self.first_alone:
            alone = (view.masked[:, 0] & (view.step == 0))[:, None]
            decision.commit = torch.where(alone, place == 0, decision.commit)
        return decision


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
        share = 1 - view.masked.sum(dim=1) / view.changeable.sum(dim=1).clamp_min(1)
        decision.finish_block = mean_where(view.logit_margin, view.masked) >= self.threshold(share)
        return decision


@dataclass(eq=False)
class Prophet(_EarlyExit):
    """Fills what is left of a block once the mean logit margin of its masked positions is large enough (2508.19982).

    The threshold falls with the share of the block that is committed: `high` below 0.33, `middle` below 0.67, `low`
    after. The released code instead takes the margins of a few answer positions that the caller must know (the five
    behind a forced "The answer is"), and its progress is (step + 1) / steps of a number of steps fixed in advance.

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

    The threshold is low + (high - low) f(t); t is the share of the block that is committed. The released code decodes
    in a fixed number of steps and has t = step / (steps - 1) instead.

    Args:
        base: Policy of the steps before; one token per step when None.
        high: Threshold at the beginning of a block.
        low: Threshold at its end.
        shape: How the threshold falls: `cosine` f = (1 + cos pi t) / 2, `linear` f = 1 - t or `exponential`
            f = exp(-rate t), which does not quite reach `low`.
        rate: Rate of the exponential shape; the paper tries 2, 4, 8 and 16.
    """

    high: float = 7.5
    low: float = 2.5
    shape: Literal["cosine", "linear", "exponential"] = "cosine"
    rate: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_words()
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
