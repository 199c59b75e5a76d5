"""The objective of dLLM-Var: the terminator is always masked and must be predicted (arXiv 2510.24605)."""

from __future__ import annotations

from typing import Literal

from dllm_var.objectives.base import Batch, KeyedNoise, NoisedBatch, check_rates, is_one_of, mask_rates
from dllm_var.objectives.certainty import Certainty


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

    Raises:
        UserError: Unless 0 < t_min <= t_max <= 1, certainty >= 0 and certainty_temperature > 0.
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
