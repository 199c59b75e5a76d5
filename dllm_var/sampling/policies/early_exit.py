"""Policies that fill the rest of the block at once when the model has made up its mind."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, mean_where
from dllm_var.sampling.policies.fixed_steps import FixedSteps


class Prophet(UnmaskingPolicy):
    """Fills what is left of a block once the mean logit margin of its masked positions is large enough (2508.19982).

    The margin is top-1 minus top-2 logit; the threshold falls with the share of the block that is committed: `high`
    below 0.33, `middle` below 0.67, `low` after. The released code fills a whole canvas at once, as this does with
    `FixedLengthSampler` and no block length. It differs in two things: its margin is the mean over a few answer
    positions that the caller must know (the five behind a forced "The answer is"), committed ones included; and its
    progress is (step + 1) / steps of a number of steps fixed in advance, with one token per step one token ahead of the
    share here.

    Args:
        base: Policy of the steps before; one token per step when None.
        high: Threshold in the first third of a block.
        middle: Threshold in its second third.
        low: Threshold in its last third.
    """

    def __init__(
        self, base: UnmaskingPolicy | None = None, high: float = 7.5, middle: float = 5.0, low: float = 2.5
    ) -> None:
        self.base: UnmaskingPolicy = base if base is not None else FixedSteps(steps=1 << 30)
        self.high, self.middle, self.low = high, middle, low

    def initial_state(self, block_length: int) -> State:
        return self.base.initial_state(block_length)

    def decide(self, view: BlockView, state: State) -> Decision:
        decision = self.base.decide(view, state)
        share = view.block_share
        threshold = torch.where(share < 0.33, self.high, torch.where(share < 0.67, self.middle, self.low))
        decision.finish_block = mean_where(view.logit_margin, view.masked) >= threshold
        return decision


class SchED(UnmaskingPolicy):
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

    def __init__(
        self,
        base: UnmaskingPolicy | None = None,
        high: float = 7.5,
        low: float = 2.5,
        shape: Literal["cosine", "linear", "exponential"] = "cosine",
        rate: float = 4.0,
    ) -> None:
        if not (0 <= low <= high and rate > 0):
            raise UserError(f"SchED needs 0 <= low <= high and rate > 0, got {low}, {high} and {rate}")
        self.base: UnmaskingPolicy = base if base is not None else FixedSteps(steps=1 << 30)
        self.high, self.low, self.shape, self.rate = high, low, shape, rate

    def initial_state(self, block_length: int) -> State:
        return {**self.base.initial_state(block_length), "sched_most_likely": torch.full((block_length,), -1)}

    def decide(self, view: BlockView, state: State) -> Decision:
        decision = self.base.decide(view, state)
        changed = view.masked & (view.most_likely != state["sched_most_likely"])
        sure = mean_where(view.logit_margin, view.masked) >= self._threshold(view.block_share)
        decision.finish_block = sure & ~changed.any(dim=1)
        state["sched_most_likely"].copy_(view.most_likely)
        return decision

    def _threshold(self, share: Tensor) -> Tensor:
        if self.shape == "linear":
            fall = 1 - share
        elif self.shape == "exponential":
            fall = torch.exp(-self.rate * share)
        else:
            fall = (1 + torch.cos(math.pi * share)) / 2
        return self.low + (self.high - self.low) * fall
