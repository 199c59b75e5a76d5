"""Commit a scheduled number of positions per step."""

from __future__ import annotations

from typing import Literal

import torch

from dllm_var.errors import UserError
from dllm_var.objectives.base import KeyedNoise
from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, scheduled, top_n


class FixedSteps(UnmaskingPolicy):
    """Fills each block in a fixed number of steps, the best-scored positions first (LLaDA 2502.09992, section 2.4).

    A block of K positions commits K // steps of them at each step, and one more at each of the first K % steps.

    Args:
        steps: Denoising steps per block; a block shorter than this takes one step per position.
        score: What makes a position good: `confidence`, `margin` (p1 - p2), `entropy` (low is good) or `random`.
        seed: Seed of the `random` score.

    Raises:
        UserError: When steps is below 1.
    """

    def __init__(
        self, steps: int = 8, score: Literal["confidence", "margin", "entropy", "random"] = "confidence", seed: int = 0
    ) -> None:
        if steps < 1:
            raise UserError(f"FixedSteps.steps must be at least 1, got {steps}")
        self.steps, self.score, self.seed = steps, score, seed

    def decide(self, view: BlockView, state: State) -> Decision:
        due = scheduled(view.changeable.sum(dim=1), self.steps, view.step).clamp_min(1)
        scores = self._scores(view)
        return Decision(commit=top_n(scores, view.masked, due), scores=scores)

    def _scores(self, view: BlockView) -> torch.Tensor:
        if self.score == "confidence":
            return view.confidence
        if self.score == "entropy":
            return -view.entropy
        if self.score == "margin":
            return view.probability_margin
        return KeyedNoise(self.seed).uniform(view.key, view.tokens.size(1), stream=3)
