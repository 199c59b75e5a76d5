"""Guided diffusion: an autoregressive model says how much of each proposal stands (arXiv 2505.21467, section 4.2)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer
from dllm_var.sampling.auxiliary import AuxiliaryModel
from dllm_var.sampling.base import Generation, Request
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler
from dllm_var.sampling.block_run import BlockRun
from dllm_var.sampling.policies import BlockView, Decision, Sequential
from dllm_var.sampling.policies.base import State
from dllm_var.sampling.scoring import score_positions


class GuidedRun(BlockRun):
    """Rows in flight with a guide that reads along.

    Blocks fill from left to right, so all the guide has read but the rejected part of a proposal stays in its cache.
    """

    sampler: GuidedSampler
    per_slot: ClassVar = (*BlockRun.per_slot, "guide_nfe", "guide_read")

    def __init__(self, sampler: GuidedSampler, model: Transformer, prompts: list[list[int]], request: Request) -> None:
        super().__init__(sampler, model, prompts, request)
        self.guide = sampler.auxiliary.beside(model, request)
        slots = self.prompt.size
        # A row may read its prompt beside others that are far ahead.
        capacity = self.cache.capacity + max(map(len, prompts), default=0)
        self.guide_cache = self.guide.new_cache(slots, capacity)
        self.guide_nfe, self.guide_read = np.zeros(slots, np.int64), np.zeros(slots, np.int64)

    def _start_block(self, slot: int) -> None:
        super()._start_block(slot)
        if self.nfe[slot] == 0:  # the row's first block
            self.guide_nfe[slot] = self.guide_read[slot] = 0

    def _decide(
        self, rows: np.ndarray, index: Tensor | None, width: np.ndarray, view: BlockView, state: State
    ) -> Decision:
        """Commits the masks up to the first one where the guide expects another token; the first one in any case."""
        first = view.masked & (view.masked.cumsum(dim=1) == 1)
        masks = np.where(width > 0, self.masked_left[rows], 0)
        masks[masks == 1] = 0  # the only one left is committed, whatever the guide expects
        if not masks.any():
            return Decision(commit=first)
        disagrees = view.masked & (self._expected(rows, index, width, masks, view) != view.predicted)
        return Decision(commit=first | (view.masked & (disagrees.cumsum(dim=1) == 0)))

    def _expected(
        self, rows: np.ndarray, index: Tensor | None, width: np.ndarray, masks: np.ndarray, view: BlockView
    ) -> Tensor:
        """Returns what the guide expects at the masked positions [R, K], given the proposal left of each; -1 elsewhere.

        Args:
            rows: The slots.
            index: The same on the device, null when they are all.
            width: Each block's length [R].
            masks: Masked positions in each block [R], 0 for rows that do not ask.
            view: The blocks and the proposal for them.
        """
        ends = self.cache.lengths[rows] + width  # of the blocks
        known = ends - masks  # tokens that are committed; the last of them predicts the first mask
        frozen = np.where(masks > 0, np.minimum(self.guide_read[rows], known - 1), 0)
        windows = np.where(masks > 0, ends - 1 - frozen, 1)  # the proposal's last token predicts what nobody asks for
        self.guide_cache.lengths[rows] = frozen
        self.guide_cache.open(int(windows.max()), windows, None if index is None else rows)
        proposal = torch.where(view.masked, view.predicted, view.tokens)
        start = torch.from_numpy(self.cache.lengths[rows]).to(self.device)[:, None]
        place = start + torch.arange(proposal.size(1), device=self.device)
        # Into the canvas with it: the engine writes there what becomes of the block.
        if index is None:
            canvas = self.canvas.scatter_(1, place, proposal)
        else:
            self.canvas[index[:, None], place] = proposal
            canvas = self.canvas[index]
        read = canvas.gather(1, self.guide_cache.positions.clamp(max=canvas.size(1) - 1))
        hidden = self.guide.hidden_states(read, cache=self.guide_cache)
        self.guide_read[rows] = np.where(masks > 0, ends - 1, self.guide_read[rows])
        self.guide_nfe[rows] += masks > 0
        asked = view.masked & torch.from_numpy(masks > 0).to(self.device)[:, None]
        shift = torch.from_numpy(known - 1 - frozen - (width - masks)).to(self.device)
        scored, logits = score_positions(self.guide, hidden, asked, shift, int(masks.sum()), self.request.suppressed)
        expected = torch.full_like(view.tokens, -1)
        return expected.view(-1).index_copy_(0, scored, logits.argmax(dim=-1)).view_as(expected)

    def _answer(self, slot: int, tokens: list[int], finish_reason: str) -> Generation:
        answer = super()._answer(slot, tokens, finish_reason)
        answer.auxiliary_nfe = int(self.guide_nfe[slot])
        return answer

    def _compact(self, rows: np.ndarray) -> None:
        super()._compact(rows)
        self.guide_cache.keep(rows)


class GuidedSampler(BlockDiffusionSampler):
    """Block diffusion that commits as much of each proposal as a small autoregressive model agrees with.

    Each step proposes the most likely token at every masked position of the block. One forward of the guide reads the
    proposal; from left to right, positions are committed while the guide's most likely token is the proposed one, the
    leftmost masked one in any case. The tokens are always the diffusion model's own (FlashDLM, arXiv 2505.21467).

    Args:
        guide: Checkpoint of an autoregressive model with the same tokenizer: run folder, `.ckpt` or exported folder.
        block_length: Tokens proposed together.
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time.
        kv_commit: How a finished block enters the cache; see `BlockDiffusionSampler`.
        grid: Where blocks start; see `BlockDiffusionSampler`.

    Raises:
        UserError: When a length or the batch size is below 1; when decoding starts, if there is no such checkpoint, or
            it is not autoregressive or has another tokenizer.
    """

    run_class: ClassVar[type[BlockRun]] = GuidedRun

    def __init__(
        self,
        guide: str,
        block_length: int = 64,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        kv_commit: Literal["joint_next", "alone"] = "joint_next",
        grid: Literal["prompt", "absolute"] = "prompt",
    ) -> None:
        super().__init__(
            Sequential(),  # the order; how many is the guide's to say
            block_length=block_length,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            kv_commit=kv_commit,
            grid=grid,
        )
        self.guide = guide
        self.auxiliary = AuxiliaryModel("guide", guide, causal=True)
