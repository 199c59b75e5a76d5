"""Objectives that mask single tokens: that of dLLM-Var (arXiv 2510.24605), and MDLM's."""

from typing import Literal

import torch

from dllm_var.objectives.base import (
    Batch,
    Certainty,
    KeyedNoise,
    NoisedBatch,
    Objective,
    check_rates,
    is_one_of,
    mask_rates,
    segment_starts,
)


class EosSchedule(Certainty):
    """Masks supervised tokens with probability t and supervised terminators always; mean cross-entropy, no 1/t.

    Args:
        t_min: Smallest mask rate.
        t_max: Largest mask rate.
        rate_per: Draws t once per `row` (the paper) or once per `segment` (each sample its own).
        mask_terminators: Masks supervised terminators with probability 1 (the paper); with t like any token if false.
        certainty: Weight of the mean entropy of predictions that are already right, which makes a model sure of more
            tokens at once (dParallel, arXiv 2509.26488, section 3; there 2.0, on a trained model). 0 leaves it out.
        certainty_temperature: Divides the logits before that entropy (there 0.5).
    """

    def __init__(
        self,
        t_min: float = 0.1,
        t_max: float = 0.9,
        rate_per: Literal["row", "segment"] = "row",
        mask_terminators: bool = True,
        certainty: float = 0.0,
        certainty_temperature: float = 0.5,
    ) -> None:
        super().__init__(certainty, certainty_temperature)
        check_rates("EosSchedule", t_min, t_max)
        self.t_min, self.t_max = t_min, t_max
        self.rate_per, self.mask_terminators = rate_per, mask_terminators

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        rate = mask_rates(batch, generator, self.t_min, self.t_max, self.rate_per == "segment")
        ends = is_one_of(batch["input_ids"], self.specials().terminator_ids) if self.mask_terminators else None
        return self.mask(batch, generator, rate, always=ends)


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
