"""Masking with losses weighted by 1/t: the objective of MDLM and of LLaDA's fine-tuning, and a bound on likelihood."""

from __future__ import annotations

from typing import Literal

import torch

from dllm_var.objectives.base import (
    SMALLEST_RATE,
    Batch,
    KeyedNoise,
    NoisedBatch,
    Objective,
    check_rates,
    golden_fractions,
    mask_rates,
    segment_starts,
)


class Mdlm(Objective):
    """Masks supervised tokens with probability t ~ U(eps, 1); the 1/t-weighted loss bounds the likelihood.

    With `data.eos_padding` the terminators that fill the canvas are supervised too, which is LLaDA's recipe.
    MDLM: arXiv 2406.07524, equation 10; LLaDA: arXiv 2502.09992, algorithm 2.

    Args:
        eps: Smallest mask rate.
        rate_per: Draws t once per `segment` (each sample its own, as in the papers) or once per `row`.
        mean_over: The loss is the mean over all supervised `tokens`, or over all `samples`, each the mean over its own
            supervised tokens (LLaDA's fine-tuning code; a short answer then counts as much as a long one). A sample is
            a segment of a row with at least one supervised token.

    Raises:
        UserError: Unless 0 < eps <= 1.
    """

    def __init__(
        self,
        eps: float = 1e-3,
        rate_per: Literal["row", "segment"] = "segment",
        mean_over: Literal["tokens", "samples"] = "tokens",
    ) -> None:
        check_rates("Mdlm", eps, 1.0)
        self.eps, self.rate_per, self.mean_over = eps, rate_per, mean_over

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        supervised = batch["supervised"]
        rate = mask_rates(batch, generator, self.eps, 1.0, self.rate_per == "segment")
        weights, normaliser = 1.0 / rate, supervised.sum()
        if self.mean_over == "samples":
            starts = segment_starts(batch)
            answer_length = torch.zeros_like(starts).scatter_add_(1, starts, supervised.long())  # at each start
            weights = weights / answer_length.gather(1, starts).clamp_min(1)
            normaliser = (answer_length > 0).sum()
        return self.mask(batch, generator, rate, weights=weights, normaliser=normaliser)


class EvenMasking(Objective):
    """Masks every supervised token, terminators too, with a rate that walks evenly over (0, 1) from row to row.

    The 1/t-weighted loss under it estimates the NELBO (MDLM, arXiv 2406.07524, equation 10), whatever the model was
    trained with. Successive multiples of the golden ratio are about as even as a grid for any number of rows.
    """

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        supervised = batch["supervised"]
        rate = (SMALLEST_RATE + (1 - SMALLEST_RATE) * golden_fractions(batch["row"]))[:, None].expand_as(supervised)
        return self.mask(batch, generator, rate, weights=1.0 / rate, normaliser=supervised.sum())
