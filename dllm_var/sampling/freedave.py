"""FreeDave: several steps of a block-diffusion sampler from one forward, with the same text (arXiv 2510.00294)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.block_copies import lay_out
from dllm_var.sampling.block_diffusion import Batch, BlockDiffusionSampler, BlockEngine
from dllm_var.sampling.block_length import BlockLengthPolicy
from dllm_var.sampling.engine import Engine, Row, Step
from dllm_var.sampling.policies import BlockView, FixedSteps
from dllm_var.sampling.policies.base import State


@dataclass(eq=False)
class DraftRow(Row):
    """A row with drafts of its block.

    Args:
        drafts: How many there are.
        masks_in_drafts: Masked positions in all of them.
    """

    drafts: int = 0
    masks_in_drafts: int = 0


class FreeDaveEngine(BlockEngine[DraftRow]):
    """Rows whose forwards look ahead.

    Beside its block a row has drafts: guesses, from its last prediction, of the block after 1, 2, ... further steps. A
    forward takes the block and its drafts side by side; each sees the cache and itself. If what the policy makes of the
    block is the first draft, then that draft's prediction is the next step's, and so on along the drafts. A draft
    counts as right only if the policy's memory is right, too: so every policy decodes the same text.
    """

    sampler: FreeDaveSampler
    row_class = DraftRow

    def __init__(
        self, sampler: FreeDaveSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        super().__init__(sampler, model, prompts, request)
        self.further = sampler.drafts - 1
        shape = (len(self.rows), self.further, sampler.block_length)
        self.drafts = torch.full(shape, self.mask_id, device=self.device)
        self.draft_state = {
            name: value[:, None].repeat_interleave(self.further, 1) for name, value in self.state.items()
        }

    def start_block(self, slot: int) -> None:
        super().start_block(slot)
        self.rows[slot].drafts = self.rows[slot].masks_in_drafts = 0

    def open_window(self, batch: Batch) -> Tensor:
        numbers = [row.drafts for row in batch.rows]
        if not any(numbers):
            return super().open_window(batch)
        copies = lay_out(self.cache.lengths, batch.pending, batch.width, numbers, self.device)
        seen = copies.copy[:, :, None] == copies.copy[:, None]
        copies.open(self.cache, seen, self.model.config.causal_context)
        drafts = self.drafts.flatten(1)
        place = (copies.copy - 1) * self.sampler.block_length + copies.offset
        drafted = drafts.gather(1, place.clamp(0, drafts.size(1) - 1))
        return torch.where(copies.copy > 0, drafted, self.canvas.gather(1, copies.positions))

    def predict(self, batch: Batch, hidden: Tensor) -> None:
        """Goes along the drafts while they are right, and drafts anew from the last right one's prediction."""
        first, done, width, steps, key, nfe = self.table(batch)
        cells = first[:, None] + self.offsets
        block = self.canvas.take(cells)
        depth = 1 + max(row.drafts for row in batch.rows)
        versions = torch.cat((block[:, None], self.drafts[batch.slots][:, : depth - 1]), dim=1)  # [R, D, K]
        view = self._view_versions(batch, hidden, versions, width, steps, key, done / self.limit)
        incoming = {
            name: torch.cat((value[batch.slots][:, None], self.draft_state[name][batch.slots][:, : depth - 1]), dim=1)
            for name, value in self.state.items()
        }
        state = {name: value.flatten(0, 1).clone() for name, value in incoming.items()}
        step = self._step(view, state)

        after, real = step.tokens.view_as(versions), view.changeable.view_as(versions)
        going_on = (step.end < 0) & ~step.over
        right = (after[:, :-1] == versions[:, 1:]).all(2) & going_on.view(-1, depth)[:, :-1] & real[:, 1:].any(2)
        for name, value in incoming.items():
            right &= (state[name].view_as(value)[:, :-1] == value[:, 1:]).unsqueeze(2).flatten(2).all(dim=2)
        accepted = right.long().cumprod(1).sum(1)  # [R] drafts that were right
        last = torch.arange(len(batch.rows), device=self.device) * depth + accepted  # among R * D versions

        decoded = batch.width > 0
        slots = torch.tensor(batch.slots)[decoded]
        for name, value in state.items():
            self.state[name][slots] = value[last][decoded]
        self.write(cells, step.tokens[last], (step.tokens[last] != block) & (self.offsets < width[:, None]), nfe)
        status = [step.left[last], step.end[last], step.over[last], width, accepted]
        going_on = going_on[last]
        live, masks = torch.zeros_like(accepted), torch.zeros_like(accepted)
        for draft in range(self.further):
            sampled = None
            if self.sampler.temperature > 0:
                wide = block.size(1)
                keys = (view.key + 1)[view.scored // wide] * wide + view.scored % wide
                sampled = self.sampler.draw(view.scored_logits, keys)
            view = view.after(step.tokens, step.masked, sampled)
            step = self._step(view, state)
            going_on = going_on & ((step.end < 0) & ~step.over)[last]  # drafts of finished blocks are discarded
            live, masks = live + going_on, masks + step.left[last] * going_on
            self.drafts[batch.slots, draft] = step.tokens[last]
            for name, value in state.items():
                self.draft_state[name][batch.slots, draft] = value[last]
        found = torch.stack((*status, live, masks)).T.tolist()  # the one wait for the device
        for row, decoded, line in zip(batch.rows, batch.width.tolist(), found, strict=True):
            if decoded:
                row.drafts, row.masks_in_drafts = line[5:]
                row.steps, row.key = row.steps + line[4], row.key + line[4]  # of the base sampler's forwards
        self.settle(batch, [line[:4] for line in found])

    def _view_versions(
        self, batch: Batch, hidden: Tensor, versions: Tensor, width: Tensor, steps: Tensor, key: Tensor, done: Tensor
    ) -> BlockView:
        """Scores every version [R, D, K] of the blocks, as R * D rows; a draft that there is not has no positions."""
        depth = versions.size(1)
        nth = torch.arange(depth, device=self.device)
        number = torch.tensor([row.drafts for row in batch.rows], device=self.device)[:, None]
        places = self.places(batch, hidden.size(1), width, versions[:, 0], versions[:, 0])
        places = places[:, None] + (torch.minimum(nth, number) * width[:, None])[:, :, None]
        real = (self.offsets < width[:, None, None]) & (nth <= number)[:, :, None]
        all_scored = self.policy.scores_committed
        count = sum(
            wide * (1 + row.drafts) if all_scored else row.left + row.masks_in_drafts
            for row, wide in zip(batch.rows, batch.width.tolist(), strict=True)
            if wide
        )
        return self.view(
            hidden,
            places.clamp_max(hidden.size(0) * hidden.size(1) - 1),
            versions.flatten(0, 1),
            real.flatten(0, 1),
            count,
            step=(steps[:, None] + nth).flatten(),
            progress=done.repeat_interleave(depth),
            key=(key[:, None] + nth).flatten(),
            all_scored=all_scored,
        )

    def _step(self, view: BlockView, state: State) -> Step:
        return self.denoise(view, self.policy.decide(view, state), self.sampler.terminator_last)

    def compact(self, kept: list[int]) -> None:
        super().compact(kept)
        self.drafts = self.drafts[kept]
        self.draft_state = {name: value[kept] for name, value in self.draft_state.items()}


@dataclass(eq=False)
class FreeDaveSampler(BlockDiffusionSampler):
    """Decodes what `BlockDiffusionSampler` decodes with the same settings, in fewer forwards (FreeDave, 2510.00294).

    Each forward predicts the block as it is and as it may be after 1, 2, ... `drafts` - 1 further steps, and takes as
    many of those steps as turn out to be the base sampler's own. A forward is up to `drafts` blocks wide: that pays
    where a forward's time depends little on its width. Equality is up to rounding, as between batches.

    Args:
        policy: The base sampler's; one token per step when None. Policies that commit much at once gain less, and
            one whose memory holds what it measured (`Saber`, `RunningConfidenceRemasking`) gains nothing.
        drafts: d, versions of the block in one forward; 1 is the base sampler.

    Raises:
        UserError: When a length, the batch size or `drafts` is below 1, or for kv_commit `last_step`.
    """

    engine: ClassVar[type[Engine[Any]]] = FreeDaveEngine

    drafts: int = field(default=4, kw_only=True)
    kv_commit: Literal["joint_next", "alone"] = field(default="joint_next", kw_only=True)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.policy = self.policy or FixedSteps(steps=1 << 30)
        super().__post_init__()
        self.check_at_least_one("drafts")
        if self.kv_commit not in ("joint_next", "alone"):
            raise UserError(f"sampler.kv_commit must be joint_next or alone with FreeDaveSampler, got {self.kv_commit}")

    @property
    def blocks_per_forward(self) -> int:
        return max(2, self.drafts)
