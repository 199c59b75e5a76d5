"""FreeDave: several steps of a block-diffusion sampler from one forward, with the same text (arXiv 2510.00294)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.block_copies import lay_out
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockEngine
from dllm_var.sampling.block_length import BlockLengthPolicy
from dllm_var.sampling.engine import Batch, Row
from dllm_var.sampling.policies import BlockView, FixedSteps
from dllm_var.sampling.policies.base import State, Step, take_step
from dllm_var.sampling.policies.scheduled import ONE_AT_A_TIME


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
        shape = (len(self.rows), sampler.drafts - 1, sampler.block_length)
        self.drafts = torch.full(shape, self.mask_id, device=self.device)

    @property
    def versions(self) -> tuple[int, ...]:
        return (self.sampler.drafts,)  # the block and its drafts

    def start_block(self, slot: int) -> None:
        super().start_block(slot)
        self.rows[slot].drafts = self.rows[slot].masks_in_drafts = 0

    def read_window(self, batch: Batch[DraftRow]) -> Tensor:
        numbers = [row.drafts for row in batch.rows]
        if not any(numbers):
            return super().read_window(batch)
        copies = lay_out(self.cache.lengths, batch.pending, batch.width, numbers, self.device)
        drafts = self.drafts.flatten(1)
        place = (copies.copy - 1) * self.sampler.block_length + copies.offset
        drafted = drafts.gather(1, place.clamp(0, drafts.size(1) - 1))
        tokens = torch.where(copies.copy > 0, drafted, self.canvas.gather(1, copies.positions))
        seen = copies.copy[:, :, None] == copies.copy[:, None]
        return copies.read(self.model, self.cache, tokens, seen, batch.pending)

    def predict(self, batch: Batch[DraftRow], hidden: Tensor) -> None:
        """Goes along the drafts while they are right, and drafts anew from the last right one's prediction."""
        first, done, width, steps, key, nfe = self.table(batch)
        cells = first[:, None] + self.offsets
        block = self.canvas.take(cells)
        versions = torch.cat((block[:, None], self.drafts[batch.slots]), dim=1)  # [R, D, K]
        view = self._view_versions(batch, hidden, versions, width, steps, key, done / self.limit)
        incoming = self.memory(batch, view.step)
        memory = {name: value.clone() for name, value in incoming.items()}
        step = self._step(view, memory)

        rows, depth = versions.shape[:2]
        after, real = step.tokens.view_as(versions), view.changeable.view_as(versions)
        going_on = (step.end < 0) & ~step.over
        right = (after[:, :-1] == versions[:, 1:]).all(2) & going_on.view(-1, depth)[:, :-1] & real[:, 1:].any(2)
        for name, value in incoming.items():
            same = (memory[name].view(rows, depth, -1)[:, :-1] == value.view(rows, depth, -1)[:, 1:]).all(2)
            right = right & same
        accepted = right.long().cumprod(1).sum(1)  # [R] drafts that were right
        last = torch.arange(rows, device=self.device) * depth + accepted  # among R * D versions

        self.write(cells, step.tokens[last], (step.tokens[last] != block) & (self.offsets < width[:, None]), nfe)
        status = [step.left[last], step.end[last], step.over[last], accepted]
        remembered = [{name: value[last] for name, value in memory.items()}]
        going_on = going_on[last]
        live, masks = torch.zeros_like(accepted), torch.zeros_like(accepted)
        for draft in range(depth - 1):
            view = view.after(step.tokens, step.masked, self.sample(replace(view, key=view.key + 1)))
            step = self._step(view, memory)
            going_on = going_on & ((step.end < 0) & ~step.over)[last]  # drafts of finished blocks are discarded
            live, masks = live + going_on, masks + step.left[last] * going_on
            self.drafts[batch.slots, draft] = step.tokens[last]
            remembered.append({name: value[last] for name, value in memory.items()})
        self.remember(batch, {name: torch.stack([each[name] for each in remembered], 1) for name in memory})
        found = torch.stack((*status, live, masks)).T.tolist()  # the one wait for the device
        for row, decoded, line in zip(batch.rows, batch.width.tolist(), found, strict=True):
            if decoded:
                row.drafts, row.masks_in_drafts = line[4:]
                row.steps, row.key = row.steps + line[3], row.key + line[3]  # of the base sampler's forwards
        self.settle(batch, [line[:3] for line in found])

    def _view_versions(
        self,
        batch: Batch[DraftRow],
        hidden: Tensor,
        versions: Tensor,
        width: Tensor,
        steps: Tensor,
        key: Tensor,
        done: Tensor,
    ) -> BlockView:
        """Scores every version [R, D, K] of the blocks, as R * D rows; a draft that there is not has no positions."""
        depth = versions.size(1)
        nth = torch.arange(depth, device=self.device)
        number = torch.tensor([row.drafts for row in batch.rows], device=self.device)[:, None]
        places = self.places(batch, hidden.size(1), width, versions[:, 0])
        real = (self.offsets < width[:, None, None]) & (nth <= number)[:, :, None]
        all_scored = self.policy.scores_committed
        count = sum(
            wide * (1 + row.drafts) if all_scored else row.left + row.masks_in_drafts
            for row, wide in zip(batch.rows, batch.width.tolist(), strict=True)
            if wide
        )
        return self.view(
            hidden,
            (places[:, None] + (nth * width[:, None])[:, :, None]).flatten(0, 1),
            versions.flatten(0, 1),
            real.flatten(0, 1),
            count,
            step=(steps[:, None] + nth).flatten(),
            progress=done.repeat_interleave(depth),
            key=(key[:, None] + nth).flatten(),
        )

    def _step(self, view: BlockView, memory: State) -> Step:
        decision = self.policy.decide(view, memory)
        return take_step(view, decision, self.mask_id, self.terminators, self.sampler.terminator_last)

    def compact(self, kept: list[int]) -> None:
        super().compact(kept)
        self.drafts = self.drafts[kept]


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

    engine = FreeDaveEngine

    drafts: int = field(default=4, kw_only=True)
    kv_commit: Literal["joint_next", "alone"] = field(default="joint_next", kw_only=True)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.policy = self.policy or FixedSteps(steps=ONE_AT_A_TIME)
        super().__post_init__()
        self.check_range(1, math.inf, "drafts")
        if self.kv_commit not in ("joint_next", "alone"):
            raise UserError(f"sampler.kv_commit must be joint_next or alone with FreeDaveSampler, got {self.kv_commit}")

    @property
    def blocks_per_forward(self) -> int:
        return max(2, self.drafts)
