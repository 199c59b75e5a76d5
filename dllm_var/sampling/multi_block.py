"""Multi-block decoding: later blocks start before the earlier ones are finished (d3LLM, arXiv 2601.07568)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer
from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.base import Request
from dllm_var.sampling.block_diffusion import Batch, BlockDiffusionSampler, BlockEngine
from dllm_var.sampling.block_length import BlockLengthPolicy
from dllm_var.sampling.engine import STEPS_WITH_REMASKING, Engine, Row, commit, outcome
from dllm_var.sampling.policies import BlockView, Decision

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


class MultiBlockEngine(BlockEngine[MultiBlockRow]):
    """Rows `prompt | finished | leading block | next block | ... | masks`.

    To the policy each open block is a row of its own, with a memory of its own, so every policy serves. The leading
    block gets what the base sampler would give it; see `_commit` for those behind it.
    """

    sampler: MultiBlockSampler
    row_class = MultiBlockRow

    def __init__(
        self, sampler: MultiBlockSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        super().__init__(sampler, model, prompts, request)
        self.state = {name: value[:, None].repeat_interleave(sampler.blocks, 1) for name, value in self.state.items()}

    def start_block(self, slot: int) -> None:
        """Makes the row's first open block the leading one; opens it when there is none."""
        row = self.rows[slot]
        if not row.blocks:
            super().start_block(slot)
            row.blocks = [OpenBlock(row.width, row.width)]
        self._add_up(row)

    def _add_up(self, row: MultiBlockRow) -> None:
        row.width, row.left = sum(block.width for block in row.blocks), sum(block.left for block in row.blocks)

    def predict(self, batch: Batch, hidden: Tensor) -> None:
        """Predicts all open blocks, applies the policy to each, ends blocks and rows, and opens further blocks."""
        opened = [row.blocks if wide else [] for row, wide in zip(batch.rows, batch.width.tolist(), strict=True)]
        blocks, size = max(map(len, opened)), len(opened)
        first, done, _, _, key, nfe = self.table(batch)
        start, width, steps, settled = self._table_of_blocks(opened, blocks)
        at = start[:, :, None] + self.offsets  # [R, B, K], behind the cached tokens
        inside = self.offsets < width[:, :, None]
        # What is no block's position is written to the canvas's last column, which no row reaches.
        nowhere = torch.tensor(batch.slots, device=self.device)[:, None, None] * self.capacity + self.capacity - 1
        cells = torch.where(inside, first[:, None, None] + at, nowhere)
        pending = batch.pending.to(self.device)[:, None, None]
        row = torch.arange(size, device=self.device)[:, None, None]
        tokens, all_scored = self.canvas.take(cells), self.policy.scores_committed
        view = self.view(
            hidden,
            (row * hidden.size(1) + (pending + at).clamp_max(hidden.size(1) - 1)).flatten(0, 1),
            tokens.flatten(0, 1),
            inside.flatten(0, 1),
            sum(block.width if all_scored else block.left for of_row in opened for block in of_row),
            step=steps.flatten(),
            progress=(done / self.limit).repeat_interleave(blocks),
            key=(key[:, None] + torch.arange(blocks, device=self.device) * _FORWARDS_PER_BLOCK).flatten(),
            all_scored=all_scored,
        )
        state = {name: value[batch.slots][:, :blocks].flatten(0, 1) for name, value in self.state.items()}
        decision = self.policy.decide(view, state)
        decoded = batch.width > 0
        slots = torch.tensor(batch.slots)[decoded]
        for name, value in state.items():
            self.state[name][slots, :blocks] = value.unflatten(0, (-1, blocks))[decoded]
        tokens, masked, written, ending = self._commit(view, decision, settled.bool())
        self.write(cells.flatten(1), tokens.flatten(1), written.flatten(1), nfe)
        finish_row = None if decision.finish_row is None else decision.finish_row[::blocks]
        whole = Decision(commit=view.masked, finish_row=finish_row)
        _, end, _ = outcome(whole, tokens.flatten(1), masked.flatten(1), inside.flatten(1), self.terminators)
        kept = torch.zeros_like(width) if decision.keep_open is None else decision.keep_open.view(-1, blocks)
        # The step's one wait for the device.
        status = torch.cat((end[:, None], ending[:, None], masked.sum(2), kept), dim=1).tolist()
        for slot, of_row, (end_of_row, end_in_sight, *others) in zip(batch.slots, opened, status, strict=True):
            if of_row:
                self._settle_row(slot, end_of_row, others[:blocks], others[blocks:])
                if not end_in_sight and self.rows[slot].index >= 0:
                    self._open_block(slot)

    def _table_of_blocks(self, opened: list[list[OpenBlock]], blocks: int) -> Tensor:
        """Returns where each block begins, its width, its steps, and if the block left of it is settled [4, R, B]."""
        table = []
        for of_row in opened:
            start, settled, lines = 0, 1, []
            for block in of_row:
                lines.append((start, block.width, block.steps, settled))
                start, settled = start + block.width, int(block.decoded >= self.sampler.settled_at)
            table.append(lines + [(start, 0, 0, 1)] * (blocks - len(lines)))
        return torch.tensor(table).permute(2, 0, 1).contiguous().to(self.device)

    def _commit(self, view: BlockView, decision: Decision, settled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns tokens, masked and written positions [R, B, K], and the rows [R] whose end is in sight.

        A block behind the leading one commits what the policy says and no more: no position has to be filled at each
        step. Until the block left of it is `settled` [R, B] each position must also exceed the threshold for running
        ahead. Nothing is committed right of where a terminator is predicted, nor a terminator before all left of it.
        """
        (rows, blocks), width, last = settled.shape, view.tokens.size(1), self.sampler.terminator_last
        shape = (rows, blocks, width)
        as_leading = [
            value.view(shape) for value in commit(view, decision, self.mask_id, self.terminators, last)
        ]  # of these the first block is right
        masked, given, changeable = view.masked, view.tokens, view.changeable
        proposed = view.predicted if decision.tokens is None else decision.tokens
        is_end = is_one_of(proposed, self.terminators) & masked
        ended = is_one_of(given, self.terminators) & changeable & ~masked
        ending = (is_end | ended).view(rows, -1).any(1)
        if blocks == 1:
            return as_leading[0], as_leading[1], as_leading[2], ending
        chosen = decision.commit
        if decision.finish_block is not None:
            chosen = chosen | decision.finish_block[:, None]
        chosen = chosen & masked & (settled.view(-1, 1) | (view.confidence > self.sampler.ahead_threshold))
        chosen = chosen & _nothing_left(is_end.view(rows, -1)).view_as(chosen)
        if last:
            still_open = (masked & ~(chosen & ~is_end)).view(shape)
            still_open[:, 0] = as_leading[1][:, 0]
            chosen = chosen & (~is_end | _nothing_left(still_open.view(rows, -1)).view_as(chosen))
        written = chosen
        if decision.edit is not None:
            written = written | (decision.edit & changeable & ~masked)
        tokens, masked = torch.where(written, proposed, given), masked & ~chosen
        if decision.remask is not None:
            in_time = view.step < STEPS_WITH_REMASKING * width
            remask = decision.remask & changeable & ~chosen & in_time[:, None]
            tokens, masked = tokens.masked_fill(remask, self.mask_id), masked | remask
        ahead = (tokens, masked, written)
        both = [torch.cat((a[:, :1], b.view(shape)[:, 1:]), dim=1) for a, b in zip(as_leading, ahead, strict=True)]
        return both[0], both[1], both[2], ending

    def _settle_row(self, slot: int, end: int, left: list[int], kept: list[int]) -> None:
        """Ends what is over in a row after a step: the row itself, or its first blocks.

        Args:
            slot: The row's place.
            end: Where its answer ends, counted as if all blocks were full; -1 when it does not.
            left: Masks left in each block [B].
            kept: Whether the policy keeps each block open [B].
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
        self._add_up(row)
        if complete:
            row.width = sum(block.width for block in row.blocks[:complete])
            del row.blocks[:complete]
            for value in self.state.values():
                value[slot, :-complete] = value[slot, complete:].clone()
            self.end_block(slot, -1)

    def _open_block(self, slot: int) -> None:
        """Opens one more block in a row whose last open one is decoded far enough."""
        row = self.rows[slot]
        opened = len(row.blocks)
        if opened == self.sampler.blocks or row.blocks[-1].decoded < self.sampler.open_at:
            return
        width = self.next_width(slot, int(self.cache.lengths[slot]) + row.pending + row.width)
        if width > 0:  # below the limit
            row.blocks.append(OpenBlock(width, width))
            self._add_up(row)
            for name, value in self.template.items():
                self.state[name][slot, opened] = value


def _nothing_left(positions: Tensor) -> Tensor:
    """Says of each place [R, K] whether no true position lies strictly left of it."""
    return positions.cumsum(1) <= positions


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

    engine: ClassVar[type[Engine[Any]]] = MultiBlockEngine

    blocks: int = field(default=2, kw_only=True)
    open_at: float = field(default=0.1, kw_only=True)
    settled_at: float = field(default=0.95, kw_only=True)
    ahead_threshold: float = field(default=0.9, kw_only=True)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least_one("blocks")
        self.check_shares("open_at", "settled_at", "ahead_threshold")

    @property
    def blocks_per_forward(self) -> int:
        return 2 * self.blocks  # all open ones finished at once, and as many again
