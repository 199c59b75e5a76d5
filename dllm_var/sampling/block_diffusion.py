"""Block diffusion with a plain KV cache: decode block by block until the terminator (arXiv 2510.24605, section 4)."""

from __future__ import annotations

import time
from collections import deque
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.base import Generation, Request, Sampler, check_at_least_one, special_ids
from dllm_var.sampling.commit import choose_commits
from dllm_var.sampling.draw import Draw, request_keys
from dllm_var.sampling.policies import BlockView, ConfidenceThreshold, UnmaskingPolicy
from dllm_var.sampling.scoring import position_keys, score_positions


class BlockDiffusionSampler(Sampler):
    """Decodes block by block until each row's own terminator.

    Args:
        policy: Decides which masked positions become tokens at each step; `ConfidenceThreshold(0.9)` when null.
        block_length: Tokens decoded together.
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        terminator_last: Commits a terminator only when everything left of it is, and nothing right of a sure one.
        kv_commit: How a finished block enters the cache: `joint_next` in one forward with the next block (the paper),
            `alone` in a forward of its own.
        grid: Where blocks start: at the `prompt`'s end (the paper) or at `absolute` multiples of the block length.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws; a row's draws do not depend on its batch.

    Raises:
        UserError: When a length or the batch size is below 1.
    """

    def __init__(
        self,
        policy: UnmaskingPolicy | None = None,
        block_length: int = 64,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        terminator_last: bool = True,
        kv_commit: Literal["joint_next", "alone"] = "joint_next",
        grid: Literal["prompt", "absolute"] = "prompt",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_at_least_one(block_length=block_length, max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.policy: UnmaskingPolicy = policy if policy is not None else ConfidenceThreshold()
        self.block_length, self.max_new_tokens, self.batch_size = block_length, max_new_tokens, batch_size
        self.terminator_last, self.kv_commit, self.grid = terminator_last, kv_commit, grid
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.draw = Draw(temperature, top_k, top_p, seed)

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if model.config.causal:
            raise UserError("this checkpoint is autoregressive: decode it with dllm_var.sampling.AutoregressiveSampler")
        run = _Run(self, model, prompts, request)
        while run.waiting or run.active.any():
            run.admit()
            run.step()
        return [run.answers[index] for index in range(len(prompts))]


class _Run:
    """One call of `generate`: the rows in flight, one per slot of the cache.

    A row's canvas is `prompt | finished blocks | active block | masks`. The cache holds the first `cache.lengths`
    tokens; the next `pending` are finished but not cached yet; the `width` after them are the active block. One
    forward takes a row's pending tokens and active block, keeps the keys and values of the former and predicts the
    latter, whether the pending ones are a prompt (prefill), a finished block (`joint_next`) or nothing.
    """

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
        capacity = max(map(len, prompts), default=0) + limit + 2 * sampler.block_length
        self.cache = KVCache(model.config, slots, capacity, self.device, weight.dtype)
        self.canvas = torch.full((slots, capacity), self.mask_id, device=self.device)
        self.committed_at = torch.zeros((slots, capacity), dtype=torch.int32, device=self.device)
        template = sampler.policy.initial_state(sampler.block_length)
        self.template = {name: value.to(self.device) for name, value in template.items()}
        self.state = {name: value.repeat(slots, *[1] * value.dim()) for name, value in self.template.items()}
        # Host-side bookkeeping, one entry per slot; `prompt` is the index of the row's prompt, -1 for a free slot.
        self.prompt = np.full(slots, -1)
        self.prompt_length, self.pending, self.width, self.steps, self.nfe = (
            np.zeros(slots, np.int64) for _ in "12345"
        )
        self.masked_left = np.zeros(slots, np.int64)
        self.began = np.zeros(slots)

    @property
    def active(self) -> np.ndarray:
        return self.prompt >= 0

    def admit(self) -> None:
        """Gives free slots to waiting prompts and prefills them together."""
        free = np.flatnonzero(~self.active)[: len(self.waiting)]
        if not free.size:
            return
        for slot in free:
            index = self.waiting.popleft()
            tokens = self.prompts[index]
            self.prompt[slot], self.prompt_length[slot] = index, len(tokens)
            self.canvas[slot] = self.mask_id
            self.canvas[slot, : len(tokens)] = torch.tensor(tokens, device=self.device)
            self.pending[slot], self.nfe[slot], self.began[slot] = len(tokens), 0, time.perf_counter()
            self.cache.free(slot)
            self._start_block(slot)
        self._forward(free if free.size < self.prompt.size else None)

    def step(self) -> None:
        """One forward of every row in flight."""
        if not self.active.any():
            return
        if not self.waiting and np.count_nonzero(self.active) <= 0.75 * self.prompt.size:
            self._compact(np.flatnonzero(self.active))
        self._forward(None)

    def _start_block(self, slot: int) -> None:
        """Opens the block behind the row's finished tokens."""
        finished = int(self.cache.lengths[slot] + self.pending[slot])
        length = self.sampler.block_length
        width = length - finished % length if self.sampler.grid == "absolute" else length
        self.width[slot] = min(width, int(self.prompt_length[slot]) + self.limit - finished)
        self.masked_left[slot] = self.width[slot]
        self.steps[slot] = 0
        for name, value in self.template.items():
            self.state[name][slot] = value

    def _forward(self, slots: np.ndarray | None) -> None:
        """One forward of some slots (free ones until now) or of all, and what the policy makes of it."""
        rows = np.arange(self.prompt.size) if slots is None else slots
        pending, width = self.pending[rows], self.width[rows]
        if self.sampler.kv_commit == "alone":  # a finished block (or prompt) has a forward of its own
            width = np.where(pending > 0, 0, width)
        windows = pending + width
        longest = int(windows.max())
        windows = np.where(windows == 0, longest, windows)  # a free slot: anything but an empty softmax
        self.cache.open(longest, windows, slots)
        all_rows = slots is None
        index = None if all_rows else torch.from_numpy(rows).to(self.device)
        canvas = self.canvas if index is None else self.canvas[index]
        start = int(self.cache.lengths[0])
        if all_rows and rows.size == 1:
            tokens = canvas[:, start : start + longest]
        else:
            tokens = canvas.gather(1, self.cache.positions)
        hidden = self.model.hidden_states(tokens, cache=self.cache)
        self.cache.advance(pending, slots)
        self.pending[rows] = 0
        self.nfe[rows] += 1
        if width.any():
            self._denoise(rows, index, hidden, pending, width)

    def _denoise(
        self, rows: np.ndarray, index: Tensor | None, hidden: Tensor, pending: np.ndarray, width: np.ndarray
    ) -> None:
        """Predicts the active blocks, applies the policy, ends blocks and rows that are complete."""
        block = self.sampler.block_length
        offsets = torch.arange(block, device=self.device)
        width_on_device = torch.from_numpy(width).to(self.device)[:, None]
        inside = offsets < width_on_device
        place = torch.from_numpy(self.cache.lengths[rows]).to(self.device)[:, None] + offsets  # [R, K] in the canvas
        canvas = self.canvas if index is None else self.canvas[index]
        tokens = canvas.gather(1, place)
        masked = (tokens == self.mask_id) & inside
        all_scored = self.sampler.policy.scores_committed
        count = int(width.sum() if all_scored else self.masked_left[rows][width > 0].sum())
        shift = torch.from_numpy(pending).to(self.device)
        scored, logits = score_positions(self.model, hidden, inside if all_scored else masked, shift, count)
        done = self.cache.lengths[rows] - self.prompt_length[rows]
        key = torch.from_numpy(self.keys[self.prompt[rows]] + self.nfe[rows]).to(self.device)
        view = BlockView(
            scored_logits=logits,
            scored=scored,
            tokens=tokens,
            masked=masked,
            changeable=inside,
            step=torch.from_numpy(self.steps[rows]).to(self.device),
            progress=torch.from_numpy(done / self.limit).to(self.device, torch.float32),
            key=key,
            sampled=self.sampler.draw(logits, position_keys(key, scored, block)),
        )
        decoded = width > 0
        state = {name: value.clone() if index is None else value[index] for name, value in self.state.items()}
        decision = self.sampler.policy.decide(view, state)
        for name, value in state.items():  # a row that only stored a block has not met the policy
            self.state[name][torch.from_numpy(rows[decoded]).to(self.device)] = value[
                torch.from_numpy(decoded).to(self.device)
            ]
        tokens, masked, written = choose_commits(
            view, decision, self.mask_id, self.terminators, self.sampler.terminator_last
        )
        at = torch.from_numpy(self.nfe[rows]).to(self.device, torch.int32)[:, None].expand_as(tokens)
        if index is None:
            target, written_at = self.canvas, self.committed_at
            target.scatter_(1, place, torch.where(inside, tokens, target.gather(1, place)))
            written_at.scatter_(1, place, torch.where(written, at, written_at.gather(1, place)))
        else:
            self.canvas[index[:, None], place] = torch.where(inside, tokens, canvas.gather(1, place))
            self.committed_at[index[:, None], place] = torch.where(
                written, at, self.committed_at[index].gather(1, place)
            )
        ends = _answer_ends(tokens, masked, inside, self.terminators)
        if decision.finish_row is not None:
            decided = torch.where(masked.any(dim=1), masked.int().argmax(dim=1), width_on_device.squeeze(1))
            ends = torch.where(decision.finish_row & (ends < 0), decided, ends)
        left = masked.sum(dim=1)
        over = (left == 0) | (ends >= 0)
        if decision.keep_open is not None:
            over = over & ~decision.keep_open
        # The step's one wait for the device.
        left_on_host, end, over_on_host = torch.stack((left, ends, over.long())).cpu().numpy()
        self.masked_left[rows[decoded]] = left_on_host[decoded]
        self.steps[rows[decoded]] += 1
        for at_row in np.flatnonzero(decoded & self.active[rows] & ((end >= 0) | (over_on_host == 1))):
            slot = int(rows[at_row])
            if over_on_host[at_row]:
                self._end_block(slot, int(end[at_row]))
            else:  # kept open for edits: nothing behind the answer's end is decoded any more
                self.width[slot], self.masked_left[slot] = int(end[at_row]) + 1, 0

    def _end_block(self, slot: int, end: int) -> None:
        """Ends a row whose answer is complete, or moves it to its next block."""
        start, finished = int(self.prompt_length[slot]), int(self.cache.lengths[slot] + self.width[slot])
        index = int(self.prompt[slot])
        stop = int(self.cache.lengths[slot]) + end if end >= 0 else finished
        ended = end >= 0 or finished - start >= self.limit
        if ended or self.request.on_block is not None:
            answer = self.canvas[slot, start:stop].tolist()
            if self.request.on_block is not None:
                self.request.on_block(index, answer)
        if not ended:
            self.pending[slot] = self.width[slot]
            self._start_block(slot)
            return
        self.answers[index] = Generation(
            tokens=answer,
            finish_reason="eos" if end >= 0 else "length",
            nfe=int(self.nfe[slot]),
            seconds=time.perf_counter() - float(self.began[slot]),
            prompt_length=start,
            commit_steps=self.committed_at[slot, start:stop].tolist(),
        )
        self.prompt[slot], self.pending[slot], self.width[slot], self.masked_left[slot] = -1, 0, 0, 0

    def _compact(self, rows: np.ndarray) -> None:
        """Drops the free slots; done when a quarter is free, so that the copies cost little in all."""
        self.cache.keep(rows)
        index = torch.from_numpy(rows).to(self.device)
        self.canvas, self.committed_at = self.canvas[index], self.committed_at[index]
        self.state = {name: value[index] for name, value in self.state.items()}
        for name in ("prompt", "prompt_length", "pending", "width", "steps", "nfe", "masked_left", "began"):
            setattr(self, name, getattr(self, name)[rows])


def _answer_ends(tokens: Tensor, masked: Tensor, inside: Tensor, terminators: tuple[int, ...]) -> Tensor:
    """Returns where in its block each row's answer ends [R]: its first terminator with no mask left of it, or -1."""
    is_end = is_one_of(tokens, terminators) & ~masked & inside
    none_left = (masked.cumsum(dim=1) == 0) & is_end
    return torch.where(none_left.any(dim=1), none_left.int().argmax(dim=1), -1)
