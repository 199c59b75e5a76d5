"""Counts of a training batch, for speed and FLOPs."""

from __future__ import annotations

from torch import Tensor

from dllm_var.objectives.base import Batch, NoisedBatch


def step_counts(batch: Batch, noised: NoisedBatch, attention: str) -> dict[str, int | Tensor]:
    """Counts a batch's work; counts on the device stay there, so that nothing waits for it.

    They are `tokens`, `supervised_tokens` and `samples` of the rows; `loss_tokens`; `read_tokens`, which the layers
    read, an objective's copies included; `attended_pairs` of tokens: both halves of a causal square, and of annealed
    attention as many as at its end.
    """
    rows, length = noised.input_ids.shape
    used = batch["segment_ids"] >= 0  # padding is at position 0 too
    if noised.attention_rule is not None:
        pairs: int | Tensor = noised.attention_rule.pairs()
    elif attention == "document":
        pairs = ((2 * batch["position_ids"] + 1) * used).sum()  # the first n odd numbers add up to n squared
    else:
        pairs = rows * length * length
    return {
        "tokens": batch["input_ids"].numel(),
        "read_tokens": noised.input_ids.numel(),
        "attended_pairs": pairs,
        "supervised_tokens": batch["supervised"].sum(),
        "loss_tokens": len(noised.scored),
        "samples": ((batch["position_ids"] == 0) & used).sum(),
    }
