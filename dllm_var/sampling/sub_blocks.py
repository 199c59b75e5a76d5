"""Sub-blocks with a cache of their block: the dual cache of Fast-dLLM v2 (arXiv 2509.26328)."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockEngine
from dllm_var.sampling.engine import Batch, Engine, Row


@dataclass(eq=False)
class SubBlockRow(Row):
    lead: int = 0  # tokens of its sub-block that are left of those to be decoded, such as a prompt's end
    begun: bool = False  # whether the first token of its sub-block is known, and the rest of the block in the cache


class SubBlockEngine(BlockEngine[SubBlockRow]):
    """Reads a row's whole window until a sub-block's first token is known, and then the sub-block alone.

    What is beside the sub-block in its block is then in the cache as the last whole read left it.
    """

    row_class = SubBlockRow

    def start(self, slot: int) -> None:
        super().start(slot)
        row = self.rows[slot]
        begin = int(self.cache.lengths[slot]) + row.pending + row.shown
        row.lead, row.begun = min(begin % self.sampler.block_length, row.shown), False

    def skipped(self, row: SubBlockRow) -> int:
        return row.shown - row.lead if row.begun else 0

    def settle(self, batch: Batch[SubBlockRow], status: list[list[int]]) -> None:
        super().settle(batch, status)
        before = torch.tensor([row.shown - row.lead for row in batch.rows])
        firsts = (self.cache.lengths[batch.slots] + before).to(self.device)
        known = self.canvas[batch.slots].gather(1, firsts[:, None])[:, 0] != self.mask_id
        for row, is_known in zip(batch.rows, known.tolist(), strict=True):
            row.begun = row.steps > 0 and is_known

    def read_window(self, batch: Batch[SubBlockRow]) -> Tensor:
        lengths = self.cache.lengths if batch.index is None else self.cache.lengths[batch.index]
        told = [(row.begun, self.skipped(row), row.lead) for row in batch.rows]
        begun, skipped, lead = torch.tensor(told).unbind(1)
        whole = batch.pending + batch.window
        counts, start = torch.where(begun > 0, lead + batch.width, whole)[:, None], (lengths + skipped)[:, None]
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
    """Decodes a block-causal model in sub-blocks, the rest of a block in the cache once a sub-block has begun.

    `BlockDiffusionSampler` with the same `block_length` reads the whole block at each step. Here, once a sub-block's
    first token is known, further steps read `block_length` tokens, so that the rest of the block does not see what they
    commit: `use_block_cache` of the released code.

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
