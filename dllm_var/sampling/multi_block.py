"""Multi-block decoding: later blocks start before the earlier ones are finished (d3LLM, arXiv 2601.07568)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockEngine
from dllm_var.sampling.block_length import BlockLengthPolicy
from dllm_var.sampling.engine import Batch, Row
from dllm_var.sampling.policies import BlockView, Decision
from dllm_var.sampling.policies.base import commit, outcome

_FORWARDS_PER_BLOCK = 1 << 16  # what tells the draws of blocks in one forward apart


@dataclass(eq=False)
class OpenBlock:
    """A block that is being decoded: its width, its masked positions and the denoising steps it has had."""

    width: int
    left: int
    steps: int = 0

    @property
    def decoded(self) -> float:
        """Share of its positions that are decoded."""
        return 1 - self.left / max(self.width, 1)


@dataclass(eq=False)
class MultiBlockRow(Row):
    """A row whose `width` and `left` are those of its open blocks together, the leading one first."""

    blocks: list[OpenBlock] = field(default_factory=list)

    def add_up(self) -> None:
        """Brings `width` and `left` up to date."""
        self.width, self.left = sum(block.width for block in self.blocks), sum(block.left for block in self.blocks)


class MultiBlockEngine(BlockEngine[MultiBlockRow]):
    """Rows `prompt | finished | leading block | next block | ... | masks`.

    To the policy each open block is a row of its own, with a memory of its own, so every policy serves. The leading
    block gets what the base sampler would give it; see `_commit` for those behind it. B is the most blocks open.
    """

    sampler: MultiBlockSampler
    row_class = MultiBlockRow

    @property
    def versions(self) -> tuple[int, ...]:
        return (self.sampler.blocks,)

    def start_block(self, slot: int) -> None:
        """Makes the row's first open block the leading one; opens it when there is none."""
        row = self.rows[slot]
        if not row.blocks:
            super().start_block(slot)
            row.blocks = [OpenBlock(row.width, row.width)]
        row.add_up()

    def predict(self, batch: Batch[MultiBlockRow], hidden: Tensor) -> None:
        """Predicts all open blocks, applies the policy to each, ends blocks and rows, and opens further blocks."""
        opened = [row.blocks if wide else [] for row, wide in zip(batch.rows, batch.width.tolist(), strict=True)]
        blocks = self.sampler.blocks
        first, done, _, _, key, nfe = self.table(batch)
        start, width, steps, settled = self._table_of_blocks(opened)
        inside = self.offsets < width[:, :, None]  # [R, B, K]
        # What is no block's position is written to the canvas's last column, which no row reaches.
        nowhere = torch.tensor(batch.slots, device=self.device)[:, None, None] * self.capacity + self.capacity - 1
        cells = torch.where(inside, (first[:, None] + start)[:, :, None] + self.offsets, nowhere)
        tokens = self.canvas.take(cells)
        places = self.places(batch, hidden.size(1), width, tokens)
        view = self.view(
            hidden,
            (places[:, None] + start[:, :, None]).flatten(0, 1),
            tokens.flatten(0, 1),
            inside.flatten(0, 1),
            sum(self.scored(row) for row, of_row in zip(batch.rows, opened, strict=True) if of_row),
            step=steps.flatten(),
            progress=(done / self.limit).repeat_interleave(blocks),
            key=(key[:, None] + torch.arange(blocks, device=self.device) * _FORWARDS_PER_BLOCK).flatten(),
        )
        decision = self.decide(batch, view)
        tokens, masked, written, ending = self._commit(view, decision, settled.flatten().bool())
        self.write(cells.flatten(1), tokens.flatten(1), written.flatten(1), nfe)
        finish_row = None if decision.finish_row is None else decision.finish_row[::blocks]
        _, end = outcome(tokens.flatten(1), masked.flatten(1), inside.flatten(1), self.terminators, finish_row)
        kept = torch.zeros_like(width) if decision.keep_open is None else decision.keep_open.view(-1, blocks)
        # The step's one wait for the device.
        status = torch.cat((end[:, None], ending[:, None], masked.sum(2), kept), dim=1).tolist()
        for slot, of_row, (end_of_row, end_in_sight, *others) in zip(batch.slots, opened, status, strict=True):
            if of_row:
                self._settle_row(slot, end_of_row, others[:blocks], others[blocks:])
                if not end_in_sight and self.rows[slot].index >= 0:
                    self._open_block(slot)

    def _table_of_blocks(self, opened: list[list[OpenBlock]]) -> Tensor:
        """Returns where each block begins, its width, its steps, and if the block left of it is settled [4, R, B]."""
        table = []
        for of_row in opened:
            start, settled, lines = 0, 1, []
            for block in of_row:
                lines.append((start, block.width, block.steps, settled))
                start, settled = start + block.width, int(block.decoded >= self.sampler.settled_at)
            table.append(lines + [(start, 0, 0, 1)] * (self.sampler.blocks - len(lines)))
        return torch.tensor(table).permute(2, 0, 1).contiguous().to(self.device)

    def _commit(self, view: BlockView, decision: Decision, settled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns tokens, masked and written positions [R, B, K], and the rows [R] whose end is in sight.

        A block behind the leading one commits what the policy says and no more: no position has to be filled at each
        step. Until the block left of it is `settled` [R * B] each position must also exceed the threshold for running
        ahead. Nothing is committed right of where a terminator is predicted, nor a terminator before all left of it.
        """
        shape = (-1, self.sampler.blocks, view.tokens.size(1))
        leading = torch.arange(len(settled), device=self.device) % self.sampler.blocks == 0  # [R * B]
        proposed = view.predicted if decision.tokens is None else decision.tokens
        is_end = is_one_of(proposed, self.terminators) & view.masked
        ended = is_one_of(view.tokens, self.terminators) & view.changeable & ~view.masked
        ends = is_end.view(shape).flatten(1)
        before_end = (ends.cumsum(1) <= ends).view_as(is_end)  # no end is predicted strictly left of it
        wanted, finish = decision.commit, decision.finish_block
        ahead = wanted if finish is None else wanted | finish[:, None]
        ahead = ahead & before_end & (settled[:, None] | (view.confidence > self.sampler.ahead_threshold))
        limited = replace(
            decision,
            commit=torch.where(leading[:, None], wanted, ahead),
            finish_block=None if finish is None else finish & leading,
        )
        last = self.sampler.terminator_last
        tokens, masked, written = commit(view, limited, self.mask_id, self.terminators, last, leading)
        if last:
            has_masks = masked.view(shape).any(2)
            masks_left = (has_masks.cumsum(1) > has_masks.long()).flatten()  # in an earlier block
            waits = written & is_end & (masks_left & ~leading)[:, None]
            tokens, masked, written = tokens.masked_fill(waits, self.mask_id), masked | waits, written & ~waits
        ending = (is_end | ended).view(shape).flatten(1).any(1)
        return tokens.view(shape), masked.view(shape), written.view(shape), ending

    def _settle_row(self, slot: int, end: int, left: list[int], kept: list[int]) -> None:
        """Ends what is over in a row after a step: the row itself, or its first blocks.

        `end` is where its answer ends, counted as if all blocks were full, or -1; `left` are the masks of each block
        [B], and `kept` says which blocks the policy keeps open [B].
        """
        row = self.rows[slot]
        for block, masks in zip(row.blocks, left, strict=False):
            block.left, block.steps = masks, block.steps + 1
        complete = 0
        while complete < len(row.blocks) and not left[complete] and not kept[complete]:
            complete += 1
        if end >= 0:
            block_at, offset = divmod(end, self.sampler.block_length)
            stop = sum(block.width for block in row.blocks[:block_at]) + offset
            if not any(kept[: block_at + 1]):
                self.end_block(slot, stop)
                return
            # Kept open for edits: nothing behind the answer's end is decoded any more.
            row.blocks = row.blocks[: block_at + 1]
            row.blocks[-1].width = offset + 1
            for block in row.blocks:
                block.left = 0
        row.add_up()
        if complete:
            row.width = sum(block.width for block in row.blocks[:complete])
            del row.blocks[:complete]
            for value in self.state.values():
                value[slot, :-complete] = value[slot, complete:].clone()
            self.end_block(slot, -1)

    def _open_block(self, slot: int) -> None:
        """Opens one more block in a row whose last open one is decoded far enough."""
        row = self.rows[slot]
        if len(row.blocks) == self.sampler.blocks or row.blocks[-1].decoded < self.sampler.open_at:
            return
        width = self.next_width(slot, int(self.cache.lengths[slot]) + row.pending + row.width)
        if width > 0:  # below the limit
            row.blocks.append(OpenBlock(width, width))
            row.add_up()


@dataclass(eq=False)
class MultiBlockSampler(BlockDiffusionSampler):
    """Block diffusion in which the next blocks are begun before the leading one is finished (d3LLM, 2601.07568).

    A forward takes all open blocks. A further one opens when the last is decoded to some share; it commits what the
    policy is sure of, while only the leading block is made to fill a position at each step. Once the leading block is
    full it enters the cache as the base sampler's do. d3LLM's own policy is `EntropyThreshold`, and its model is
    trained for it: one that is not sees more masks behind a block than it was trained with.

    Args:
        blocks: Most blocks open at a time; 1 is the base sampler.
        open_at: Share of the last open block that must be decoded before the next one opens, in [0, 1].
        settled_at: Share of a block that must be decoded before the one right of it is decoded like any, in [0, 1].
        ahead_threshold: Confidence that a position must exceed before that, whatever the policy says, in [0, 1].

    Raises:
        UserError: When a length, the batch size or `blocks` is below 1, or a share or threshold outside [0, 1].
    """

    engine = MultiBlockEngine

    blocks: int = field(default=2, kw_only=True)
    open_at: float = field(default=0.1, kw_only=True)
    settled_at: float = field(default=0.95, kw_only=True)
    ahead_threshold: float = field(default=0.9, kw_only=True)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(1, math.inf, "blocks")
        self.check_range(0, 1, "open_at", "settled_at", "ahead_threshold")

    @property
    def blocks_per_forward(self) -> int:
        return 2 * self.blocks  # all open ones finished at once, and as many again
