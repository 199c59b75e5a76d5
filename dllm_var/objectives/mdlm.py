"""The objective of MDLM and of LLaDA's fine-tuning: any token masked with probability t, loss weighted by 1/t."""

from __future__ import annotations

from typing import Literal

import torch

from dllm_var.objectives.base import Batch, NoisedBatch, Objective, check_rates, mask_rates
from dllm_var.objectives.noise import KeyedNoise


class Mdlm(Objective):
    """Masks supervised tokens with probability t ~ U(eps, 1); the 1/t-weighted loss bounds the likelihood.

    With `data.eos_padding` the terminators that fill the canvas are supervised too, which is LLaDA's recipe.
    MDLM: arXiv 2406.07524, equation 10; LLaDA: arXiv 2502.09992, algorithm 2.

    Args:
        eps: Smallest mask rate.
        rate_per: Draws t once per `segment` (each sample its own, as in the papers) or once per `row`.

    Raises:
        UserError: Unless 0 < eps <= 1.
    """

    def __init__(self, eps: float = 1e-3, rate_per: Literal["row", "segment"] = "segment") -> None:
        check_rates("Mdlm", eps, 1.0)
        self.eps, self.rate_per = eps, rate_per

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        special = self.specials()
        tokens, supervised = batch["input_ids"], batch["supervised"]
        rate = mask_rates(batch, generator, self.eps, 1.0, self.rate_per == "segment")
        masked = (generator.uniform(batch["row"], tokens.size(1), stream=2) < rate) & supervised
        return NoisedBatch(
            input_ids=torch.where(masked, special.mask_id, tokens),
            targets=tokens,
            loss_mask=masked,
            mask_rate=rate,
            weights=1.0 / rate,
            normaliser=supervised.sum(),
        )
