"""Policies that take tokens back or overwrite them."""

from __future__ import annotations

import torch

from dllm_var.errors import UserError
from dllm_var.sampling.policies.base import (
    BlockView,
    Decision,
    State,
    UnmaskingPolicy,
    mean_where,
    scheduled_after,
    top_n,
)


class RunningConfidenceRemasking(UnmaskingPolicy):
    """Commits everything at every step and takes back the least confident, as many as are due later (RCR, 2508.13148).

    Each token keeps the confidence it had when it was committed. After step i of the schedule as many positions are
    masked again as the later steps have due, whatever step they come from. The released code may mask tokens of earlier
    blocks again, too; here a finished block stays.

    Args:
        steps: Denoising steps per block.

    Raises:
        UserError: When steps is below 1.
    """

    def __init__(self, steps: int = 8) -> None:
        if steps < 1:
            raise UserError(f"RunningConfidenceRemasking.steps must be at least 1, got {steps}")
        self.steps = steps

    def initial_state(self, block_length: int) -> State:
        return {"recorded": torch.zeros(block_length)}

    def decide(self, view: BlockView, state: State) -> Decision:
        recorded = state["recorded"]
        recorded.copy_(torch.where(view.masked, view.confidence, recorded))
        due_later = scheduled_after(view.changeable.sum(dim=1), self.steps, view.step)
        taken_back = top_n(-recorded, view.changeable, due_later)
        return Decision(commit=view.masked & ~taken_back, remask=taken_back & ~view.masked)


class Saber(UnmaskingPolicy):
    """Commits what beats the mean confidence so far and takes back what lost most since the last step (2510.18165).

    As in the paper, a step commits every masked position above the mean of the confidences with which the tokens that
    are committed now were committed, and then masks those of these tokens again whose confidence fell most since the
    last step. So a token that is masked again leaves the mean, a step takes back none of its own commits, and the
    confidence of a committed token is that token's probability. The released code keeps tokens masked again in the
    mean, may take back commits of the same step, and measures a committed position by its most likely token.

    As in the released code, at least the best n positions are committed, a block's first step commits just these, and
    min(max(n // 2, ceil(K / 8)), K - 1) tokens are masked again unless the block is full. K is the number committed
    now, but at least n. The paper's number, max(1, K // 8), would make no progress where K is 1.

    Args:
        count: n.

    Raises:
        UserError: When count is below 1.
    """

    scores_committed = True

    def __init__(self, count: int = 2) -> None:
        if count < 1:
            raise UserError(f"Saber.count must be at least 1, got {count}")
        self.count = count

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


class JointThreshold(UnmaskingPolicy):
    """Commits sure positions and overwrites committed ones that now have another sure token (LLaDA2.1, 2602.08676).

    A full block stays open until nothing is edited any more, for at most `max_edit_steps`.

    Args:
        commit_threshold: Confidence above which a masked position is committed.
        edit_threshold: Confidence above which a committed token is replaced by another.
        max_edit_steps: Steps a full block may still be edited.

    Raises:
        UserError: When a threshold is outside [0, 1] or max_edit_steps negative.
    """

    scores_committed = True

    def __init__(self, commit_threshold: float = 0.7, edit_threshold: float = 0.5, max_edit_steps: int = 16) -> None:
        if not (0 <= commit_threshold <= 1 and 0 <= edit_threshold <= 1 and max_edit_steps >= 0):
            raise UserError(
                "JointThreshold needs thresholds in [0, 1] and max_edit_steps >= 0, got "
                f"{commit_threshold}, {edit_threshold}, {max_edit_steps}"
            )
        self.commit_threshold, self.edit_threshold = commit_threshold, edit_threshold
        self.max_edit_steps = max_edit_steps

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
