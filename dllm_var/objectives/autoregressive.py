"""Next-token prediction with a causal transformer: the baseline every diffusion sampler is measured against."""

import torch
from torch import Tensor

from dllm_var.objectives.base import Batch, KeyedNoise, NoisedBatch, Objective


class Autoregressive(Objective):
    """Predicts each supervised token from everything left of it in its segment; nothing is masked."""

    causal = True

    def likelihood(self) -> Objective:
        """The same: its loss is the exact likelihood."""
        return self

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        tokens = batch["input_ids"]
        targets, loss_mask = next_token_targets(batch)
        mask_rate = torch.ones_like(tokens, dtype=torch.float32)
        return NoisedBatch(tokens, targets, loss_mask, mask_rate, weights=None, normaliser=loss_mask.sum())


def next_token_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns each position's next token [B, L] and where that is supervised and of the same segment [B, L]."""
    follows = batch["segment_ids"] == batch["segment_ids"].roll(-1, dims=1)
    supervised = batch["supervised"].roll(-1, dims=1) & follows
    supervised[:, -1].fill_(False)  # nothing follows the last position of a row
    return batch["input_ids"].roll(-1, dims=1), supervised
