"""The noise under which likelihood is measured: fixed, and spread evenly over all mask rates."""

from __future__ import annotations

import torch

from dllm_var.objectives.base import Batch, NoisedBatch, Objective
from dllm_var.objectives.noise import KeyedNoise, golden_fractions


class EvenMasking(Objective):
    """Masks every supervised token, terminators too, with a rate that walks evenly over (0, 1) from row to row.

    The 1/t-weighted loss under it estimates the NELBO (MDLM 2406.07524, equation 10), whatever the model was trained
    with. Successive multiples of the golden ratio are about as even as a grid for any number of rows.

    Args:
        smallest: Smallest mask rate; keeps the weights finite.
    """

    def __init__(self, smallest: float = 1e-2) -> None:
        self.smallest = smallest

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        special = self.specials()
        tokens, supervised, rows = batch["input_ids"], batch["supervised"], batch["row"]
        even = golden_fractions(rows)
        rate = (self.smallest + (1 - self.smallest) * even)[:, None].expand(-1, tokens.size(1))
        masked = (generator.uniform(rows, tokens.size(1), stream=2) < rate) & supervised
        return NoisedBatch(
            input_ids=torch.where(masked, special.mask_id, tokens),
            targets=tokens,
            loss_mask=masked,
            mask_rate=rate,
            weights=1.0 / rate,
            normaliser=supervised.sum(),
        )
