"""Commit what the model is sure of."""

from __future__ import annotations

from dllm_var.errors import UserError
from dllm_var.sampling.policies.base import BlockView, Decision, State


class ConfidenceThreshold:
    """Commits every masked position whose confidence exceeds the threshold (dLLM-Var 2510.24605, Fast-dLLM 2505.22618).

    Args:
        threshold: Confidence to exceed, in [0, 1]; LLaDA2 uses 0.95.

    Raises:
        UserError: Unless the threshold is in [0, 1].
    """

    def __init__(self, threshold: float = 0.9) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"ConfidenceThreshold.threshold must be in [0, 1], got {threshold}")
        self.threshold = threshold

    def initial_state(self, block_length: int) -> State:
        return {}

    def decide(self, view: BlockView, state: State) -> Decision:
        return Decision(commit=view.masked & (view.confidence > self.threshold))
