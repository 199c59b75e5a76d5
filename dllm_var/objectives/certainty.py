"""Training a model to be sure of more tokens at once (dParallel, arXiv 2509.26488, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_var.errors import UserError
from dllm_var.objectives.base import NoisedBatch, Objective
from dllm_var.objectives.cross_entropy import Scores, cross_entropy, head_loss


class Certainty(Objective):
    """An objective that may add the entropy of predictions that are already right to its loss.

    A row's loss is the mean cross-entropy of its loss tokens plus `certainty` times the mean entropy of the rightly
    predicted ones among them, as in dParallel's code, which takes one sequence at a time. Rows count by their loss
    tokens, so that the loss does not depend on how rows are split over batches and processes.

    Args:
        certainty: Weight of that entropy (2.0 in dParallel for LLaDA, 1.0 for Dream, both on a trained model); 0 leaves
            it out. `checkpoints/cmudict_certain` was trained while the entropies' sum was divided by the number of all
            loss tokens, with weight 2.0; with 90 % of the predictions right, that is 1.8 now.
        certainty_temperature: Divides the logits before that entropy (0.5 in dParallel).

    Raises:
        UserError: Unless certainty >= 0 and certainty_temperature > 0.
    """

    def __init__(self, certainty: float, certainty_temperature: float) -> None:
        if certainty < 0 or certainty_temperature <= 0:
            raise UserError(
                f"objective {type(self).__name__} needs certainty >= 0 and certainty_temperature > 0, got "
                f"{certainty} and {certainty_temperature}"
            )
        self.certainty, self.certainty_temperature = certainty, certainty_temperature

    def score(self, head: nn.Linear, hidden: Tensor, noised: NoisedBatch) -> Scores:
        if self.certainty == 0:
            return super().score(head, hidden, noised)
        targets = noised.at_loss(noised.targets)
        terms, guesses = head_loss(head, hidden, targets, self._loss_and_entropy)
        token_loss, entropy = terms.unbind(dim=1)
        right = guesses == targets
        counted = noised.loss_mask.sum(dim=1)  # [B]
        row = torch.arange(len(counted), device=right.device).repeat_interleave(counted, output_size=len(right))
        rights = torch.zeros_like(counted).index_add_(0, row, right.long())
        # The step divides by loss tokens, this mean by right ones.
        token_loss = token_loss + self.certainty * entropy * right * (counted / rights.clamp_min(1))[row]
        weighted = token_loss if noised.weights is None else token_loss * noised.at_loss(noised.weights)
        return Scores(weighted.sum(), token_loss.detach(), right)

    def _loss_and_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns each prediction's cross-entropy and its entropy in nats at `certainty_temperature` [M, 2]."""
        log_probs = (logits / self.certainty_temperature).log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return torch.stack((cross_entropy(logits, targets), entropy), dim=1)
