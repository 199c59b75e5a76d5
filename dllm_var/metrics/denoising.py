"""Validation metrics of masked diffusion: where on the noise scale the loss sits, and whether the end is recognised."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

BUCKETS = 5  # of mask rates in [0, 1], equally wide


class DenoisingMetrics(Metric):
    """Loss, loss by mask rate, accuracy, terminator recall and likelihood bound from the tokens that carried a loss.

    `compute()` gives 0-dim tensors:

    - `loss`: mean cross-entropy over the loss tokens (nats).
    - `loss_t=0.1`, ...: the same for the tokens whose row had a mask rate in that bucket (named by its middle); buckets
      without a token are left out.
    - `masked_accuracy`: share of loss tokens whose most likely token is the right one.
    - `terminator_recall`: the same for the terminators among them; left out when there were none.
    - `nelbo`: negative evidence lower bound in nats per supervised token, the sum of weight x loss over the supervised
      tokens (MDLM, arXiv 2406.07524, eq. 10; LLaDA, arXiv 2502.09992, eq. 4). A bound only if mask rates cover
      [0, 1] evenly. For an autoregressive model (weight 1 everywhere) it is the exact negative log-likelihood.
    - `perplexity_bound`: exp(nelbo).

    Everything is a sum, so that several processes and uneven batches add up exactly.
    """

    full_state_update = False
    loss_sum: Tensor
    weighted_loss_sum: Tensor
    loss_tokens: Tensor
    correct: Tensor
    terminators: Tensor
    terminators_found: Tensor
    supervised_tokens: Tensor
    bucket_loss_sum: Tensor
    bucket_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss_sum", "weighted_loss_sum"):
            self.add_state(name, default=torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        for name in ("loss_tokens", "correct", "terminators", "terminators_found", "supervised_tokens"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("bucket_loss_sum", default=torch.zeros(BUCKETS, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("bucket_tokens", default=torch.zeros(BUCKETS, dtype=torch.long), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Moves the sums to another device, never to another type: a model in bfloat16 still adds up in float32."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)

    def update(
        self,
        token_loss: Tensor,
        correct: Tensor,
        mask_rate: Tensor | None,
        is_terminator: Tensor,
        weight: Tensor,
        supervised_tokens: int | Tensor,
    ) -> None:
        """Adds one batch of `supervised_tokens`, M of which carried a loss; all tensors are [M].

        `token_loss` is in nats, `correct` says whether the most likely token is the right one, `mask_rate` in [0, 1] is
        None if the objective has none, and `weight` is one over the probability that the position was masked.
        """
        token_loss = token_loss.detach().float()
        self.loss_sum += token_loss.sum()
        self.weighted_loss_sum += (token_loss * weight).sum()
        self.loss_tokens += token_loss.numel()
        self.correct += correct.sum()
        self.terminators += is_terminator.sum()
        self.terminators_found += (correct & is_terminator).sum()
        self.supervised_tokens += supervised_tokens
        if mask_rate is not None:
            bucket = (mask_rate * BUCKETS).long().clamp(0, BUCKETS - 1)
            self.bucket_loss_sum.index_add_(0, bucket, token_loss)
            self.bucket_tokens += torch.bincount(bucket, minlength=BUCKETS)

    def compute(self) -> dict[str, Tensor]:
        nelbo = self.weighted_loss_sum / self.supervised_tokens.clamp(min=1)
        metrics = {
            "loss": self.loss_sum / self.loss_tokens.clamp(min=1),
            "masked_accuracy": self.correct / self.loss_tokens.clamp(min=1),
            "nelbo": nelbo,
            "perplexity_bound": nelbo.exp(),
        }
        if self.terminators > 0:
            metrics["terminator_recall"] = self.terminators_found / self.terminators
        for bucket in self.bucket_tokens.nonzero().flatten().tolist():
            middle = (bucket + 0.5) / BUCKETS
            metrics[f"loss_t={middle:g}"] = self.bucket_loss_sum[bucket] / self.bucket_tokens[bucket]
        return metrics
