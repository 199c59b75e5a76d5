"""From a policy's decision to the block's next tokens, with the guarantees every policy shares."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.arrays import arrays, tensors
from dllm_var.sampling.policies.base import BlockView, Decision

STEPS_WITH_REMASKING = 4


def choose_commits(
    view: BlockView, decision: Decision, mask_id: int, terminators: tuple[int, ...], terminator_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `apply_decision`, with tensors."""
    return tensors(*apply_decision(view, decision, mask_id, terminators, terminator_last))


def apply_decision(
    view: BlockView, decision: Decision, mask_id: int, terminators: tuple[int, ...], terminator_last: bool
) -> tuple[Any, Any, Any]:
    """Applies a decision and returns the block's tokens, its masked positions and the written ones, each [R, K].

    A row that has masks, and of whose decision neither a commit nor a remasking is left, commits the position with the
    best of the decision's scores: without remasking a block takes at most K steps. With `terminator_last` a terminator
    is committed only once everything left of it is, nothing is committed right of one that the policy selected, and the
    commit that every row gets is not right of any predicted one: what stands there is not part of the answer. Where
    these rules leave no more commits than positions that the policy would mask again, nothing is masked again: the
    policy had counted on progress. A block that remasks without end is filled without remasking after
    `STEPS_WITH_REMASKING` steps per position.
    """
    xp, tokens, given, masked, commit = arrays(
        view.predicted if decision.tokens is None else decision.tokens, view.tokens, view.masked, decision.commit
    )
    wanted = commit = commit & masked
    is_end = is_one_of(tokens, terminators) & masked
    sure_end = commit & is_end
    if terminator_last and (xp is torch or sure_end.any()):
        sure_ends = sure_end.cumsum(1)
        before = sure_ends == 0  # left of the first one, or everywhere
        commit = commit & before
        waits = (masked & before & ~commit).any(1)
        commit = commit | (sure_end & (sure_ends == 1) & ~waits[:, None])
    stuck = masked.any(1) & ~commit.any(1)
    remask = None
    if decision.remask is not None:
        _, remask, step = arrays(decision.remask, view.step)
        in_vain = (commit != wanted).any(1) & (commit.sum(1) <= remask.sum(1))
        remask = remask & (~in_vain & (step < STEPS_WITH_REMASKING * tokens.shape[1]))[:, None]
        stuck = stuck & ~remask.any(1)
    if xp is torch or stuck.any():
        _, scores = arrays(view.confidence if decision.scores is None else decision.scores)
        may_commit = masked
        if terminator_last:
            may_commit = masked & ((is_end.cumsum(1) == 0) | (count_left(masked) == 0))
        best = xp.where(may_commit, scores, -np.inf).argmax(1)[:, None]
        commit = commit | ((_offsets(xp, tokens) == best) & stuck[:, None])
    if decision.finish_block is not None:
        commit = commit | (masked & arrays(decision.finish_block)[1][:, None])
    written = commit
    if decision.edit is not None:
        _, edit, changeable = arrays(decision.edit, view.changeable)
        written = commit | (edit & changeable & ~masked)
    after = xp.where(written, tokens, given)
    masked = masked & ~commit
    if remask is not None:
        remask = remask & arrays(view.changeable)[1] & ~commit
        after = xp.where(remask, mask_id, after)
        masked = masked | remask
    return after, masked, written


def outcome(
    decision: Decision, tokens: Tensor, masked: Tensor, inside: Tensor, terminators: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `block_outcome`, with tensors."""
    return tensors(*block_outcome(decision, tokens, masked, inside, terminators))


def block_outcome(
    decision: Decision, tokens: Any, masked: Any, inside: Any, terminators: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    """Returns of each block after a step [R]: how many masks are left, where the answer ends or -1, if it is over."""
    xp, tokens, masked, inside = arrays(tokens, masked, inside)
    ends = _answer_ends(xp, tokens, masked, inside, terminators)
    if decision.finish_row is not None:
        behind_last = inside.cumsum(1).argmax(1) + 1
        decided = xp.where(masked.any(1), _first(masked), behind_last)
        ends = xp.where(arrays(decision.finish_row)[1] & (ends < 0), decided, ends)
    left = masked.sum(1)
    over = (left == 0) | (ends >= 0)
    if decision.keep_open is not None:
        over = over & ~arrays(decision.keep_open)[1]
    return left, ends, over


def _answer_ends(xp: ModuleType, tokens: Any, masked: Any, inside: Any, terminators: tuple[int, ...]) -> Any:
    """Returns where in its block each row's answer ends [R]: its first terminator with no mask left of it, or -1."""
    is_end = is_one_of(tokens, terminators) & inside & (masked.cumsum(1) == 0)
    return xp.where(is_end.any(1), _first(is_end), -1)


def _offsets(xp: ModuleType, tokens: Any) -> Any:
    """Returns 0, 1, ... K - 1 beside `tokens` [R, K]."""
    return xp.arange(tokens.shape[1]) if xp is np else torch.arange(tokens.shape[1], device=tokens.device)


def _first(positions: Any) -> Any:
    """Returns where each row's first true position is [R]."""
    return positions.argmax(1) if isinstance(positions, np.ndarray) else positions.int().argmax(1)


def count_left(positions: Any) -> Any:
    """Returns how many true positions lie strictly left of each [R, K]."""
    return positions.cumsum(1) - positions * 1
