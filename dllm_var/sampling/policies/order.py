"""Policies that fix the order in advance."""

from __future__ import annotations

from dllm_var.errors import UserError
from dllm_var.objectives.base import KeyedNoise
from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, top_n


class Sequential(UnmaskingPolicy):
    """Commits the leftmost masked positions.

    Args:
        count: How many per step.

    Raises:
        UserError: When count is below 1.
    """

    def __init__(self, count: int = 1) -> None:
        if count < 1:
            raise UserError(f"Sequential.count must be at least 1, got {count}")
        self.count = count

    def decide(self, view: BlockView, state: State) -> Decision:
        return Decision(commit=view.masked & (view.masked.cumsum(dim=1) <= self.count))


class FirstHitting(UnmaskingPolicy):
    """Commits one random masked position per step, at the time the first of them would unmask (BD3-LM 2503.09573).

    That time falls by u^(1 / masked) per step (first-hitting sampler, 2409.02908); models without a time input do not
    read it, so only the order is left of it: uniform over what is masked.

    Args:
        seed: Seed of the order.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def decide(self, view: BlockView, state: State) -> Decision:
        scores = KeyedNoise(self.seed).uniform(view.key, view.tokens.size(1), stream=4)
        one = view.masked.any(dim=1).long()
        return Decision(commit=top_n(scores, view.masked, one), scores=scores)
