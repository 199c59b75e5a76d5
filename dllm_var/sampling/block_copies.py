"""Several versions of a block in one forward: where their tokens stand and what they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer


@dataclass
class BlockCopies:
    """Windows `pending | block | copy 1 | copy 2 ...` of R rows; every tensor is [R, L].

    The copies stand where the block stands: they repeat its rotary positions, and the sampler says what each token sees
    of the window. Nothing of the cache is copied.

    Args:
        copy: The copy each token belongs to; 0 for the block itself and what is left of it.
        offset: Its place in the block.
        real: Whether it is there at all, rather than padding.
        finished: Whether it is left of the block.
        positions: Its place in the row, for tokens and rotary embedding.
    """

    copy: Tensor
    offset: Tensor
    real: Tensor
    finished: Tensor
    positions: Tensor

    def read(self, model: Transformer, cache: KVCache, tokens: Tensor, seen: Tensor, pending: Tensor) -> Tensor:
        """Returns the hidden states of these windows' tokens, each of which sees `seen` [R, L, L] of the real others.

        The cache keeps the `pending` ones [R]; in a model with causal context these see only their own left.
        """
        if model.config.causal_context:
            seen = seen & ~(self.finished[:, :, None] & (self.positions[:, None] > self.positions[:, :, None]))
        seen = (seen & self.real[:, None]) | ~self.real[:, :, None]  # padding sees everything, so no softmax is empty
        cache.open(self.copy.size(1), positions=self.positions, seen=seen)
        hidden = model.hidden_states(tokens, cache=cache)
        cache.advance(pending)
        return hidden


def lay_out(starts: Tensor, pending: Tensor, width: Tensor, copies: Sequence[int], device: torch.device) -> BlockCopies:
    """Lays out windows of `pending` tokens, a block of `width` and `copies` of it behind `starts` tokens, each [R]."""
    counts = torch.stack((starts, pending, width, torch.tensor(copies)))
    longest = int((pending + width * (1 + counts[3])).max())
    start, before, wide, number = counts.to(device)[:, :, None]
    place = torch.arange(longest, device=device)
    inside = place - before  # [R, L], below 0 for what is left of the block
    block = wide.clamp_min(1)
    offset = inside % block
    positions = start + torch.where(inside < 0, place, before + offset)
    copy = inside.div(block, rounding_mode="floor").clamp_min(0)
    return BlockCopies(copy, offset, inside < wide * (1 + number), inside < 0, positions)
