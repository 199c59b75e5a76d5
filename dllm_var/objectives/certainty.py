"""Training a model to be sure of more tokens at once (dParallel, arXiv 2509.26488, section 3)."""

from __future__ import annotations

from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.objectives.base import Objective


class Certainty(Objective):
    """An objective whose token loss may add the entropy of predictions that are already right.

    Args:
        certainty: Weight of that entropy (2.0 in the paper, on a trained model); 0 leaves it out.
        certainty_temperature: Divides the logits before that entropy (0.5 in the paper).

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

    def _plain_loss(self) -> bool:
        return self.certainty == 0 and type(self).token_loss is Certainty.token_loss

    def token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = super().token_loss(logits, targets)
        if self.certainty == 0:
            return loss
        right = logits.argmax(dim=-1) == targets
        log_probs = (logits / self.certainty_temperature).log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return loss + self.certainty * entropy * right
