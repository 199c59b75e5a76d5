"""FreeDave: several steps of a block-diffusion sampler from one forward, with the same text (arXiv 2510.00294)."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockLengthPolicy, CopyEngine
from dllm_var.sampling.engine import Batch, Row
from dllm_var.sampling.policies import ONE_AT_A_TIME, BlockView, FixedSteps
from dllm_var.sampling.policies.base import State, Step, take_step


@dataclass(eq=False)
class DraftRow(Row):
    drafts: int = 0  # of its block
    masks_in_drafts: int = 0  # masked positions in all of them


class FreeDaveEngine(CopyEngine[DraftRow]):
    """Rows `prompt | finished blocks | active block | drafts | masks`.

    Drafts are guesses, from the row's last prediction, of the block after 1, 2, ... further steps. A forward takes the
    block and its drafts side by side; each sees the cache and itself. If what the policy makes of the block is the
    first draft, then that draft's prediction is the next step's, and so on along the drafts. A draft counts as right
    only if the policy's memory is right, too: so every policy decodes the same text.
    """

    sampler: "FreeDaveSampler"
    row_class = DraftRow

    def start(self, slot: int) -> None:
        super().start(slot)
        self.rows[slot].drafts = self.rows[slot].masks_in_drafts = 0

    def scored(self, row: DraftRow) -> int:
        return row.width * (1 + row.drafts) if self.policy.scores_committed else row.left + row.masks_in_drafts

    def blocks(self, row: DraftRow, width: int) -> list[tuple[int, int, int, int]]:
        return [
            (row.shown + n * row.window, width if n <= row.drafts else 0, row.steps + n, n)
            for n in range(self.sampler.drafts)
        ]

    def copies(self, row: DraftRow, width: int) -> int:
        return row.drafts

    def sees(self, copy: Tensor, positions: Tensor) -> Tensor:
        return copy[:, :, None] == copy[:, None]

    def predict(self, batch: Batch[DraftRow], hidden: Tensor) -> None:
        """Accepts the drafts that are right, and drafts anew from the last right one's prediction."""
        cells, nfe, view = self.view_blocks(batch, hidden)
        rows, depth = len(batch.rows), self.sampler.drafts
        versions, real = view.tokens.view(rows, depth, -1), view.changeable.view(rows, depth, -1)
        incoming = self.memory(batch, view.step)
        memory = {name: value.clone() for name, value in incoming.items()}
        step = self._step(view, memory)

        after, goes_on = step.tokens.view_as(versions), (step.end < 0) & ~step.over
        right = (after[:, :-1] == versions[:, 1:]).all(2) & goes_on.view(rows, depth)[:, :-1] & real[:, 1:].any(2)
        for name, value in incoming.items():
            same = memory[name].view(rows, depth, -1)[:, :-1] == value.view(rows, depth, -1)[:, 1:]
            right = right & same.all(2)
        accepted = right.long().cumprod(1).sum(1)  # [R] drafts that were right
        last = torch.arange(rows, device=self.device) * depth + accepted  # among R * D versions
        number = torch.arange(depth, device=self.device)  # of each version

        first, inside = cells[::depth], real[:, 0]
        to_next = torch.tensor([row.window for row in batch.rows], device=self.device)[:, None]
        written = (step.tokens[last] != versions[:, 0]) & inside
        known = self.wanted_log_probabilities(view, step.tokens)
        if known is not None:
            by_step = step.written.view_as(versions) & (number <= accepted[:, None])[:, :, None]
            last_step = (by_step * (1 + number[:, None])).argmax(1, keepdim=True)  # that wrote each position
            known = known.view_as(versions).gather(1, last_step)[:, 0]
        self.write(first, step.tokens[last], written, nfe[::depth], known)
        status = [step.left[last], step.end[last], step.over[last], accepted]
        remembered = [{name: value[last] for name, value in memory.items()}]
        goes_on = goes_on[last]
        live, masks = torch.zeros_like(accepted), torch.zeros_like(accepted)
        for _ in range(depth - 1):
            view = view.after(step.tokens, step.masked, self.sample(replace(view, key=view.key + 1)))
            step = self._step(view, memory)
            goes_on = goes_on & ((step.end < 0) & ~step.over)[last]  # drafts of finished blocks are discarded
            live, masks = live + goes_on, masks + step.left[last] * goes_on
            first = first + inside * to_next
            self.canvas.put_(first, step.tokens[last])
            remembered.append({name: value[last] for name, value in memory.items()})
        self.remember(batch, {name: torch.stack([each[name] for each in remembered], 1) for name in memory})
        found = torch.stack((*status, live, masks)).T.tolist()  # the one wait for the device
        for row, decoded, line in zip(batch.rows, batch.width.tolist(), found, strict=True):
            if decoded:
                row.drafts, row.masks_in_drafts = line[4:]
                row.steps, row.key = row.steps + line[3], row.key + line[3]  # of the base sampler's forwards
        self.settle(batch, [line[:3] for line in found])

    def _step(self, view: BlockView, memory: State) -> Step:
        decision = self.policy.decision(view, memory)
        return take_step(view, decision, self.mask_id, self.terminators, self.sampler.terminator_last)


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
    """

    engine = FreeDaveEngine

    drafts: int = field(default=4, kw_only=True)
    kv_commit: Literal["joint_next", "alone"] = field(default="joint_next", kw_only=True)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.policy = self.policy or FixedSteps(steps=ONE_AT_A_TIME)
        super().__post_init__()
        self.check_range(1, math.inf, "drafts")

    @property
    def blocks_per_forward(self) -> int:
        return self.drafts  # the block itself and guesses
