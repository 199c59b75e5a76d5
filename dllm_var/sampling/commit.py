"""From a policy's decision to the block's next tokens, with the guarantees every policy shares."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.policies.base import BlockView, Decision

STEPS_WITH_REMASKING = 4


def choose_commits(
    view: BlockView, decision: Decision, mask_id: int, terminators: tuple[int, ...], terminator_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies a decision and returns the block's tokens, its masked positions and the written ones, each [R, K].

    Every row that has masks gets at least one commit unless the policy remasks or edits, so a block takes at most K
    steps. With `terminator_last` a terminator is committed only once everything left of it is, nothing is committed
    right of one that the policy selected, and the commit that every row gets is not right of any predicted one: what
    stands there is not part of the answer. A block that remasks without end is filled without remasking after
    `STEPS_WITH_REMASKING` steps per position.
    """
    tokens = view.predicted if decision.tokens is None else decision.tokens
    commit = decision.commit & view.masked
    is_end = is_one_of(tokens, terminators) & view.masked
    may_commit = view.masked
    if terminator_last:
        sure_end = commit & is_end
        commit = commit & ~is_end & (sure_end.cumsum(dim=1) == 0)
        open_left = _count_left(view.masked & ~commit) > 0
        commit = commit | (sure_end & ~open_left)
        may_commit = may_commit & ((is_end.cumsum(dim=1) == 0) | (_count_left(view.masked) == 0))
    may_remask = view.step < STEPS_WITH_REMASKING * view.tokens.size(1)
    remask = None if decision.remask is None else decision.remask & may_remask[:, None]
    stuck = view.masked.any(dim=1) & ~commit.any(dim=1)
    if remask is not None:
        stuck = stuck & ~remask.any(dim=1)
    best = view.confidence.masked_fill(~may_commit, -1.0).argmax(dim=1, keepdim=True)
    commit = commit | torch.zeros_like(commit).scatter_(1, best, stuck[:, None])
    if decision.finish_block is not None:
        commit = commit | (view.masked & decision.finish_block[:, None])
    written = commit if decision.edit is None else commit | (decision.edit & view.changeable & ~view.masked)
    after = torch.where(written, tokens, view.tokens)
    masked = view.masked & ~commit
    if remask is not None:
        remask = remask & view.changeable & ~commit
        after = torch.where(remask, mask_id, after)
        masked = masked | remask
    return after, masked, written


def _count_left(positions: Tensor) -> Tensor:
    """Returns how many true positions lie strictly left of each [R, K]."""
    return positions.cumsum(dim=1) - positions.long()


def outcome(
    decision: Decision, tokens: Tensor, masked: Tensor, inside: Tensor, terminators: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns of each block after a step [R]: how many masks are left, where the answer ends or -1, if it is over."""
    ends = _answer_ends(tokens, masked, inside, terminators)
    if decision.finish_row is not None:
        decided = torch.where(masked.any(dim=1), masked.int().argmax(dim=1), inside.sum(dim=1))
        ends = torch.where(decision.finish_row & (ends < 0), decided, ends)
    left = masked.sum(dim=1)
    over = (left == 0) | (ends >= 0)
    if decision.keep_open is not None:
        over = over & ~decision.keep_open
    return left, ends, over


def _answer_ends(tokens: Tensor, masked: Tensor, inside: Tensor, terminators: tuple[int, ...]) -> Tensor:
    """Returns where in its block each row's answer ends [R]: its first terminator with no mask left of it, or -1."""
    is_end = is_one_of(tokens, terminators) & ~masked & inside
    none_left = (masked.cumsum(dim=1) == 0) & is_end
    return torch.where(none_left.any(dim=1), none_left.int().argmax(dim=1), -1)
