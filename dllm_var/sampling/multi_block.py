"""Multi-block decoding: later blocks start before the earlier ones are finished (d3LLM, arXiv 2601.07568)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.arrays import arrays, on_host, tensors, there
from dllm_var.sampling.base import Request, check_at_least_one
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler
from dllm_var.sampling.block_run import BlockRun
from dllm_var.sampling.commit import STEPS_WITH_REMASKING, choose_commits, count_left, outcome
from dllm_var.sampling.policies import BlockView, Decision, UnmaskingPolicy

_FORWARDS_PER_BLOCK = 1 << 16  # what tells the draws of blocks in one forward apart


class MultiBlockRun(BlockRun):
    """Rows in flight with several open blocks each: `prompt | finished | leading block | next block | ... | masks`.

    A row's `width` is that of its open blocks together; `widths`, `left` (masked positions) and `steps` have one entry
    per block. To the policy each block is a row of its own, with a memory of its own, so every policy serves. The
    leading block gets what the base sampler would give it; see `_commit` for those behind it.
    """

    sampler: MultiBlockSampler
    per_slot: ClassVar = (*BlockRun.per_slot, "widths", "left")

    def __init__(
        self, sampler: MultiBlockSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        super().__init__(sampler, model, prompts, request)
        shape = (self.prompt.size, sampler.blocks)
        self.state = {name: value[:, None].repeat_interleave(shape[1], 1) for name, value in self.state.items()}
        self.widths, self.left, self.steps = (np.zeros(shape, np.int64) for _ in "123")

    def _start_block(self, slot: int) -> None:
        """Makes the row's first open block the leading one; opens it when there is none."""
        if self.nfe[slot] == 0:  # the row's first block
            self.widths[slot] = self.left[slot] = 0
        if not self.widths[slot, 0]:
            super()._start_block(slot)
            self.widths[slot, 0] = self.left[slot, 0] = self.width[slot]
        self.width[slot], self.masked_left[slot] = self.widths[slot].sum(), self.left[slot].sum()

    def _denoise(
        self, rows: np.ndarray, index: Tensor | None, hidden: Tensor, pending: np.ndarray, width: np.ndarray
    ) -> None:
        """Predicts all open blocks, applies the policy to each, ends blocks and rows, and opens further blocks."""
        widths = np.where(width[:, None] > 0, self.widths[rows], 0)
        widths = widths[:, : int((widths > 0).sum(1).max())]  # [R, B]
        starts = np.concatenate((np.zeros_like(widths[:, :1]), widths.cumsum(1)), axis=1)
        offsets = np.arange(self.sampler.block_length)
        inside_on_host = offsets < widths[:, :, None]  # [R, B, K]
        at = starts[:, :-1, None] + offsets
        # What is no block's position is written to the canvas's last column, which no row reaches.
        nowhere = self.canvas.size(1) - 1
        place_on_host = np.where(inside_on_host, self.cache.lengths[rows][:, None, None] + at, nowhere)
        place, inside = (
            torch.from_numpy(a.reshape(rows.size, -1)).to(self.device) for a in (place_on_host, inside_on_host)
        )
        view = self._view_blocks(rows, hidden, pending[:, None, None] + at, widths, place, inside)

        blocks, slots = widths.shape[1], slice(None) if index is None else index
        decoded = np.flatnonzero(width > 0)
        state = {name: value[slots][:, :blocks].flatten(0, 1).clone() for name, value in self.state.items()}
        decision = self._decide(rows, index, width, view, state)
        source, target = torch.from_numpy(np.stack((decoded, rows[decoded]))).to(self.device)
        for name, value in state.items():
            self.state[name][target, :blocks] = value.unflatten(0, (-1, blocks))[source]

        share = 1 - self.left[rows][:, :blocks] / np.maximum(widths, 1)  # decoded before this step
        settled = np.concatenate((np.ones_like(share[:, :1]), share[:, :-1]), axis=1) >= self.sampler.settled_at
        tokens, masked, written, ending = self._commit(view, decision, torch.from_numpy(settled).to(self.device))
        _, cells = there(self.device, self._cells(rows, place_on_host.reshape(rows.size, -1)))
        self._write(rows, cells, *arrays(tokens.flatten(1), written.flatten(1))[1:])
        finish_row = None if decision.finish_row is None else decision.finish_row[::blocks]
        whole = Decision(commit=inside, finish_row=finish_row)
        _, ends, _ = outcome(whole, tokens.flatten(1), masked.flatten(1), inside, self.terminators)
        kept = torch.zeros_like(inside[:, :1]) if decision.keep_open is None else decision.keep_open.view(-1, blocks)
        # The step's one wait for the device.
        left, ends_on_host, ending_on_host, kept_on_host = on_host(
            masked.sum(2), *(value.expand(-1, blocks) for value in (ends[:, None], ending[:, None], kept))
        )
        self.left[rows[decoded], :blocks] = left[decoded]
        self.masked_left[rows[decoded]] = left[decoded].sum(1)
        self.steps[rows[decoded], :blocks] += widths[decoded] > 0
        complete = (widths > 0) & (left == 0) & (kept_on_host == 0)
        over = (ends_on_host[:, 0] >= 0) | complete[:, 0]
        for row in decoded[over[decoded]].tolist():
            end = int(ends_on_host[row, 0])
            self._settle_row(int(rows[row]), end, starts[row], kept_on_host[row], int(complete[row].cumprod().sum()))
        self._open_blocks(rows[decoded[ending_on_host[decoded, 0] == 0]])

    def _view_blocks(
        self, rows: np.ndarray, hidden: Tensor, at: np.ndarray, widths: np.ndarray, place: Tensor, inside: Tensor
    ) -> BlockView:
        """Scores every block as a row of its own, R * B rows in all; `at` [R, B, K] is where it is in the forward."""
        (size, blocks), block_length = widths.shape, self.sampler.block_length
        length, row = hidden.size(1), np.arange(size)[:, None, None]
        chosen = torch.from_numpy((np.minimum(at, length - 1) + row * length).reshape(-1)).to(self.device)
        hidden = hidden.flatten(0, 1).index_select(0, chosen).view(size * blocks, block_length, -1)
        masks = int((self.left[rows][:, :blocks] * (widths > 0)).sum())
        key = (self.keys[self.prompt[rows]] + self.nfe[rows])[:, None] + np.arange(blocks) * _FORWARDS_PER_BLOCK
        steps = self.steps[rows][:, :blocks]
        slots = torch.from_numpy(rows).to(self.device)[:, None]
        return self._view(
            hidden,
            torch.zeros(size * blocks, dtype=torch.long, device=self.device),
            self.canvas[slots, place].view(-1, block_length),
            inside.view(-1, block_length),
            int(widths.sum()) if self.sampler.policy.scores_committed else masks,
            torch.from_numpy(steps.reshape(-1)).to(self.device),
            self._progress(rows).repeat_interleave(blocks),
            torch.from_numpy(key.reshape(-1)).to(self.device),
        )

    def _commit(self, view: BlockView, decision: Decision, settled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns tokens, masked and written positions [R, B, K], and the rows [R] whose end is in sight.

        A block behind the leading one commits what the policy says and no more: no position has to be filled at each
        step. Until the block left of it is `settled` [R, B] each position must also exceed the threshold for running
        ahead. Nothing is committed right of where a terminator is predicted, nor a terminator before all left of it.
        """
        blocks, terminators, last = settled.size(1), self.terminators, self.sampler.terminator_last
        leading = choose_commits(*_leading(view, decision, blocks), self.mask_id, terminators, last)
        xp, masked, given, proposed, changeable = arrays(
            view.masked, view.tokens, view.predicted if decision.tokens is None else decision.tokens, view.changeable
        )
        shape = (-1, blocks, given.shape[1])
        is_end = is_one_of(proposed, terminators) & masked
        ended = is_one_of(given, terminators) & changeable & ~masked
        ending = (is_end | ended).reshape(shape[0], blocks * shape[2]).any(1)
        if blocks == 1:
            return (*(value[:, None] for value in leading), *tensors(ending))
        _, commit, confidence, sure = arrays(decision.commit, view.confidence, settled)
        if decision.finish_block is not None:
            commit = commit | arrays(decision.finish_block)[1][:, None]
        commit = commit & masked & (sure.reshape(-1, 1) | (confidence > self.sampler.ahead_threshold))
        commit = commit & (count_left(is_end.reshape(settled.shape[0], -1)) == 0).reshape(given.shape)
        if last:
            still_open = (masked & ~(commit & ~is_end)).reshape(shape)
            still_open[:, 0] = arrays(leading[1])[1]
            filled = count_left(still_open.reshape(settled.shape[0], -1)) == 0
            commit = commit & (~is_end | filled.reshape(given.shape))
        written = commit
        if decision.edit is not None:
            written = written | (arrays(decision.edit)[1] & changeable & ~masked)
        tokens, masked = xp.where(written, proposed, given), masked & ~commit
        if decision.remask is not None:
            _, remask, step = arrays(decision.remask, view.step)
            in_time = step < STEPS_WITH_REMASKING * given.shape[1]
            remask = remask & changeable & ~commit & in_time[:, None]
            tokens, masked = xp.where(remask, self.mask_id, tokens), masked | remask
        result = tensors(tokens.reshape(shape), masked.reshape(shape), written.reshape(shape))
        for value, of_leading in zip(result, leading, strict=True):
            value[:, 0] = of_leading
        return (*result, *tensors(ending))

    def _settle_row(self, slot: int, end: int, starts: np.ndarray, kept: np.ndarray, complete: int) -> None:
        """Ends what is over in a row after a step: the row itself, or its first `complete` blocks.

        Args:
            slot: The row's place.
            end: Where its answer ends, counted as if all blocks were full; -1 when it does not.
            starts: Where each block begins behind the cached tokens, and where the last one ends [B + 1].
            kept: The blocks that the policy keeps open [B].
            complete: Finished blocks.
        """
        if end >= 0:
            block, offset = divmod(end, self.sampler.block_length)
            stop = int(starts[block]) + offset
            if not kept[: block + 1].any():
                self._end_block(slot, stop)
                return
            # Kept open for edits: nothing behind the answer's end is decoded any more.
            begins = self.widths[slot].cumsum() - self.widths[slot]
            self.widths[slot] = np.minimum(self.widths[slot], np.maximum(stop + 1 - begins, 0))
            self.width[slot], self.left[slot], self.masked_left[slot] = self.widths[slot].sum(), 0, 0
        if complete:
            self.width[slot] = self.widths[slot, :complete].sum()
            for table in (self.widths, self.left, self.steps):
                table[slot] = np.append(table[slot, complete:], np.zeros(complete, np.int64))
            for value in self.state.values():
                value[slot, :-complete] = value[slot, complete:].clone()
            self._end_block(slot, -1)

    def _open_blocks(self, slots: np.ndarray) -> None:
        """Opens one more block in the rows whose last open one is decoded far enough."""
        opened = (self.widths[slots] > 0).sum(1)
        last = np.maximum(opened - 1, 0)
        share = 1 - self.left[slots, last] / np.maximum(self.widths[slots, last], 1)
        may = self.active[slots] & (opened < self.sampler.blocks) & (share >= self.sampler.open_at)
        for slot, block in zip(slots[may].tolist(), opened[may].tolist(), strict=True):
            width = self._next_width(slot, int(self.cache.lengths[slot] + self.pending[slot] + self.width[slot]))
            if width <= 0:  # the limit
                continue
            self.widths[slot, block] = self.left[slot, block] = width
            self.width[slot], self.masked_left[slot] = self.width[slot] + width, self.masked_left[slot] + width
            for name, value in self.template.items():
                self.state[name][slot, block] = value


def _leading(view: BlockView, decision: Decision, blocks: int) -> tuple[BlockView, Decision]:
    """Returns the first of every `blocks` blocks and what was decided for it, as far as commits go."""
    if blocks == 1:
        return view, decision
    first = slice(None, None, blocks)
    of_row = ("tokens", "masked", "changeable", "step", "progress", "key")
    leading = replace(view, **{name: getattr(view, name)[first] for name in of_row})
    leading.__dict__.update(predicted=view.predicted[first], confidence=view.confidence[first])
    decided: dict[str, Any] = {field.name: getattr(decision, field.name) for field in fields(decision)}
    taken: dict[str, Any] = {name: None if value is None else value[first] for name, value in decided.items()}
    return leading, Decision(**taken)


class MultiBlockSampler(BlockDiffusionSampler):
    """Block diffusion in which the next blocks are begun before the leading one is finished (d3LLM, 2601.07568).

    A forward takes all open blocks. A further one opens when the last is decoded to some share; it commits what the
    policy is sure of, while only the leading block is made to fill a position at each step. Once the leading block is
    full it enters the cache as the base sampler's do. d3LLM's own policy is `EntropyThreshold`, and its model is
    trained for it: one that is not sees more masks behind a block than it was trained with.

    Args:
        policy: Decides which masked positions become tokens at each step; `ConfidenceThreshold(0.9)` when null.
        blocks: Most blocks open at a time; 1 is the base sampler.
        open_at: Share of the last open block that must be decoded before the next one opens, in [0, 1].
        settled_at: Share of a block that must be decoded before the one right of it is decoded like any, in [0, 1].
        ahead_threshold: Confidence that a position must exceed before that, whatever the policy says, in [0, 1].
        block_length: Tokens in a block.
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        terminator_last: Commits a terminator only when everything left of it is, and nothing right of a sure one.
        kv_commit: How a finished block enters the cache: `joint_next`, `alone` or `last_step`.
        grid: Where blocks start: at the `prompt`'s end or at `absolute` multiples of the block length.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws; a row's draws do not depend on its batch.

    Raises:
        UserError: When a length, the batch size or `blocks` is below 1, or a share or threshold outside [0, 1].
    """

    run_class = MultiBlockRun

    def __init__(
        self,
        policy: UnmaskingPolicy | None = None,
        blocks: int = 2,
        open_at: float = 0.1,
        settled_at: float = 0.95,
        ahead_threshold: float = 0.9,
        block_length: int = 64,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        terminator_last: bool = True,
        kv_commit: Literal["joint_next", "alone", "last_step"] = "joint_next",
        grid: Literal["prompt", "absolute"] = "prompt",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_at_least_one(blocks=blocks)
        for name, value in (("open_at", open_at), ("settled_at", settled_at), ("ahead_threshold", ahead_threshold)):
            if not 0 <= value <= 1:
                raise UserError(f"sampler.{name} must be in [0, 1], got {value}")
        super().__init__(
            policy,
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
        self.blocks, self.open_at = blocks, open_at
        self.settled_at, self.ahead_threshold = settled_at, ahead_threshold
        self.blocks_per_window = 2 * blocks  # all open ones finished at once, and as many again
