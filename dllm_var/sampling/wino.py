"""WINO: commit generously, and take back what a second look does not confirm (arXiv 2507.18578)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.sampling.arrays import tensors
from dllm_var.sampling.block_copies import lay_out
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler
from dllm_var.sampling.block_run import BlockRun
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


class WinoRun(BlockRun):
    """Rows in flight whose blocks have shadows: masks at the same places, which see all but their own twin.

    A shadow's prediction for a committed position is what the model would put there without having been told. The
    block and what is left of it do not see the shadow. A block without a committed token has none.
    """

    def _open_window(
        self, rows: np.ndarray, index: Tensor | None, slots: np.ndarray | None, pending: np.ndarray, width: np.ndarray
    ) -> Tensor:
        shadows = (self.masked_left[rows] < width).astype(np.int64)
        if not shadows.any():
            return super()._open_window(rows, index, slots, pending, width)
        layout = lay_out(self.cache.lengths, pending, width, shadows, self.device)
        shadow = layout.copy > 0
        by_shadow = shadow[:, None] | (layout.offset[:, :, None] != layout.offset[:, None])
        layout.open(
            self.cache, torch.where(shadow[:, :, None], by_shadow, ~shadow[:, None]), self.model.config.causal_context
        )
        return self.canvas.gather(1, layout.positions).masked_fill(shadow, self.mask_id)

    def _denoise(
        self, rows: np.ndarray, index: Tensor | None, hidden: Tensor, pending: np.ndarray, width: np.ndarray
    ) -> None:
        """Lets the policy see committed positions as their shadows predict them."""
        tokens, inside = tensors(*self._active_blocks(rows, width)[1:])
        start, wide = torch.from_numpy(np.stack((pending, width))).to(self.device)[:, :, None]
        at = start + torch.arange(tokens.size(1), device=self.device) + wide * ((tokens != self.mask_id) & inside)
        at = at.clamp_max(hidden.size(1) - 1)
        hidden = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.size(2)))
        super()._denoise(rows, index, hidden, np.zeros_like(pending), width)


class WinoSampler(BlockDiffusionSampler):
    """Block diffusion that revokes: wide in, narrow out (WINO, 2507.18578).

    Every forward after a block's first is two blocks wide: the block, and a shadow that tests what is committed.

    Args:
        threshold: Confidence above which a masked position is committed.
        shadow_threshold: Confidence below which a committed token is masked again.
        block_length: Tokens decoded together.
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        terminator_last: Commits a terminator only when everything left of it is, and nothing right of a sure one.
        kv_commit: How a finished block enters the cache: `joint_next` or `alone`.
        grid: Where blocks start: at the `prompt`'s end or at `absolute` multiples of the block length.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws.

    Raises:
        UserError: When a length or the batch size is below 1, or a threshold outside [0, 1].
    """

    run_class: ClassVar[type[BlockRun]] = WinoRun

    def __init__(
        self,
        threshold: float = 0.6,
        shadow_threshold: float = 0.9,
        block_length: int = 64,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        terminator_last: bool = True,
        kv_commit: Literal["joint_next", "alone"] = "joint_next",
        grid: Literal["prompt", "absolute"] = "prompt",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            RevokableThreshold(threshold, shadow_threshold),
            block_length=block_length,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            terminator_last=terminator_last,
            kv_commit=kv_commit,
            grid=grid,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        self.threshold, self.shadow_threshold = threshold, shadow_threshold
