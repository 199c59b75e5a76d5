"""Sub-blocks with a cache of their block: the dual cache of Fast-dLLM v2 (arXiv 2509.26328)."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockEngine
from dllm_var.sampling.engine import Batch, Engine, Row


class SubBlockEngine(BlockEngine[Row]):
    """Reads a row's whole window at a sub-block's first step, and the sub-block alone at the others.

    What is beside the sub-block in its block is then in the cache as the first step left it.
    """

    def skipped(self, row: Row) -> int:
        return row.shown if row.steps else 0

    def read_window(self, batch: Batch[Row]) -> Tensor:
        lengths = self.cache.lengths if batch.index is None else self.cache.lengths[batch.index]
        steps, skipped = torch.tensor([(row.steps, self.skipped(row)) for row in batch.rows]).unbind(1)
        whole = batch.pending + batch.window
        counts, start = torch.where(steps > 0, batch.width, whole)[:, None], (lengths + skipped)[:, None]
        place = torch.arange(max(int(counts.max()), 1), device="cpu")
        # Padding must not overwrite what is beside a sub-block: its keys go where no row reaches.
        slots = torch.where(place < counts, start + place, self.capacity - 1).to(self.device)
        visible = lengths + whole.clamp_min(1)
        positions = slots.clamp_max(int(visible.max()) - 1)
        self.cache.open(len(place), rows=batch.index, visible=visible, slots=slots, positions=positions)
        canvas = self.canvas if batch.index is None else self.canvas[batch.slots]
        hidden = self.model.hidden_states(canvas.gather(1, slots), cache=self.cache)
        self.cache.advance(batch.pending, batch.index)
        return hidden

    def compact(self, kept: list[int]) -> None:
        windows = torch.tensor([row.window for row in self.rows])
        self.cache.lengths += windows  # what is beside a sub-block is copied with its row
        super().compact(kept)
        self.cache.lengths -= windows[kept]


@dataclass(eq=False)
class SubBlockSampler(BlockDiffusionSampler):
    """Decodes a block-causal model in sub-blocks, and reads the rest of a block only when a sub-block begins.

    `BlockDiffusionSampler` with the same `block_length` reads the whole block at each step. Here the steps after a
    sub-block's first one read `block_length` tokens, so that the rest of the block does not see what they commit. The
    released code of Fast-dLLM v2 reads the whole block until the sub-block's first token is known.

    Args:
        block_length: Tokens of a sub-block; the model's block is longer.
    """

    engine = cast("type[Engine[Any]]", SubBlockEngine)

    _: KW_ONLY
    block_length: int = 8

    def check_model(self, model: Transformer) -> None:
        super().check_model(model)
        if model.config.grid is None:
            raise UserError(
                "SubBlockSampler needs a block-causal model: take BlockDiffusionSampler for this checkpoint"
            )
