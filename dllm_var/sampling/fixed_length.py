"""Diffusion on a canvas of fixed length, as LLaDA decodes, with or without approximate caches: the baseline."""

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.denoising import DenoisingEngine
from dllm_var.sampling.engine import Batch, EngineSampler, Row
from dllm_var.sampling.policies import ONE_AT_A_TIME, FixedSteps, UnmaskingPolicy
from dllm_var.sampling.policies.base import take_step


class CanvasEngine(DenoisingEngine[Row]):
    """Groups of rows `prompt | canvas`; prompts differ in length, and all rows work on the same block of the canvas."""

    sampler: "FixedLengthSampler"
    place: Tensor  # the block's positions in the rows [R, K]
    free_share = 1.0  # a group enters when the last one is done
    has_limits = False  # all rows of a group have the same canvas

    def __init__(
        self, sampler: "FixedLengthSampler", model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        limit = request.max_new_tokens or sampler.canvas_length
        self.block = min(sampler.block_length or limit, limit)
        super().__init__(sampler, model, prompts, request, slack=self.block)
        if sampler.cache != "none":
            self.cache = self.add_cache(model)

    def start(self, slot: int) -> None:
        self.offset = self.step = 0  # where in the canvas the block begins, and the steps it has had

    def in_sight(self, slot: int) -> tuple[int, list[int]]:
        start = self.rows[slot].prompt_length
        return start + self.limit, [start + self.offset]

    def leave(self, index: int) -> None:
        """Drops a waiting prompt; in a group a row stays until the group is done, and the caller ignores its answer."""
        if all(row.index != index for row in self.rows):
            super().leave(index)

    def compact(self, kept: list[int]) -> None:
        if not self.active:  # a group keeps its places
            super().compact(kept)

    def forward(self, batch: Batch[Row]) -> None:
        if self.step == 0:
            self._open_block()
        batch = batch if batch.index is None else self.batch()
        place, tokens = self.place, self.canvas.gather(1, self.place)
        decoded = torch.tensor([row.left > 0 for row in batch.rows])
        for row in batch.rows:
            row.nfe += row.left > 0
        hidden, in_hidden = self._read(~decoded)
        slot = torch.arange(len(batch.rows), device=self.device)[:, None]
        nfe, key = torch.tensor([(row.nfe, row.key + row.nfe) for row in batch.rows], device=self.device).unbind(1)
        view = self.view(
            hidden,
            slot * hidden.size(1) + in_hidden,
            tokens,
            decoded.to(self.device)[:, None].expand_as(place),
            sum(self.scored(row) for row in batch.rows if row.left),
            step=torch.full_like(nfe, self.step),
            progress=torch.full_like(nfe, self.offset / self.limit, dtype=torch.float),
            key=key,
        )
        step = take_step(view, self.decide(batch, view), self.mask_id, self.terminators, terminator_last=False)
        cells, known = slot * self.capacity + place, self.wanted_log_probabilities(view, step.tokens)
        self.write(cells, step.tokens, step.written, nfe, known)
        if self.sampler.cache == "dkv":
            self.settled.scatter_(1, place, self.settled.gather(1, place) & (step.tokens == tokens))
        for row, left in zip(batch.rows, step.left.tolist(), strict=True):
            row.left = left
        self.step += 1
        if not any(row.left for row in batch.rows):
            self._end_block()

    def _open_block(self) -> None:
        prompt_lengths = torch.tensor([row.prompt_length for row in self.rows])
        if self.offset == 0:  # a new group
            self.row_lengths = prompt_lengths + self.limit
            self.width = int(self.row_lengths.max())
            lengths = self.row_lengths.to(self.device)
            self.real = torch.arange(self.width, device=self.device) < lengths[:, None]
            self.segments = None if bool(self.real.all()) else (~self.real).long()  # padding is a segment of its own
            self.settled = torch.zeros_like(self.real)  # positions that have been run as what they are
        width = min(self.block, self.limit - self.offset)
        self.begins = prompt_lengths + self.offset
        self.place = self.begins.to(self.device)[:, None] + torch.arange(width, device=self.device)
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

    def _read(self, done: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden states [R, L, hidden] and where in them the block is [R, K]; `done` are rows without masks."""
        kind, width, tokens = self.sampler.cache, self.place.size(1), self.canvas[:, : self.width]
        if kind == "none":
            return self.model.hidden_states(tokens, segment_ids=self.segments), self.place
        if kind == "dkv":
            whole_row = self.step == 1 or self.step % self.sampler.refresh_every == 0
        else:
            whole_row = self.step == 0 and (kind != "free" or self.offset == 0)
        if whole_row:
            self.cache.lengths[:] = 0
            self.cache.open(self.width, self.row_lengths)
            self.settled = tokens != self.mask_id
            return self.model.hidden_states(tokens, cache=self.cache), self.place
        if kind == "dkv":
            window, block = self._open_unsettled(tokens)
        else:
            self.cache.lengths[:] = self.begins
            if kind == "free":  # a full block keeps what its last step gave
                self.cache.lengths += width * done
            wide = width if kind == "dual" else int((self.row_lengths - self.begins).max())
            self.cache.open(wide, visible=self.row_lengths)
            window = self.cache.positions.clamp(max=self.width - 1)
            block = torch.arange(width, device=self.device).expand_as(self.place)
        return self.model.hidden_states(tokens.gather(1, window), cache=self.cache), block

    def _open_unsettled(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Opens a forward of what is masked or has just changed; returns its positions [R, L], and the block's [R, K].

        The padding of a row with fewer such positions is stored behind the canvas, where nobody looks.
        """
        run = self.real & ~self.settled
        number = run.sum(dim=1, keepdim=True)
        width = int(number.max())
        window = (~run).long().argsort(dim=1, stable=True)[:, :width]  # the positions to run first
        slots = window.masked_fill(torch.arange(width, device=self.device) >= number, self.width)
        self.cache.lengths[:] = 0
        self.cache.open(width, visible=self.row_lengths, slots=slots, positions=window)
        self.settled = self.settled | (run & (tokens != self.mask_id))
        return window, (run.cumsum(dim=1) - 1).gather(1, self.place).clamp(0, width - 1)


@dataclass(eq=False)
class FixedLengthSampler(EngineSampler):
    """Fills a canvas of fixed length block by block, with every later mask in view, and cuts at the first terminator.

    LLaDA, arXiv 2502.09992, algorithm 5. Without a cache every step runs the whole row; a cache keeps the keys and
    values of some positions from an earlier step:

    - `prefix`, `dual` (Fast-dLLM, 2505.22618, section 3.2): a block's first step runs the whole row; later steps run
      the block and what is right of it, or the block alone.
    - `dkv` (dKV-Cache-Decode, 2505.15781): a step runs what is masked and what the step before committed, so that a
      token is run once as itself and then kept; the first two and every `refresh_every`-th step of a block run the
      whole row. Policies that need committed positions predicted again do not go with it.
    - `free` (FreeCache, 2505.21467): a step runs the block and what is right of it; the prompt and finished blocks keep
      what their own last step gave. Nothing is refreshed: a block's last tokens are remembered as masks.

    Args:
        policy: Decides what is committed at each step; one token per step when None.
        canvas_length: Masks behind the prompt; the answer's length limit.
        block_length: The canvas is filled from left to right in blocks of this many positions; all at once when None.
        cache: `none`, or one of the above.
        refresh_every: Steps of a block from one run of the whole row to the next, for `dkv`.
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
