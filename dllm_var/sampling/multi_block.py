"""Multi-block decoding: later blocks start before the earlier ones are finished (d3LLM, arXiv 2601.07568)."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockEngine, BlockLengthPolicy
from dllm_var.sampling.engine import Batch, Row
from dllm_var.sampling.policies import BlockView, Decision
from dllm_var.sampling.policies.base import commit, outcome

_FORWARDS_PER_BLOCK = 1 << 16  # what tells the draws of blocks in one forward apart


@dataclass(eq=False)
class OpenBlock:
    width: int
    left: int  # masked positions
    steps: int = 0  # denoising steps so far


@dataclass(eq=False)
class MultiBlockRow(Row):
    """A row whose `width` and `left` are those of its open blocks together, the leading one first."""

    open: list[OpenBlock] = field(default_factory=list)

    def add_up(self) -> None:
        self.width, self.left = sum(block.width for block in self.open), sum(block.left for block in self.open)


class MultiBlockEngine(BlockEngine[MultiBlockRow]):
    """Rows `prompt | finished | leading block | next block | ... | masks`, of which at most B blocks are open.

    To the policy each open block is a row of its own, with a memory of its own, so every policy serves.
    """

    sampler: "MultiBlockSampler"
    row_class = MultiBlockRow

    def start(self, slot: int) -> None:
        """Opens a leading block when the row has no other open one."""
        row = self.rows[slot]
        if not row.open:
            super().start(slot)
            row.open = [OpenBlock(row.width, row.width)]
        row.add_up()
        self.align(slot)

    def in_sight(self, slot: int) -> tuple[int, list[int]]:
        row, (stop, [finished]) = self.rows[slot], super().in_sight(slot)
        return stop, [finished + start - row.shown for start, *_ in self.blocks(row, 1)[: len(row.open)]]

    def blocks(self, row: MultiBlockRow, width: int) -> list[tuple[int, int, int, int]]:
        start, found = row.shown, list[tuple[int, int, int, int]]()
        for block in row.open if width else []:
            found.append((start, block.width, block.steps, len(found) * _FORWARDS_PER_BLOCK))
            start += block.width
        return found + [(start, 0, 0, 0)] * (self.sampler.blocks - len(found))

    def read_window(self, batch: Batch[MultiBlockRow]) -> Tensor:
        if self.sampler.sees_ahead or self.model.config.grid:  # a block-causal model never sees ahead
            return super().read_window(batch)
        counts, pending = batch.pending + batch.width, batch.pending[:, None, None]
        prompt = torch.tensor([row.prompt_length for row in batch.rows], device="cpu")[:, None]
        place = torch.arange(int(counts.max()), device="cpu")
        position = self.cache.lengths[batch.slots][:, None] + place  # [R, L]
        first = prompt if self.sampler.grid == "prompt" else 0
        block = torch.where(position < prompt, -1, (position - first) // self.sampler.block_length)
        seen = block[:, None] <= block[:, :, None]
        if self.model.config.causal_context:  # pending tokens see their own left alone
            seen = seen & ((place <= place[:, None]) | (place[:, None] >= pending))
        padding = (place >= counts[:, None])[:, :, None]  # it sees everything, so that no softmax is empty
        return self.read(batch, counts, batch.pending, seen=(seen | padding).to(self.device))

    def predict(self, batch: Batch[MultiBlockRow], hidden: Tensor) -> None:
        """Takes all open blocks one denoising step further; ends blocks and rows, and opens further blocks."""
        cells, nfe, view = self.view_blocks(batch, hidden)
        decision = self.decide(batch, view)
        tokens, masked, written, ends = self._commit(view, decision)
        self.write(cells, tokens, written, nfe, self.wanted_log_probabilities(view, tokens))
        whole, blocks = (len(batch.rows), -1), self.sampler.blocks
        finish_row = None if decision.finish_row is None else decision.finish_row[::blocks]
        after, masks, inside = (each.view(whole) for each in (tokens, masked, view.changeable))
        _, end = outcome(after, masks, inside, self.terminators, finish_row)
        left = masked.sum(1)
        kept = torch.zeros_like(left) if decision.keep_open is None else decision.keep_open
        # The step's one wait for the device.
        status = torch.cat((end[:, None], ends.view(whole).any(1, keepdim=True), left.view(whole), kept.view(whole)), 1)
        for slot, wide, line in zip(batch.slots, batch.width.tolist(), status.tolist(), strict=True):
            if wide:
                end_of_row, end_in_sight, *of_blocks = line
                self._settle_row(slot, end_of_row, of_blocks[:blocks], of_blocks[blocks:])
                if not end_in_sight and self.rows[slot].index >= 0:
                    self._open_block(slot)

    def _commit(self, view: BlockView, decision: Decision) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns tokens, masked and written positions, and where a terminator is or is predicted, each [R * B, K].

        A block behind the leading one commits what the policy says and no more: no position has to be filled at each
        step. Until the block left of it is settled each position must also exceed the threshold for running ahead.
        Nothing is committed right of where a terminator is predicted, nor a terminator before all left of it.
        """
        sampler, of_row = self.sampler, (-1, self.sampler.blocks * view.tokens.size(1))
        leading = torch.arange(len(view.tokens), device=self.device) % sampler.blocks == 0  # [R * B]
        # In float64, in which shares such as 0.6 compare as one expects.
        decoded = 1 - view.masked.sum(1).double() / view.changeable.sum(1).clamp_min(1)
        settled = (decoded >= sampler.settled_at).roll(1)  # of the block left of each
        proposed = view.predicted if decision.tokens is None else decision.tokens
        is_end = is_one_of(proposed, self.terminators) & view.masked
        ends = is_end | (is_one_of(view.tokens, self.terminators) & view.changeable & ~view.masked)
        proposed_ends = is_end.view(of_row)
        before_end = (proposed_ends.cumsum(1) <= proposed_ends).view_as(is_end)  # no end is predicted left of it
        wanted, finish = decision.commit, decision.finish_block
        ahead = wanted if finish is None else wanted | finish[:, None]
        ahead = ahead & before_end & (settled[:, None] | (view.confidence > sampler.ahead_threshold))
        limited = replace(
            decision,
            commit=torch.where(leading[:, None], wanted, ahead),
            finish_block=None if finish is None else finish & leading,
        )
        last = sampler.terminator_last
        tokens, masked, written = commit(view, limited, self.mask_id, self.terminators, last, leading)
        if last:
            has_masks = masked.any(1).view(-1, sampler.blocks)
            masks_left = (has_masks.cumsum(1) > has_masks.long()).flatten()  # in an earlier block
            waits = written & is_end & (masks_left & ~leading)[:, None]
            tokens, masked, written = tokens.masked_fill(waits, self.mask_id), masked | waits, written & ~waits
        return tokens, masked, written, ends

    def _settle_row(self, slot: int, end: int, left: list[int], kept: list[int]) -> None:
        """Ends a row after a step, or its first blocks, if they are over.

        `end` is where its answer ends as if all blocks were of full width, or -1; `left` are the masks of each block
        [B], and `kept` says which blocks the policy keeps open [B].
        """
        row = self.rows[slot]
        for block, masks in zip(row.open, left, strict=False):
            block.left, block.steps = masks, block.steps + 1
        if end >= 0:
            block_at, offset = divmod(end, self.sampler.block_length)
            if not any(kept[: block_at + 1]):
                self.end_block(slot, sum(block.width for block in row.open[:block_at]) + offset)
                return
            # Kept open for edits: nothing behind the answer's end is decoded any more.
            row.open = row.open[: block_at + 1]
            row.open[-1].width = offset + 1
            for block in row.open:
                block.left = 0
            row.add_up()
            self.align(slot)
        row.add_up()
        complete = 0
        while complete < len(row.open) and not left[complete] and not kept[complete]:
            complete += 1
        if complete:
            row.width = sum(block.width for block in row.open[:complete])
            del row.open[:complete]
            for value in self.state.values():
                value[slot, :-complete] = value[slot, complete:].clone()
            self.end_block(slot, -1)

    def _open_block(self, slot: int) -> None:
        """Opens a further block when the row's last open one is decoded far enough."""
        row, last = self.rows[slot], self.rows[slot].open[-1]
        if len(row.open) == self.sampler.blocks or 1 - last.left / max(last.width, 1) < self.sampler.open_at:
            return
        finished = int(self.cache.lengths[slot]) + row.pending + row.shown + row.width
        width = self.next_width(slot, finished)
        if width > 0:  # below the limit
            self.canvas[slot, finished:] = self.mask_id  # tokens behind a terminator that was edited away
            row.open.append(OpenBlock(width, width))
            row.add_up()
            self.align(slot)


@dataclass(eq=False)
class MultiBlockSampler(BlockDiffusionSampler):
    """Block diffusion in which the next blocks are begun before the leading one is finished (d3LLM, 2601.07568).

    A forward takes all open blocks. A further one opens when the last is decoded to some share; it commits what the
    policy is sure of, while only the leading block is made to fill a position at each step. Once the leading block is
    full it enters the cache as the base sampler's do. d3LLM's own policy is `EntropyThreshold`, and its model is
    trained for it: one that is not sees more masks behind a block than it was trained with. A model that
    `objectives.MultiBlockDiffusion` has trained needs `sees_ahead: false`.

    Args:
        blocks: Most blocks open at a time; 1 is the base sampler.
        open_at: Share of the last open block that must be decoded before the next one opens, in [0, 1].
        settled_at: Share of a block that must be decoded before the one right of it is decoded like any, in [0, 1].
        ahead_threshold: Confidence that a position must exceed before that, whatever the policy says, in [0, 1].
        sees_ahead: Whether open and finished blocks see the open ones behind them in a forward. If not, `joint_next`
            and `alone` remember the same of a finished block.
    """

    engine = MultiBlockEngine

    blocks: int = field(default=2, kw_only=True)
    open_at: float = field(default=0.1, kw_only=True)
    settled_at: float = field(default=0.95, kw_only=True)
    ahead_threshold: float = field(default=0.9, kw_only=True)
    sees_ahead: bool = field(default=True, kw_only=True)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(1, math.inf, "blocks")
        self.check_range(0, 1, "open_at", "settled_at", "ahead_threshold")

    @property
    def blocks_per_forward(self) -> int:
        return self.blocks
