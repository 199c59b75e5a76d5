"""Several versions of a block in one forward: where their tokens stand and what they see."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from dllm_var.sampling.block_diffusion import BlockEngine
from dllm_var.sampling.engine import AnyRow, Batch


class CopyEngine(BlockEngine[AnyRow]):
    """Rows `prompt | finished blocks | active block | copy 1 | copy 2 ... | masks`.

    In a forward the copies stand where the block stands: they repeat its rotary positions. Nothing of the cache is
    copied.
    """

    @abstractmethod
    def copies(self, row: AnyRow, width: int) -> int:
        """Returns how many copies of a row's block the next forward reads."""

    @abstractmethod
    def sees(self, copy: Tensor, positions: Tensor) -> Tensor:
        """Returns what each token of a window sees of the window [R, L, L].

        `copy` [R, L] is the copy each token belongs to, 0 for the block itself and what is left of it.
        """

    def read_window(self, batch: Batch[AnyRow]) -> Tensor:
        copies = [self.copies(row, width) for row, width in zip(batch.rows, batch.width.tolist(), strict=True)]
        if not any(copies):
            return super().read_window(batch)
        counts = torch.stack((self.cache.lengths, batch.pending, batch.width, torch.tensor(copies)))
        longest = int((batch.pending + batch.width * (1 + counts[3])).max())
        start, pending, width, number = counts.to(self.device)[:, :, None]
        place = torch.arange(longest, device=self.device)
        inside = place - pending  # [R, L], below 0 for what is left of the block
        copy = inside.div(width.clamp_min(1), rounding_mode="floor").clamp_min(0)
        positions = start + place - copy * width
        seen, real = self.sees(copy, positions), inside < width * (1 + number)
        if self.model.config.causal_context:  # pending tokens see their own left alone
            seen = seen & ~((inside < 0)[:, :, None] & (positions[:, None] > positions[:, :, None]))
        seen = (seen & real[:, None]) | ~real[:, :, None]  # padding sees everything, so no softmax is empty
        self.cache.open(longest, positions=positions, seen=seen)
        hidden = self.model.hidden_states(self.canvas.gather(1, start + place), cache=self.cache)
        self.cache.advance(batch.pending)
        return hidden
