"""Diffusion on a canvas of fixed length, as LLaDA decodes, with or without approximate caches: the baseline."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.engine import Batch, Engine, EngineSampler, Row
from dllm_var.sampling.policies import ONE_AT_A_TIME, FixedSteps, UnmaskingPolicy
from dllm_var.sampling.policies.base import take_step


class CanvasEngine(Engine[Row]):
    """Groups of rows `prompt | canvas`; prompts differ in length, and all rows work on the same block of the canvas."""

    sampler: FixedLengthSampler
    place: Tensor  # the block's positions in the rows [R, K]
    free_share = 1.0  # a group enters when the last one is done

    def __init__(
        self, sampler: FixedLengthSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        limit = request.max_new_tokens or sampler.canvas_length
        self.block = min(sampler.block_length or limit, limit)
        super().__init__(sampler, model, prompts, request, slack=self.block)
        if sampler.cache != "none":
            self.cache = self.add_cache(model)

    def start(self, slot: int) -> None:
        self.offset = self.step = 0  # where in the canvas the block begins, and the steps it has had

    def compact(self, kept: list[int]) -> None:
        if not self.active:  # a group keeps its places
            super().compact(kept)

    def forward(self, batch: Batch[Row]) -> None:
        """Denoises the block by one step, for all rows together; goes on to the next block when no row has masks."""
        if self.step == 0:
            self._open_block()
        batch = batch if batch.index is None else self.batch()
        place, tokens = self.place, self.canvas.gather(1, self.place)
        decoded = torch.tensor([row.left > 0 for row in batch.rows])
        for row in batch.rows:
            row.nfe += row.left > 0
        hidden, shift = self._hidden(~decoded)
        slot = torch.arange(len(batch.rows), device=self.device)[:, None]
        nfe, key = torch.tensor([(row.nfe, row.key + row.nfe) for row in batch.rows], device=self.device).unbind(1)
        view = self.view(
            hidden,
            slot * hidden.size(1) + shift[:, None] + torch.arange(place.size(1), device=self.device),
            tokens,
            decoded.to(self.device)[:, None].expand_as(place),
            sum(self.scored(row) for row in batch.rows if row.left),
            step=torch.full_like(nfe, self.step),
            progress=torch.full_like(nfe, self.offset / self.limit, dtype=torch.float),
            key=key,
        )
        step = take_step(view, self.decide(batch, view), self.mask_id, self.terminators, terminator_last=False)
        self.write(slot * self.capacity + place, step.tokens, step.written, nfe)
        if self.sampler.cache == "dkv":
            self.settled.scatter_(1, place, self.settled.gather(1, place) & (step.tokens == tokens))
            self.unsettled = (self.real & ~self.settled).sum(1).cpu()
        for row, left in zip(batch.rows, step.left.tolist(), strict=True):
            row.left = left
        self.step += 1
        if not any(row.left for row in batch.rows):
            self._end_block()

    def _open_block(self) -> None:
        """Opens the block at `offset` in every row; before the first one, lays out the group."""
        if self.offset == 0:
            self.prompt_lengths = torch.tensor([row.prompt_length for row in self.rows])
            self.row_lengths = self.prompt_lengths + self.limit
            self.width = int(self.row_lengths.max())
            lengths = self.row_lengths.to(self.device)
            self.real = torch.arange(self.width, device=self.device) < lengths[:, None]
            self.segments = None if bool(self.real.all()) else (~self.real).long()  # padding is a segment of its own
            self.settled = torch.zeros_like(self.real)  # `dkv`: positions that have been run as what they are,
            self.unsettled = self.row_lengths  # and how many of each row have not
        width = min(self.block, self.limit - self.offset)
        self.begins = self.prompt_lengths + self.offset
        begin = self.begins.to(self.device)
        self.place = begin[:, None] + torch.arange(width, device=self.device)
        assert self.sampler.policy is not None  # set by its `__post_init__`
        self.use_policy(self.sampler.policy, width)
        for row in self.rows:
            row.width = row.left = width if row.index >= 0 else 0

    def _end_block(self) -> None:
        """Tells every row's answer so far: up to its first terminator, or its first mask while it has one."""
        self.offset, self.step = self.offset + self.place.size(1), 0
        last, ends = self.offset >= self.limit, {*self.terminators, self.mask_id}
        for slot in self.active:
            start = self.rows[slot].prompt_length
            tokens = self.canvas[slot, start : start + self.limit].tolist()
            end = next((place for place, token in enumerate(tokens) if token in ends), self.limit)
            reason = "eos" if end < self.limit and tokens[end] != self.mask_id else "length"
            self.tell(slot, start + end, reason if last else None)

    def _hidden(self, done: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden states [R, L, hidden] of a step's forward and where each row's block begins in them [R].

        `done` says whose block is full [R]; the forward is for the others.
        """
        begin, tokens = self.place[:, 0], self.canvas[:, : self.width]
        if self.sampler.cache == "none":
            return self.model.hidden_states(tokens, segment_ids=self.segments), begin
        kind, width = self.sampler.cache, self.place.size(1)
        if self._runs_whole_row():
            self.cache.lengths[:] = 0
            self.cache.open(self.width, self.row_lengths)
            self.settled = tokens != self.mask_id
            return self.model.hidden_states(tokens, cache=self.cache), begin
        if kind == "dkv":
            return self._hidden_of_unsettled(tokens), torch.zeros_like(begin)
        self.cache.lengths[:] = self.begins
        if kind == "free":  # a full block keeps what its last step gave
            self.cache.lengths += width * done
        wide = width if kind == "dual" else int((self.row_lengths - self.begins).max())
        self.cache.open(wide, visible=self.row_lengths)
        window = self.cache.positions.clamp(max=self.width - 1)
        return self.model.hidden_states(tokens.gather(1, window), cache=self.cache), torch.zeros_like(begin)

    def _runs_whole_row(self) -> bool:
        if self.sampler.cache == "dkv":
            return self.step == 1 or self.step % self.sampler.refresh_every == 0
        return self.step == 0 and (self.sampler.cache != "free" or self.offset == 0)

    def _hidden_of_unsettled(self, tokens: Tensor) -> Tensor:
        """Runs the positions that are masked or have just changed; returns the block's hidden states [R, K, hidden]."""
        run = self.real & ~self.settled
        width, number = int(self.unsettled.max()), self.unsettled.to(self.device)
        window = (~run).long().argsort(dim=1, stable=True)[:, :width]  # [R, L], the positions to run first
        beyond = torch.arange(width, device=self.device) >= number[:, None]
        # A row with fewer positions than the widest keeps its padding behind the canvas, where nobody looks.
        slots = window.masked_fill(beyond, self.width)
        self.cache.lengths[:] = 0
        self.cache.open(width, visible=self.row_lengths, slots=slots, positions=window)
        hidden = self.model.hidden_states(tokens.gather(1, window), cache=self.cache)
        self.settled = self.settled | (run & (tokens != self.mask_id))
        order = (run.cumsum(dim=1) - 1).gather(1, self.place).clamp(0, width - 1)  # in the window, if it is there
        return hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.size(2)))


@dataclass(eq=False)
class FixedLengthSampler(EngineSampler):
    """Fills a canvas of fixed length block by block, with every later mask in view, and cuts at the first terminator.

    LLaDA, arXiv 2502.09992, algorithm 5. Without a cache every step runs the whole row; a cache keeps the keys and
    values of some positions from an earlier step:

    - `prefix`, `dual` (Fast-dLLM, 2505.22618, section 3.2): a block's first step runs the whole row; later steps run
      the block and what is right of it, or the block alone.
    - `dkv` (dKV-Cache-Decode, 2505.15781): a step runs what is masked and what the step before committed, so that a
      token is run once as itself and then kept; the first two and every `refresh_every`-th step of a block run the
      whole row.
    - `free` (FreeCache, 2505.21467): a step runs the block and what is right of it; the prompt and finished blocks keep
      what their own last step gave. Nothing is refreshed: a block's last tokens are remembered as masks.

    Args:
        policy: Decides what is committed at each step; one token per step when None.
        canvas_length: Masks behind the prompt; the answer's length limit.
        block_length: The canvas is filled from left to right in blocks of this many positions; all at once when None.
        cache: `none`, or one of the above.
        refresh_every: Steps of a block from one run of the whole row to the next, for `dkv`.

    Raises:
        UserError: When a length, refresh_every or the batch size is below 1, or for `dkv` with a policy that needs to
            see committed positions predicted again.
    """

    engine = CanvasEngine

    policy: UnmaskingPolicy | None = None
    _: KW_ONLY
    canvas_length: int = 256
    block_length: int | None = None
    cache: Literal["none", "prefix", "dual", "dkv", "free"] = "none"
    refresh_every: int = 8
    max_new_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "canvas_length", "block_length", "refresh_every")
        self.max_new_tokens = self.canvas_length
        super().__post_init__()
        self.policy = self.policy or FixedSteps(steps=ONE_AT_A_TIME)
        if self.cache == "dkv" and self.policy.scores_committed:
            name = type(self.policy).__name__
            raise UserError(f"sampler.cache dkv does not run the committed positions that {name} needs: use another")
