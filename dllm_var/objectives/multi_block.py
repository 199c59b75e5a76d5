"""Multi-block diffusion: open blocks are denoised behind others that are open, too (MultiTF of MBD-LMs)."""

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.objectives.base import Batch, KeyedNoise, NoisedBatch, span_starts
from dllm_var.objectives.block_diffusion import BlockDiffusion, Blocks, find_blocks

MARGIN = 0.01  # share of the range of mask rates that stays unused at its upper end


class MultiBlockDiffusion(BlockDiffusion):
    """Masks groups of neighbouring blocks, less on the left than on the right, as multi-block decoding meets them.

    A copied token sees the copies of its own block and of those before it in its group, and the clean text before the
    group. So a group of n blocks shows what `MultiBlockSampler` with `sees_ahead: false` decodes with 1, 2, ... n open
    blocks. This is MultiTF (github.com/SJTU-DENG-Lab/mbd-lms): the mask rate of a block is p ~ U(rate of the block
    before, t_max less a hundredth of the range), and floor(n * p) of its n tokens are masked. The loss is the mean
    cross-entropy of the masked tokens, each weighted by 1 / p.

    Differences from the released code:

    - Terminators are always masked, as in all of dllm-var. So p is 1 for them, hence their weight; n leaves them out.
    - Blocks are counted from the start of each answer, as the sampler does, and the prompt is not copied. Masks that
      are not scored fill the last block, not padding that is.
    - Sizes are drawn from left to right, the last group getting what is left; there they are shuffled.
    - Each row is read once, with sizes of its own, not in a list of layouts (`coverage`). Half of the answers begin
      with a group of one block if `blocks` is 2, since otherwise every second block would never begin a group.
    - `whole_share` adds blocks of nothing but masks, as the sampler opens them; floor(n * p) is below n.
    - There is no loss towards a teacher (its weight is 0 there).

    Args:
        block_length: The sampler's `block_length`.
        blocks: Largest group, at least the sampler's `blocks`. Sizes are drawn evenly from 2 to this; a group of one
            block is left only where that cannot be avoided.
        t_min: Smallest mask rate.
        t_max: Largest mask rate.
        whole_share: Fraction of the blocks whose mask rate is 1 instead. The blocks behind them in their group follow.
        causal_context: As in `BlockDiffusion`.
        autoregressive_weight: As in `BlockDiffusion`, where a masked token has the weight 1 / p.
        token_shift: As in `BlockDiffusion`; inside a group, the first token of a block is predicted at the copy of the
            token before it.
    """

    def __init__(
        self,
        block_length: int = 32,
        blocks: int = 4,
        t_min: float = 0.001,
        t_max: float = 1.0,
        whole_share: float = 0.0,
        causal_context: bool = False,
        autoregressive_weight: float = 0.0,
        token_shift: bool = False,
    ) -> None:
        super().__init__(
            block_length, "alone", t_min, t_max, whole_share, causal_context, autoregressive_weight, token_shift
        )
        if blocks < 2:
            raise UserError(f"objective MultiBlockDiffusion needs blocks >= 2, got {blocks}: use BlockDiffusion for 1")
        self.blocks = blocks

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        blocks = find_blocks(batch, self.block_length)
        blocks = blocks._replace(group=self.groups(batch, blocks, generator))
        rate = self.rates(batch, blocks, generator)[:, :, None]
        ends = self.terminators(batch, blocks)
        free = blocks.answer & ~ends
        keys = blocks.take(generator.uniform(batch["row"], batch["input_ids"].size(1), stream=2))
        order = keys.masked_fill(~free, 2.0).argsort(dim=-1).argsort(dim=-1)
        masked = (order < (rate * free.sum(dim=-1, keepdim=True)).floor()) | ends
        noised = self.lay_out(batch, blocks, masked[:, None], torch.where(ends, 1.0, rate)[:, None])
        weights = 1 / noised.mask_rate.clamp_min(self.t_min)
        noised.normaliser = noised.at_loss(weights).sum()
        noised.weights = weights if noised.weights is None else weights * noised.weights
        return noised

    def groups(self, batch: Batch, blocks: Blocks, generator: KeyedNoise) -> Tensor:
        """Draws groups of blocks; returns the number of the first block of each clean token's group [B, L]."""
        start = span_starts(batch)
        column = torch.arange(start.size(1), device=start.device).expand_as(start)
        tokens = torch.zeros_like(start).scatter_add(1, start, torch.ones_like(start)).gather(1, start)  # of the span
        # An answer's i-th size is that of its i-th column; there are no more groups than tokens.
        least = torch.where(column == start, 1, 2) if self.blocks == 2 else 2
        size = least + (generator.uniform(batch["row"], start.size(1), stream=4) * (self.blocks + 1 - least)).long()
        total = size.cumsum(dim=1)
        place = (total - (total - size).gather(1, start)) * self.block_length  # in its span, where the next one begins
        begins = (column == start).scatter(1, start + place * (place < tokens), True)
        before = torch.where(begins, column, 0).cummax(dim=1).values.roll(1, dims=1)  # where the group before begins
        single = begins & (column > start) & (column + self.block_length >= start + tokens)
        room = single & (column - before < self.blocks * self.block_length)
        taken = single & ~room & (self.blocks > 2)  # it takes a block of the group before, which has enough
        begins = (begins & ~room & ~taken) | taken.roll(-self.block_length, dims=1)
        return torch.where(begins, blocks.number, 0).cummax(dim=1).values

    def rates(self, batch: Batch, blocks: Blocks, generator: KeyedNoise) -> Tensor:
        """Draws the mask rate of each block [B, N]; none is below that of the block before it in its group."""
        uniform, floor = (
            generator.uniform(batch["row"], batch["input_ids"].size(1), stream).gather(1, blocks.start)
            for stream in (1, 5)
        )
        place = (blocks.number - blocks.group).gather(1, blocks.start)  # in its group
        high, share = self.t_max - MARGIN * (self.t_max - self.t_min), 1 - self.whole_share
        rate = self.t_min + (high - self.t_min) * floor  # the lowest of a group that begins here
        for at in range(self.blocks):
            before = rate if at == 0 else rate.roll(1, dims=1)
            drawn = before + (high - before).clamp_min(0) * uniform / share
            rate = torch.where(place == at, torch.where(uniform < share, drawn, 1.0), rate)
        return rate
