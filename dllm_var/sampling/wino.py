"""WINO: commit generously, and take back what a second look does not confirm (arXiv 2507.18578)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.sampling.block_copies import lay_out
from dllm_var.sampling.block_diffusion import Batch, BlockDiffusionSampler, BlockEngine
from dllm_var.sampling.block_length import BlockLengthPolicy
from dllm_var.sampling.engine import Engine, Row
from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, top_n


class RevokableThreshold(UnmaskingPolicy):
    """Commits what is above a threshold, and masks again what is no longer confirmed (WINO, 2507.18578, section 3).

    At most 70 % of the masked positions are committed at a step, where that is between 5 and 20; the bounds are those
    of the released code. A step that commits one position only takes nothing back; another takes back fewer than the
    last one committed, the least confident first. So on the whole every step fills positions, and the block ends.

    Args:
        threshold: Confidence above which a masked position is committed.
        shadow_threshold: Confidence in a committed token below which it is taken back.

    Raises:
        UserError: Unless both are in [0, 1].
    """

    scores_committed = True

    def __init__(self, threshold: float = 0.6, shadow_threshold: float = 0.9) -> None:
        if not (0 <= threshold <= 1 and 0 <= shadow_threshold <= 1):
            raise UserError(
                f"WINO needs threshold and shadow_threshold in [0, 1], got {threshold} and {shadow_threshold}"
            )
        self.threshold, self.shadow_threshold = threshold, shadow_threshold

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


class WinoEngine(BlockEngine[Row]):
    """Blocks with shadows: masks at the same places, which see all but their own twin.

    A shadow's prediction for a committed position is what the model would put there without having been told. The
    block and what is left of it do not see the shadow. A block without a committed token has none.
    """

    def open_window(self, batch: Batch) -> Tensor:
        shadows = [int(row.left < width) for row, width in zip(batch.rows, batch.width.tolist(), strict=True)]
        if not any(shadows):
            return super().open_window(batch)
        copies = lay_out(self.cache.lengths, batch.pending, batch.width, shadows, self.device)
        shadow = copies.copy > 0
        by_shadow = shadow[:, None] | (copies.offset[:, :, None] != copies.offset[:, None])
        seen = torch.where(shadow[:, :, None], by_shadow, ~shadow[:, None])
        copies.open(self.cache, seen, self.model.config.causal_context)
        return self.canvas.gather(1, copies.positions).masked_fill(shadow, self.mask_id)

    def places(self, batch: Batch, length: int, width: Tensor, tokens: Tensor, inside: Tensor) -> Tensor:
        """Lets the policy see committed positions as their shadows predict them."""
        places = super().places(batch, length, width, tokens, inside)
        return places + width[:, None] * ((tokens != self.mask_id) & inside)


@dataclass(eq=False)
class WinoSampler(BlockDiffusionSampler):
    """Block diffusion that revokes: wide in, narrow out (WINO, 2507.18578).

    Every forward after a block's first is two blocks wide: the block, and a shadow that tests what is committed.

    Args:
        threshold: Confidence above which a masked position is committed.
        shadow_threshold: Confidence below which a committed token is masked again.

    Raises:
        UserError: When a length or the batch size is below 1, or a threshold outside [0, 1].
    """

    engine: ClassVar[type[Engine[Any]]] = WinoEngine

    policy: UnmaskingPolicy | None = field(init=False, default=None)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)
    threshold: float = field(default=0.6, kw_only=True)
    shadow_threshold: float = field(default=0.9, kw_only=True)
    kv_commit: Literal["joint_next", "alone"] = field(default="joint_next", kw_only=True)

    def __post_init__(self) -> None:
        self.policy = RevokableThreshold(self.threshold, self.shadow_threshold)
        super().__post_init__()
