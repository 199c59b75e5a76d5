"""Guided diffusion: an autoregressive model says how much of each proposal stands (arXiv 2505.21467, section 4.2)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer
from dllm_var.sampling.auxiliary import AuxiliaryModel
from dllm_var.sampling.base import Request
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockEngine, BlockLengthPolicy
from dllm_var.sampling.engine import Batch, Row
from dllm_var.sampling.policies import BlockView, Decision, Sequential, UnmaskingPolicy


class GuidedEngine(BlockEngine[Row]):
    """The guide's cache keeps all it has read of a row; the next proposal overwrites the rejected part of the last."""

    sampler: "GuidedSampler"

    def __init__(
        self, sampler: "GuidedSampler", model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        super().__init__(sampler, model, prompts, request)
        self.guide = sampler.auxiliary.beside(model, request)
        # A row may read its prompt beside others that are far ahead.
        self.guide_cache = self.add_cache(self.guide, self.capacity + self.longest_prompt)

    def decide(self, batch: Batch[Row], view: BlockView) -> Decision:
        """Commits the masks up to the first one where the guide expects another token; the first one in any case."""
        first = view.masked & (view.masked.cumsum(dim=1) == 1)
        masks = torch.tensor([row.left for row in batch.rows]).masked_fill(batch.width == 0, 0)
        masks[masks == 1] = 0  # the only one left is committed, whatever the guide expects
        if not masks.any():
            return Decision(commit=first)
        disagrees = view.masked & (self._expected(batch, masks, view) != view.predicted)
        return Decision(commit=first | (view.masked & (disagrees.cumsum(dim=1) == 0)))

    def _expected(self, batch: Batch[Row], masks: Tensor, view: BlockView) -> Tensor:
        """Returns what the guide expects at the masked positions [R, K], given the proposal left of each; -1 elsewhere.

        `masks` are the masked positions in each block [R], 0 for rows that do not ask.
        """
        asks, read = masks > 0, self.guide_cache.lengths[batch.slots]
        begins = self.cache.lengths[batch.slots] + torch.tensor([row.shown for row in batch.rows])
        ends = begins + batch.width  # of the blocks
        known = ends - masks  # tokens that are committed; the last of them predicts the first mask
        kept = torch.where(asks, torch.minimum(read, known - 1), read)
        self.guide_cache.lengths[batch.slots] = kept
        unread = (ends - 1 - kept).masked_fill(~asks, 0)  # the proposal's last token predicts what nobody asks for
        cells = torch.tensor(batch.slots) * self.capacity + begins
        table = torch.stack((cells, known - 1 - kept - (batch.width - masks), asks.long()))
        start, shift, asking = table.to(self.device)[:, :, None]
        proposal = torch.where(view.masked, view.predicted, view.tokens)
        self.canvas.put_(start + self.offsets, proposal)  # the engine writes there what becomes of the block
        hidden = self.read(batch, unread, unread, self.guide, self.guide_cache)
        for row, asked in zip(batch.rows, asks.tolist(), strict=True):
            row.auxiliary_nfe += asked
        places = torch.arange(len(masks), device=self.device)[:, None] * hidden.size(1) + shift + self.offsets
        scored, logits = self.score(self.guide, hidden, places, view.masked & asking.bool(), int(masks.sum()))
        expected = torch.full_like(view.tokens, -1)
        return expected.view(-1).index_copy_(0, scored, logits.argmax(dim=-1)).view_as(expected)


@dataclass(eq=False)
class GuidedSampler(BlockDiffusionSampler):
    """Block diffusion that commits as much of each proposal as a small autoregressive model agrees with.

    Each step proposes the most likely token at every masked position of the block. One forward of the guide reads the
    proposal; from left to right, positions are committed while the guide's most likely token is the proposed one, the
    leftmost masked one in any case. The tokens are always the diffusion model's own (FlashDLM, arXiv 2505.21467).

    Args:
        guide: Checkpoint of an autoregressive model with the same tokenizer: run folder, `.ckpt` or exported folder.
    """

    engine = GuidedEngine

    guide: str
    policy: UnmaskingPolicy | None = field(init=False, default=None)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)
    kv_commit: Literal["joint_next", "alone"] = field(default="joint_next", kw_only=True)

    def __post_init__(self) -> None:
        self.policy = Sequential()  # the order; how many is the guide's to say
        super().__post_init__()
        self.auxiliary = AuxiliaryModel("guide", self.guide, causal=True)
