"""Policies that commit what the model is sure of, each with its own idea of sure."""

from __future__ import annotations

import torch

from dllm_var.errors import UserError
from dllm_var.sampling.arrays import arrays, tensors
from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, ranks, top_n


class ConfidenceThreshold(UnmaskingPolicy):
    """Commits every masked position whose confidence exceeds the threshold (dLLM-Var 2510.24605, Fast-dLLM 2505.22618).

    Args:
        threshold: Confidence to exceed, in [0, 1]; LLaDA2 uses 0.95.
        decay: Multiplies the threshold at each further step of a block, in [0, 1]. Below 1 a block takes few steps: the
            first step's sure tokens decide much of what the others are, so that these may follow at less confidence.

    Raises:
        UserError: Unless both are in [0, 1].
    """

    def __init__(self, threshold: float = 0.9, decay: float = 1.0) -> None:
        for name, value in (("threshold", threshold), ("decay", decay)):
            if not 0 <= value <= 1:
                raise UserError(f"ConfidenceThreshold.{name} must be in [0, 1], got {value}")
        self.threshold, self.decay = threshold, decay

    def decide(self, view: BlockView, state: State) -> Decision:
        if self.decay == 1:
            return Decision(commit=view.masked & (view.confidence > self.threshold))
        _, step, masked, confidence = arrays(view.step, view.masked, view.confidence)
        thresholds = self.threshold * self.decay**step  # [R]
        return Decision(*tensors(masked & (confidence > thresholds[:, None])))


class ConfidenceFactor(UnmaskingPolicy):
    """Commits the longest run, most confident first, in which the n-th confidence is at least 1 - factor / (n + 1).

    The more tokens are committed at once, the surer each must be (Fast-dLLM 2505.22618, section 3.3).

    Args:
        factor: Above 0; larger commits more.

    Raises:
        UserError: Unless the factor is above 0.
    """

    def __init__(self, factor: float = 1.0) -> None:
        if factor <= 0:
            raise UserError(f"ConfidenceFactor.factor must be above 0, got {factor}")
        self.factor = factor

    def decide(self, view: BlockView, state: State) -> Decision:
        ordered = view.confidence.masked_fill(~view.masked, -1.0).sort(dim=1, descending=True).values
        place = torch.arange(1, ordered.size(1) + 1, device=ordered.device)
        run = (ordered >= 1 - self.factor / (place + 1)) & (ordered >= 0)
        counts = run.cumprod(dim=1).sum(dim=1).clamp_min(1)
        return Decision(commit=top_n(view.confidence, view.masked, counts))


class EntropyThreshold(UnmaskingPolicy):
    """Commits every masked position whose entropy is at most the threshold (dParallel 2509.26488).

    Args:
        threshold: Entropy in nats, at least 0.

    Raises:
        UserError: When the threshold is negative.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        if threshold < 0:
            raise UserError(f"EntropyThreshold.threshold must be at least 0 nats, got {threshold}")
        self.threshold = threshold

    def decide(self, view: BlockView, state: State) -> Decision:
        return Decision(commit=view.masked & (view.entropy <= self.threshold))


class EntropyBounded(UnmaskingPolicy):
    """Commits positions from the lowest entropy up while their entropies add up to less than gamma (2505.24857).

    Args:
        gamma: Bound in nats, at least 0; at least one position is committed in any case.

    Raises:
        UserError: When gamma is negative.
    """

    def __init__(self, gamma: float = 0.35) -> None:
        if gamma < 0:
            raise UserError(f"EntropyBounded.gamma must be at least 0 nats, got {gamma}")
        self.gamma = gamma

    def decide(self, view: BlockView, state: State) -> Decision:
        ordered = view.entropy.masked_fill(~view.masked, torch.inf).sort(dim=1).values
        counts = (ordered.cumsum(dim=1) < self.gamma).sum(dim=1).clamp_min(1)
        return Decision(commit=top_n(-view.entropy, view.masked, counts))


class CoherentCandidates(UnmaskingPolicy):
    """Commits candidates that stay the same from step to step; otherwise the best n (CCD-DS, 2512.02044).

    Positions are ranked by low entropy. After a warm-up, the best V of this step (V grows by 1 per step up to 1 + 4n,
    and is 1 again when a tenth of the block or less is masked) that were also among the last step's candidates, with
    the same predicted token, are committed if there are at least n of them.

    Args:
        count: n, the number committed when nothing better is known.
        warmup_steps: First steps of each block that commit the best n.

    Raises:
        UserError: When count is below 1 or warmup_steps negative.
    """

    def __init__(self, count: int = 1, warmup_steps: int = 5) -> None:
        if count < 1 or warmup_steps < 0:
            raise UserError(f"CoherentCandidates needs count >= 1, warmup_steps >= 0, got {count}, {warmup_steps}")
        self.count, self.warmup_steps = count, warmup_steps

    def initial_state(self, block_length: int) -> State:
        return {
            "candidates": torch.zeros(block_length, dtype=torch.bool),
            "predicted": torch.full((block_length,), -1),
            "size": torch.ones((), dtype=torch.long),
        }

    def decide(self, view: BlockView, state: State) -> Decision:
        place = ranks(-view.entropy, view.masked)
        best = (place < self.count) & view.masked
        candidates = (place < state["size"][:, None]) & view.masked
        same = candidates & state["candidates"] & (view.predicted == state["predicted"])
        coherent = (best & state["candidates"]).any(dim=1) & (same.sum(dim=1) >= self.count)
        use = coherent & (view.step >= self.warmup_steps)
        few_left = view.masked.sum(dim=1) * 10 <= view.changeable.sum(dim=1)
        grown = (state["size"] + 1).clamp_max(1 + 4 * self.count)
        state["candidates"].copy_(candidates)
        state["predicted"].copy_(view.predicted)
        state["size"].copy_(torch.where(few_left, 1, grown))
        return Decision(commit=torch.where(use[:, None], same, best))
