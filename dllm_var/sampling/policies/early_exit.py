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
    """Fills what is left by argmax once the mean logit margin of the masked positions is large enough (2508.19982).

    The margin is top-1 minus top-2 logit; the threshold falls with the share of the block that is committed: `high`
    below a third, `middle` below two thirds, `low` after.

    Args:
        base: Policy of the steps before; one token per step when null.
        high: Threshold at the beginning of a block.
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

    Args:
        base: Policy of the steps before; one token per step when null.
        high: Threshold at the beginning of a block.
        low: Threshold at its end.
        shape: How it falls with the share t of the block that is committed: `cosine`, which is
            low + (high - low) (1 + cos pi t) / 2, `linear`, or `exponential` high (low / high)^t.

    Raises:
        UserError: Unless 0 < low <= high.
    """

    def __init__(
        self,
        base: UnmaskingPolicy | None = None,
        high: float = 7.5,
        low: float = 2.5,
        shape: Literal["cosine", "linear", "exponential"] = "cosine",
    ) -> None:
        if not 0 < low <= high:
            raise UserError(f"SchED needs 0 < low <= high, got {low} and {high}")
        self.base: UnmaskingPolicy = base if base is not None else FixedSteps(steps=1 << 30)
        self.high, self.low, self.shape = high, low, shape

    def initial_state(self, block_length: int) -> State:
        return {**self.base.initial_state(block_length), "sched_predicted": torch.full((block_length,), -1)}

    def decide(self, view: BlockView, state: State) -> Decision:
        decision = self.base.decide(view, state)
        changed = view.masked & (view.predicted != state["sched_predicted"])
        sure = mean_where(view.logit_margin, view.masked) >= self._threshold(view.block_share)
        decision.finish_block = sure & ~changed.any(dim=1)
        state["sched_predicted"].copy_(view.predicted)
        return decision

    def _threshold(self, share: Tensor) -> Tensor:
        if self.shape == "linear":
            return self.high - (self.high - self.low) * share
        if self.shape == "exponential":
            return self.high * (self.low / self.high) ** share
        return self.low + (self.high - self.low) * (1 + torch.cos(math.pi * share)) / 2
