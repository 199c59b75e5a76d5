"""FreeDave: several steps of a block-diffusion sampler from one forward, with the same text (arXiv 2510.00294)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.arrays import arrays, on_host, tensors
from dllm_var.sampling.base import Request, check_at_least_one
from dllm_var.sampling.block_copies import lay_out
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler
from dllm_var.sampling.block_run import BlockRun
from dllm_var.sampling.commit import choose_commits, outcome
from dllm_var.sampling.policies import BlockView, FixedSteps, UnmaskingPolicy
from dllm_var.sampling.policies.base import State
from dllm_var.sampling.scoring import position_keys


class FreeDaveRun(BlockRun):
    """Rows in flight whose forwards look ahead.

    Beside its block a row has `live[slot]` drafts: guesses, from its last prediction, of the block after 1, 2, ...
    further steps. A forward takes the block and its drafts side by side; each sees the cache and itself. If what the
    policy makes of the block is the first draft, then that draft's prediction is the next step's, and so on along the
    drafts. A draft counts as right only if the policy's memory is right, too: so every policy decodes the same text.
    """

    sampler: FreeDaveSampler
    per_slot: ClassVar = (*BlockRun.per_slot, "live", "masked_in_drafts", "steps_saved")

    def __init__(
        self, sampler: FreeDaveSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        super().__init__(sampler, model, prompts, request)
        slots, further = self.prompt.size, sampler.drafts - 1
        self.drafts = torch.full((slots, further, sampler.block_length), self.mask_id, device=self.device)
        self.draft_state = {name: value[:, None].repeat_interleave(further, 1) for name, value in self.state.items()}
        self.live, self.masked_in_drafts, self.steps_saved = (np.zeros(slots, np.int64) for _ in "123")

    def _start_block(self, slot: int) -> None:
        super()._start_block(slot)
        self.live[slot] = self.masked_in_drafts[slot] = 0
        if self.nfe[slot] == 0:  # the row's first block
            self.steps_saved[slot] = 0

    def _open_window(
        self, rows: np.ndarray, index: Tensor | None, slots: np.ndarray | None, pending: np.ndarray, width: np.ndarray
    ) -> Tensor:
        if not self.live[rows].any():
            return super()._open_window(rows, index, slots, pending, width)
        layout = lay_out(self.cache.lengths, pending, width, self.live, self.device)
        layout.open(self.cache, layout.copy[:, :, None] == layout.copy[:, None], self.model.config.causal_context)
        drafts = self.drafts.flatten(1)
        place = (layout.copy - 1) * self.sampler.block_length + layout.offset
        drafted = drafts.gather(1, place.clamp(0, drafts.size(1) - 1))
        return torch.where(layout.copy > 0, drafted, self.canvas.gather(1, layout.positions))

    def _denoise(
        self, rows: np.ndarray, index: Tensor | None, hidden: Tensor, pending: np.ndarray, width: np.ndarray
    ) -> None:
        """Goes along the drafts while they are right, and drafts anew from the last right one's prediction."""
        cells, *blocks = self._active_blocks(rows, width)
        block, inside = tensors(*blocks)
        slots = slice(None) if index is None else index
        further = int(self.live[rows].max())
        versions = torch.cat((block[:, None], self.drafts[slots][:, :further]), dim=1)  # [R, D, K]: block and drafts
        view = self._view_versions(rows, hidden, pending, width, versions)
        incoming = {
            name: torch.cat((value[slots][:, None], self.draft_state[name][slots][:, :further]), dim=1)
            for name, value in self.state.items()
        }
        state = {name: value.flatten(0, 1).clone() for name, value in incoming.items()}
        tokens, masked, left, ends, over = self._step(view, state)
        right = self._right_drafts(versions, tokens, (ends < 0) & ~over, view.changeable, incoming, state)
        (accepted,) = tensors((right * 1).cumprod(1).sum(1))  # [R] drafts that were right
        last_right = torch.arange(rows.size, device=self.device) * (1 + further) + accepted  # among R * D versions

        result = tokens[last_right]
        self._keep_state(rows, np.flatnonzero(width > 0), {name: value[last_right] for name, value in state.items()})
        self._write(rows, cells, *arrays(result, (result != block) & inside)[1:])
        outcomes = [left[last_right], ends[last_right], over[last_right], accepted]

        going_on = (outcomes[1] < 0) & ~outcomes[2]
        live, masks = torch.zeros_like(accepted), torch.zeros_like(accepted)
        for draft in range(self.sampler.drafts - 1):
            if self.device.type == "cpu" and not going_on.any():  # elsewhere asking would take longer than going on
                break
            sampled = None
            if self.sampler.temperature > 0:
                keys = position_keys(view.key + 1, view.scored, block.size(1))
                sampled = self.sampler.draw(view.scored_logits, keys)
            view = view.after(tokens, masked, sampled)
            tokens, masked, left, ends, over = self._step(view, state)
            # What the next forward need not predict is not a draft.
            going_on = going_on & ((ends < 0) & ~over)[last_right]
            live, masks = live + going_on, masks + left[last_right] * going_on
            self.drafts[slots, draft] = tokens[last_right]
            for name, value in state.items():
                self.draft_state[name][slots, draft] = value[last_right]
        # The step's one wait for the device.
        left_now, end, over_now, saved, self.live[rows], self.masked_in_drafts[rows] = on_host(*outcomes, live, masks)
        decoded = width > 0
        self.masked_left[rows[decoded]] = left_now[decoded]
        self.steps[rows] += np.where(decoded, 1 + saved, 0)
        self.steps_saved[rows] += saved
        self._settle(rows, decoded, end, over_now != 0)

    def _right_drafts(
        self,
        versions: Tensor,
        tokens: Tensor,
        going_on: Tensor,
        inside: Tensor,
        incoming: State,
        state: State,
    ) -> Any:
        """Says of each draft if it is what a step makes of the version before it, memory included [R, D - 1]."""
        _, before, after, open_still, there = arrays(versions, tokens, going_on, inside)
        after = after.reshape(before.shape)
        right = (after[:, :-1] == before[:, 1:]).all(2)
        right = right & open_still.reshape(before.shape[:2])[:, :-1] & there.any(1).reshape(before.shape[:2])[:, 1:]
        for name, value in incoming.items():
            same = (state[name].view_as(value)[:, :-1] == value[:, 1:]).unsqueeze(2).flatten(2).all(dim=2)
            right = right & arrays(same)[1]
        return right

    def _view_versions(
        self,
        rows: np.ndarray,
        hidden: Tensor,
        pending: np.ndarray,
        width: np.ndarray,
        versions: Tensor,
    ) -> BlockView:
        """Scores every version [R, D, K] of the blocks, as R * D rows; one that is not live has no positions."""
        depth, block_length = versions.shape[1:]
        live, width = self.live[rows, None], width[:, None]
        nth = np.arange(depth)  # all that follows is [R, D] or [R, D, K], and known to the host
        forwards = self.nfe[rows, None] + self.steps_saved[rows, None] + nth  # the base sampler's
        offsets = np.arange(block_length)
        start = (np.arange(rows.size) * hidden.size(1) + pending)[:, None] + np.minimum(nth, live) * width
        at = np.minimum(start[:, :, None] + offsets, hidden.size(0) * hidden.size(1) - 1)
        there = (offsets < width[:, :, None]) & (nth <= live)[:, :, None]
        if self.sampler.policy.scores_committed:
            count = int((width * (1 + live)).sum())
        else:
            count = int((self.masked_left[rows] + self.masked_in_drafts[rows])[width[:, 0] > 0].sum())
        steps, keys = self.steps[rows, None] + nth, self.keys[self.prompt[rows], None] + forwards
        place, real, step, key, shift = (
            torch.from_numpy(values).to(self.device).flatten(0, 1)
            for values in (at, there, steps, keys, np.zeros_like(steps))
        )
        chosen = hidden.flatten(0, 1).index_select(0, place.view(-1)).view(-1, block_length, hidden.size(2))
        progress = self._progress(rows).repeat_interleave(depth)
        return self._view(chosen, shift, versions.flatten(0, 1), real, count, step, progress, key)

    def _step(self, view: BlockView, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns what a step of the base sampler makes of blocks: tokens, masked positions and `outcome`."""
        decision = self.sampler.policy.decide(view, state)
        tokens, masked, _ = choose_commits(view, decision, self.mask_id, self.terminators, self.sampler.terminator_last)
        return tokens, masked, *outcome(decision, tokens, masked, view.changeable, self.terminators)

    def _compact(self, rows: np.ndarray) -> None:
        super()._compact(rows)
        index = torch.from_numpy(rows).to(self.device)
        self.drafts = self.drafts[index]
        self.draft_state = {name: value[index] for name, value in self.draft_state.items()}


class FreeDaveSampler(BlockDiffusionSampler):
    """Decodes what `BlockDiffusionSampler` decodes with the same settings, in fewer forwards (FreeDave, 2510.00294).

    Each forward predicts the block as it is and as it may be after 1, 2, ... `drafts` - 1 further steps, and takes as
    many of those steps as turn out to be the base sampler's own. A forward is up to `drafts` blocks wide: that pays
    where a forward's time depends little on its width. Equality is up to rounding, as between batches.

    Args:
        policy: The base sampler's; one token per step when null. Policies that commit much at once gain less, and
            one whose memory holds what it measured (`Saber`, `RunningConfidenceRemasking`) gains nothing.
        drafts: d, versions of the block in one forward; 1 is the base sampler.
        block_length: Tokens decoded together.
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        terminator_last: Commits a terminator only when everything left of it is, and nothing right of a sure one.
        kv_commit: How a finished block enters the cache: `joint_next` or `alone`.
        grid: Where blocks start: at the `prompt`'s end or at `absolute` multiples of the block length.
        temperature: 0 takes the most likely token; above, tokens are drawn, the same ones as by the base sampler.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws.

    Raises:
        UserError: When a length, the batch size or `drafts` is below 1, or for kv_commit `last_step`.
    """

    run_class = FreeDaveRun

    def __init__(
        self,
        policy: UnmaskingPolicy | None = None,
        drafts: int = 4,
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
        check_at_least_one(drafts=drafts)
        if kv_commit not in ("joint_next", "alone"):
            raise UserError(f"sampler.kv_commit must be joint_next or alone with FreeDaveSampler, got {kv_commit}")
        base = policy if policy is not None else FixedSteps(steps=1 << 30)
        super().__init__(
            base,
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
        self.drafts = drafts
        self.blocks_per_window = max(2, drafts)
