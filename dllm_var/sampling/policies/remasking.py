"""Policies that take committed tokens back or overwrite them."""

import math
from dataclasses import dataclass

import torch

from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, mean_where, top_n


@dataclass(eq=False)
class RunningConfidenceRemasking(UnmaskingPolicy):
    """Commits everything at every step and takes back the least confident, as many as are due later (RCR, 2508.13148).

    Each token keeps the confidence it had when it was committed. After step i of the schedule, which is that of
    `FixedSteps`, as many positions are masked again as the later steps have due, whatever step they come from.

    Args:
        steps: Denoising steps per block.
    """

    steps: int = 8

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "steps")

    def initial_state(self, block_length: int) -> State:
        return {"recorded": torch.zeros(block_length)}

    def decide(self, view: BlockView, state: State) -> Decision:
        recorded = state["recorded"]
        recorded.copy_(torch.where(view.masked, view.confidence, recorded))
        positions = view.changeable.sum(dim=1)
        later = (self.steps - 1 - view.step).clamp_min(0)
        with_one_more = torch.minimum((positions % self.steps - 1 - view.step).clamp_min(0), later)
        taken_back = top_n(-recorded, view.changeable, (positions // self.steps) * later + with_one_more)
        return Decision(commit=view.masked & ~taken_back, remask=taken_back & ~view.masked)


@dataclass(eq=False)
class Saber(UnmaskingPolicy):
    """Commits what beats the mean confidence so far and takes back what lost most since the last step (2510.18165).

    As in the paper, a step commits every masked position above the mean of the confidences with which the tokens that
    are committed now were committed, and then masks those of these tokens again whose probability fell most since the
    last step; none of its own commits, which the released code may take back. As in the released code, at least the
    best n positions are committed, a block's first step commits just these, and min(max(n // 2, ceil(K / 8)), K - 1)
    tokens are masked again unless the block is full. K is the number committed now, but at least n. The paper's number,
    max(1, K // 8), would make no progress where K is 1.

    Args:
        count: The number n.
    """

    scores_committed = True
    count: int = 2

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "count")

    def initial_state(self, block_length: int) -> State:
        return {"recorded": torch.zeros(block_length), "previous": torch.zeros(block_length)}

    def decide(self, view: BlockView, state: State) -> Decision:
        committed = view.changeable & ~view.masked
        now = torch.where(committed, view.probability_of(view.tokens), view.confidence)
        change = now - state["previous"]
        bar = torch.where(committed.any(dim=1), mean_where(state["recorded"], committed), 1.0)
        minimum = torch.full_like(view.step, self.count)
        commit = top_n(now, view.masked, torch.maximum(minimum, (view.masked & (now > bar[:, None])).sum(dim=1)))
        number = commit.sum(dim=1).clamp_min(self.count)
        take_back = torch.minimum((-(-number // 8)).clamp_min(self.count // 2), number - 1)
        full = ~(view.masked & ~commit).any(dim=1)
        remask = top_n(-change, committed, torch.where(full, 0, take_back))
        state["recorded"].copy_(torch.where(commit, now, state["recorded"]))
        state["previous"].copy_(now)
        return Decision(commit=commit, remask=remask)


@dataclass(eq=False)
class RevokableThreshold(UnmaskingPolicy):
    """Commits what is above a threshold, and masks again what is no longer confirmed (WINO, 2507.18578, section 3).

    At most 70 % of the masked positions are committed at a step, where that is between 5 and 20; the bounds are those
    of the released code. A step that commits one position only takes nothing back; another takes back fewer than the
    last one committed, the least confident first. So on the whole every step fills positions, and the block ends.
    `WinoSampler` shows it committed positions as their shadows predict them.
    """

    scores_committed = True
    threshold: float = 0.6
    shadow_threshold: float = 0.9

    def __post_init__(self) -> None:
        self.check_range(0, 1, "threshold", "shadow_threshold")

    def initial_state(self, block_length: int) -> State:
        return {"masked": torch.ones(block_length, dtype=torch.bool)}

    def decide(self, view: BlockView, state: State) -> Decision:
        # What the last step committed, which may be less than was asked for: terminators wait for their left.
        committed_last = (state["masked"] & ~view.masked & view.changeable).sum(dim=1)
        state["masked"].copy_(view.masked)
        sure = view.masked & (view.confidence > self.threshold)
        most = (view.masked.sum(dim=1) * 0.7).long().clamp(5, 20)
        count = torch.minimum(sure.sum(dim=1), most)
        commit = top_n(view.confidence, sure, count)
        shadow = view.probability_of(view.tokens)
        doubtful = view.changeable & ~view.masked & (shadow < self.shadow_threshold)
        may_take_back = torch.where(count > 1, committed_last - 1, 0)
        return Decision(commit=commit, remask=top_n(-shadow, doubtful, may_take_back))


@dataclass(eq=False)
class JointThreshold(UnmaskingPolicy):
    """Commits sure positions and overwrites committed ones that now have another sure token (LLaDA2.1, 2602.08676).

    A full block stays open until nothing is edited any more, for at most `max_edit_steps`.

    Args:
        commit_threshold: Confidence above which a masked position is committed.
        edit_threshold: Confidence above which a committed token is replaced by another.
        max_edit_steps: Steps a full block may still be edited.
    """

    scores_committed = True
    commit_threshold: float = 0.7
    edit_threshold: float = 0.5
    max_edit_steps: int = 16

    def __post_init__(self) -> None:
        self.check_range(0, 1, "commit_threshold", "edit_threshold")
        self.check_range(0, math.inf, "max_edit_steps")

    def initial_state(self, block_length: int) -> State:
        return {"edit_steps": torch.zeros((), dtype=torch.long)}

    def decide(self, view: BlockView, state: State) -> Decision:
        commit = view.masked & (view.confidence > self.commit_threshold)
        committed = view.changeable & ~view.masked
        edit = committed & (view.predicted != view.tokens) & (view.confidence > self.edit_threshold)
        was_full = ~view.masked.any(dim=1)
        state["edit_steps"].add_(was_full.long())
        keep_open = (~was_full | edit.any(dim=1)) & (state["edit_steps"] < self.max_edit_steps)
        return Decision(commit=commit, edit=edit, keep_open=keep_open)
