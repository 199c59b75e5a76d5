"""One call of `generate` by block diffusion: rows in flight, each with its own lengths, forward after forward."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer
from dllm_var.sampling.arrays import arrays, on_host, tensors, there
from dllm_var.sampling.base import Generation, Request, special_ids
from dllm_var.sampling.commit import apply_decision, block_outcome
from dllm_var.sampling.draw import request_keys
from dllm_var.sampling.policies.base import BlockView, Decision, State
from dllm_var.sampling.scoring import position_keys, score_positions

if TYPE_CHECKING:
    from dllm_var.sampling.block_diffusion import BlockDiffusionSampler


class BlockRun:
    """One call of `generate`: the rows in flight, one per slot of the cache.

    A row's canvas is `prompt | finished blocks | active block | masks`. The cache holds the first `cache.lengths`
    tokens; the next `pending` are finished but not cached yet; the `width` after them are the active block. One
    forward takes a row's pending tokens and active block, keeps the keys and values of the former and predicts the
    latter, whether the pending ones are a prompt (prefill), a finished block (`joint_next`) or nothing.
    """

    steps: np.ndarray
    per_slot: ClassVar[tuple[str, ...]] = (
        "prompt",
        "prompt_length",
        "pending",
        "width",
        "steps",
        "nfe",
        "masked_left",
        "began",
    )

    def __init__(
        self,
        sampler: BlockDiffusionSampler,
        model: Transformer,
        prompts: list[list[int]],
        request: Request,
    ) -> None:
        self.sampler, self.model, self.prompts, self.request = sampler, model, prompts, request
        self.limit = limit = request.max_new_tokens or sampler.max_new_tokens
        self.mask_id, self.terminators = special_ids(model)
        self.waiting = deque(range(len(prompts)))
        self.keys = np.array(request_keys(prompts), dtype=np.int64)
        self.answers: dict[int, Generation] = {}
        slots = min(sampler.batch_size, len(prompts))
        weight = model.embedding.weight
        self.device = weight.device
        # The slack is for padding: a forward is as wide as its widest row, even for a row that is nearly at its end.
        capacity = max(map(len, prompts), default=0) + limit + sampler.blocks_per_window * sampler.block_length
        self.cache = model.new_cache(slots, capacity)
        self.canvas, self.committed_at = (
            torch.from_numpy(np.full((slots, capacity), value)).to(self.device) for value in (self.mask_id, 0)
        )
        self._flatten()
        template = sampler.policy.initial_state(sampler.block_length)
        self.template = {name: value.to(self.device) for name, value in template.items()}
        self.state = {name: value.repeat(slots, *[1] * value.dim()) for name, value in self.template.items()}
        self._offsets = np.arange(sampler.block_length)
        # Host-side bookkeeping, one entry per slot; `prompt` is the index of the row's prompt, -1 for a free slot.
        self.prompt = np.full(slots, -1)
        self.prompt_length, self.pending, self.width, self.steps, self.nfe, self.masked_left = np.zeros(
            (6, slots), np.int64
        )
        self.began = np.zeros(slots)

    def _flatten(self) -> None:
        """Remembers canvas and commit times as flat arrays of the library that does the small work."""
        self._flat = arrays(self.canvas.view(-1), self.committed_at.view(-1))[1:]

    @property
    def in_flight(self) -> int:
        """How many rows are being decoded."""
        return int(np.count_nonzero(self.prompt >= 0))

    @property
    def active(self) -> np.ndarray:
        return self.prompt >= 0

    def admit(self) -> None:
        """Gives free slots to waiting prompts and prefills them together."""
        if not self.waiting or self.in_flight == self.prompt.size:
            return
        free = np.flatnonzero(~self.active)[: len(self.waiting)]
        for slot in free:
            index = self.waiting.popleft()
            tokens = self.prompts[index]
            self.prompt[slot], self.prompt_length[slot] = index, len(tokens)
            self._fill(slot, tokens)
            self.pending[slot], self.nfe[slot], self.began[slot] = len(tokens), 0, time.perf_counter()
            self.cache.free(slot)
            self._start_block(slot)
        self._forward(free if free.size < self.prompt.size else None)

    def _fill(self, slot: int, prompt: list[int]) -> None:
        """Writes a prompt and masks behind it."""
        _, tokens = there(self.device, np.array(prompt))
        start, size = slot * self.canvas.size(1), self.canvas.size(1)
        self._flat[0][start : start + len(prompt)] = tokens
        self._flat[0][start + len(prompt) : start + size] = self.mask_id

    def step(self) -> None:
        """One forward of every row in flight."""
        if not self.in_flight:
            return
        if not self.waiting and self.in_flight <= 0.75 * self.prompt.size:
            self._compact(np.flatnonzero(self.active))
        self._forward(None)

    def _start_block(self, slot: int) -> None:
        """Opens the block behind the row's finished tokens."""
        finished = int(self.cache.lengths[slot] + self.pending[slot])
        self.width[slot] = self.masked_left[slot] = self._next_width(slot, finished)
        self.steps[slot] = 0
        for name, value in self.template.items():
            self.state[name][slot] = value

    def _next_width(self, slot: int, finished: int) -> int:
        """Returns how wide a row's block behind its first `finished` tokens is."""
        length = self.sampler.block_length
        width = length - finished % length if self.sampler.grid == "absolute" else length
        return min(width, int(self.prompt_length[slot]) + self.limit - finished)

    def _forward(self, slots: np.ndarray | None) -> None:
        """One forward of some slots (free ones until now) or of all, and what the policy makes of it."""
        rows = np.arange(self.prompt.size) if slots is None else slots
        pending, width = self.pending[rows], self.width[rows]
        if self.sampler.kv_commit == "alone":  # a finished block (or prompt) has a forward of its own
            width = np.where(pending > 0, 0, width)
        index = None if slots is None else torch.from_numpy(rows).to(self.device)
        tokens = self._open_window(rows, index, slots, pending, width)
        hidden = self.model.hidden_states(tokens, cache=self.cache)
        self.cache.advance(pending, slots)
        self.pending[rows] = 0
        self.nfe[rows] += 1
        if np.count_nonzero(width):
            self._denoise(rows, index, hidden, pending, width)

    def _open_window(
        self, rows: np.ndarray, index: Tensor | None, slots: np.ndarray | None, pending: np.ndarray, width: np.ndarray
    ) -> Tensor:
        """Opens the cache for pending tokens and active block, and returns them [R, L]."""
        windows = pending + width
        longest = int(windows.max())
        windows = np.maximum(windows, 1)  # a free slot: anything but an empty softmax
        left_to_right = pending if self.model.config.causal_context and pending.any() else None
        self.cache.open(longest, windows, slots, left_to_right=left_to_right)
        canvas = self.canvas if index is None else self.canvas[index]
        if index is None and rows.size == 1:
            start = int(self.cache.lengths[0])
            return canvas[:, start : start + longest]
        return canvas.gather(1, self.cache.positions)

    def _denoise(
        self, rows: np.ndarray, index: Tensor | None, hidden: Tensor, pending: np.ndarray, width: np.ndarray
    ) -> None:
        """Predicts the active blocks, applies the policy, ends blocks and rows that are complete."""
        cells, tokens, inside = self._active_blocks(rows, width)
        all_scored = self.sampler.policy.scores_committed
        decoded = width > 0
        count = sum((width if all_scored else self.masked_left[rows] * decoded).tolist())
        shift = torch.from_numpy(pending).to(self.device)
        key = torch.from_numpy(self.keys[self.prompt[rows]] + self.nfe[rows]).to(self.device)
        steps = torch.from_numpy(self.steps[rows]).to(self.device)
        view = self._view(hidden, shift, tokens, inside, count, steps, self._progress(rows), key)
        state = {name: value.clone() if index is None else value[index] for name, value in self.state.items()}
        decision = self._decide(rows, index, width, view, state)
        if state:
            self._keep_state(rows, np.flatnonzero(decoded), state)
        tokens, masked, written = apply_decision(
            view, decision, self.mask_id, self.terminators, self.sampler.terminator_last
        )
        self._write(rows, cells, tokens, written)
        left, ends, over = block_outcome(decision, tokens, masked, view.changeable, self.terminators)
        # The step's one wait for the device.
        left_on_host, end, over_on_host = on_host(left, ends, over)
        self.masked_left[rows] = np.where(decoded, left_on_host, self.masked_left[rows])
        self.steps[rows] += decoded
        self._settle(rows, decoded, end, over_on_host != 0)

    def _decide(
        self, rows: np.ndarray, index: Tensor | None, width: np.ndarray, view: BlockView, state: State
    ) -> Decision:
        """Returns what becomes of the active blocks."""
        return self.sampler.policy.decide(view, state)

    def _active_blocks(self, rows: np.ndarray, width: np.ndarray) -> tuple[Any, Any, Any]:
        """Returns the active blocks' places in the flattened canvas, their tokens, and which are real, each [R, K]."""
        cells = self._cells(rows, self.cache.lengths[rows][:, None] + self._offsets)
        _, cells, inside = there(self.device, cells, self._offsets < width[:, None])
        return cells, self._flat[0][cells], inside

    def _cells(self, rows: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Returns where the places [R, K] of some rows are in the flattened canvas."""
        return place + rows[:, None] * self.canvas.size(1)

    def _view(
        self,
        hidden: Tensor,
        shift: Tensor,
        tokens: Any,
        inside: Any,
        count: int,
        steps: Tensor,
        progress: Tensor,
        key: Tensor,
    ) -> BlockView:
        """Scores the blocks `tokens` [R, K], which begin `shift` [R] into `hidden`, at `count` positions in all."""
        _, given, real = arrays(tokens, inside)
        masked = (given == self.mask_id) & real
        where = inside if self.sampler.policy.scores_committed else masked
        scored, logits = score_positions(self.model, hidden, where, shift, count, self.request.suppressed)
        sampled = None
        if self.sampler.temperature > 0:
            sampled = self.sampler.draw(logits, position_keys(key, scored, tokens.shape[1]))
        tokens, masked, inside = tensors(tokens, masked, inside)
        return BlockView(
            scored_logits=logits,
            scored=scored,
            tokens=tokens,
            masked=masked,
            changeable=inside,
            step=steps,
            progress=progress,
            key=key,
            sampled=sampled,
        )

    def _progress(self, rows: np.ndarray) -> Tensor:
        """Returns the share of its limit that each row has decoded [R]."""
        done = self.cache.lengths[rows] - self.prompt_length[rows]
        return torch.from_numpy((done / self.limit).astype(np.float32)).to(self.device)

    def _keep_state(self, rows: np.ndarray, decoded: np.ndarray, state: State) -> None:
        """Stores the policy's memory of the rows that met it; one that only stored a block did not."""
        source, target = torch.from_numpy(np.stack((decoded, rows[decoded]))).to(self.device)
        for name, value in state.items():
            self.state[name][target] = value[source]

    def _write(self, rows: np.ndarray, cells: Any, tokens: Any, written: Any) -> None:
        """Stores the blocks' tokens [R, K] at their cells and, where they were written, this forward's number."""
        xp, forward = there(self.device, self.nfe[rows, None])
        canvas, committed_at = self._flat
        canvas[cells] = tokens
        committed_at[cells] = xp.where(written, forward, committed_at[cells])

    def _settle(self, rows: np.ndarray, decoded: np.ndarray, end: np.ndarray, over: np.ndarray) -> None:
        """Ends the blocks that are over, after a step."""
        for at_row in np.flatnonzero(decoded & self.active[rows] & ((end >= 0) | over)):
            slot = int(rows[at_row])
            if over[at_row]:
                self._end_block(slot, int(end[at_row]))
            else:  # kept open for edits: nothing behind the answer's end is decoded any more
                self.width[slot], self.masked_left[slot] = int(end[at_row]) + 1, 0

    def _end_block(self, slot: int, end: int) -> None:
        """Ends a row whose answer is complete, or moves it to its next block."""
        start, finished = int(self.prompt_length[slot]), int(self.cache.lengths[slot] + self.width[slot])
        index = int(self.prompt[slot])
        stop = int(self.cache.lengths[slot]) + end if end >= 0 else finished
        ended = end >= 0 or finished - start >= self.limit
        if ended or self.request.on_block is not None or self.request.stop is not None:
            answer = self.canvas[slot, start:stop].tolist()
            if self.request.on_block is not None:
                self.request.on_block(index, answer)
            ended = ended or self.request.stopped(index, answer)
        if not ended:
            if self.sampler.kv_commit == "last_step":  # what the last forward wrote is where it belongs
                self.cache.lengths[slot] = finished
            else:
                self.pending[slot] = self.width[slot]
            self._start_block(slot)
            return
        self.answers[index] = self._answer(slot, answer, "eos" if end >= 0 else "length")
        self.request.finished(index, self.answers[index])
        self.prompt[slot], self.pending[slot], self.width[slot], self.masked_left[slot] = -1, 0, 0, 0

    def _answer(self, slot: int, tokens: list[int], finish_reason: str) -> Generation:
        start = int(self.prompt_length[slot])
        return Generation(
            tokens=tokens,
            finish_reason=finish_reason,
            nfe=int(self.nfe[slot]),
            seconds=time.perf_counter() - float(self.began[slot]),
            prompt_length=start,
            commit_steps=self.committed_at[slot, start : start + len(tokens)].tolist(),
        )

    def _compact(self, rows: np.ndarray) -> None:
        """Drops the free slots; done when a quarter is free, so that the copies cost little in all."""
        self.cache.keep(rows)
        index = torch.from_numpy(rows).to(self.device)
        self.canvas, self.committed_at = self.canvas[index], self.committed_at[index]
        self._flatten()
        self.state = {name: value[index] for name, value in self.state.items()}
        for name in self.per_slot:
            setattr(self, name, getattr(self, name)[rows])
