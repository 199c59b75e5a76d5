"""Policies that only commit: what the model is sure of, or a given number of positions per step."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from dllm_var.errors import UserError
from dllm_var.objectives.base import KeyedNoise
from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, mean_where, ranks, top_n

ONE_AT_A_TIME = 1 << 30  # steps; no block has as many positions, so that each step commits one


@dataclass(eq=False)
class ConfidenceFactor(UnmaskingPolicy):
    """Commits the longest run, most confident first, in which the n-th confidence is at least 1 - factor / (n + 1).

    The more tokens are committed at once, the surer each must be (Fast-dLLM 2505.22618, section 3.3). The released code
    also commits a block's last masked position when only that one falls short.

    Args:
        factor: Above 0; larger commits more.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            self.refuse("factor", "above 0")

    def decide(self, view: BlockView, state: State) -> Decision:
        ordered = view.confidence.masked_fill(~view.masked, -1.0).sort(dim=1, descending=True).values
        place = torch.arange(1, ordered.size(1) + 1, device=ordered.device)
        run = (ordered >= 1 - self.factor / (place + 1)) & (ordered >= 0)
        counts = run.cumprod(dim=1).sum(dim=1).clamp_min(1)
        return Decision(commit=top_n(view.confidence, view.masked, counts))


@dataclass(eq=False)
class EntropyThreshold(UnmaskingPolicy):
    """Commits every masked position whose entropy is at most the threshold (dParallel 2509.26488).

    Where there is none, the position of least entropy is committed.

    Args:
        threshold: Entropy in nats, at least 0.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        self.check_range(0, math.inf, "threshold")

    def decide(self, view: BlockView, state: State) -> Decision:
        return Decision(commit=view.masked & (view.entropy <= self.threshold), scores=-view.entropy)


@dataclass(eq=False)
class EntropyBounded(UnmaskingPolicy):
    """Commits the positions of least entropy whose entropies, without the largest, add up to at most gamma.

    That sum bounds the error of filling the positions independently (EB-Sampler, 2505.24857, section 3).

    Args:
        gamma: Bound in nats, at least 0; a single position is always within it.
    """

    gamma: float = 0.35

    def __post_init__(self) -> None:
        self.check_range(0, math.inf, "gamma")

    def decide(self, view: BlockView, state: State) -> Decision:
        ordered = view.entropy.masked_fill(~view.masked, torch.inf).sort(dim=1).values
        without_largest = pad(ordered, (1, -1)).cumsum(dim=1)  # at place n: the sum of the n least
        counts = (without_largest <= self.gamma).sum(dim=1)
        return Decision(commit=top_n(-view.entropy, view.masked, counts), scores=-view.entropy)


@dataclass(eq=False)
class CoherentCandidates(UnmaskingPolicy):
    """Commits candidates that stay the same from step to step; otherwise the best n (CCD-DS, 2512.02044).

    Positions are ranked by low entropy. Each step remembers as candidates the best V positions that it leaves masked.
    A step after the warm-up commits those of its own best V that are candidates and whose most likely token is still
    the same, if there are at least n of them and one of the best n is a candidate; else it commits the best n. V is 1
    until the last step of the warm-up, which makes it 2; each further step adds 1, up to 5n; while at most a tenth of
    the block is masked, V is 2.

    Args:
        count: n, the number committed when nothing better is known.
        warmup_steps: First steps of each block that commit the best n.
    """

    count: int = 1
    warmup_steps: int = 5

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "count")
        self.check_range(0, math.inf, "warmup_steps")

    def initial_state(self, block_length: int) -> State:
        return {
            "candidates": torch.zeros(block_length, dtype=torch.bool),
            "most_likely": torch.full((block_length,), -1),
            "size": torch.ones((), dtype=torch.long),
        }

    def decide(self, view: BlockView, state: State) -> Decision:
        few_left = view.masked.sum(dim=1) * 10 <= view.changeable.sum(dim=1)
        grown = (torch.where(few_left, 1, state["size"]) + 1).clamp_max(5 * self.count)
        size = torch.where(view.step >= max(self.warmup_steps - 1, 1), grown, 1)
        place = ranks(-view.entropy, view.masked)
        best = (place < self.count) & view.masked
        was_candidate = state["candidates"] & view.masked
        same = was_candidate & (place < size[:, None]) & (view.most_likely == state["most_likely"])
        coherent = (best & was_candidate).any(dim=1) & (same.sum(dim=1) >= self.count)
        commit = torch.where((coherent & (view.step >= self.warmup_steps))[:, None], same, best)
        state["candidates"].copy_(top_n(-view.entropy, view.masked & ~commit, size))
        state["most_likely"].copy_(view.most_likely)
        state["size"].copy_(size)
        return Decision(commit=commit, scores=-view.entropy)


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
        self.check_words()
        self.check_range(1, math.inf, "steps")

    def decide(self, view: BlockView, state: State) -> Decision:
        positions = view.changeable.sum(dim=1)
        due = positions // self.steps + (view.step < positions % self.steps)
        if self.score == "confidence":
            scores = view.confidence
        elif self.score == "entropy":
            scores = -view.entropy
        elif self.score == "margin":
            scores = view.probability_margin
        else:
            scores = KeyedNoise(self.seed).uniform(view.key, view.tokens.size(1), stream=3)
        return Decision(commit=top_n(scores, view.masked, due.clamp_min(1)), scores=scores)


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
    """Commits one random masked position per step: the first-hitting sampler (2409.02908, BD3-LM 2503.09573).

    The time that the sampler draws for each step matters only to models that read a time, which these do not.
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
