"""The output head and the loss where, and only where, a prediction is scored."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of float32 logits alive at a time


TokenLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns each prediction's cross-entropy [M] in nats, from logits [M, V]."""
    return F.cross_entropy(logits, targets, reduction="none")


def _scored(hidden: Tensor, targets: Tensor, head: nn.Module, token_loss: TokenLoss) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return token_loss(logits, targets), logits.detach().argmax(dim=-1)


def head_loss(
    head: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    token_loss: TokenLoss = cross_entropy,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Returns the loss [M] and the most likely token [M] at M positions.

    Beyond `logits_per_chunk` the head runs in chunks whose logits are computed again in the backward pass, so that
    [M, vocabulary] never exists as a whole.

    Args:
        head: The output head, hidden size to vocabulary.
        hidden: Hidden states at the scored positions [M, hidden].
        targets: Token ids [M].
        token_loss: Loss [M] from logits [M, V] in float32 and targets.
        logits_per_chunk: Number of logits that may exist at a time.
    """
    chunk = max(1, logits_per_chunk // head.out_features)
    if hidden.size(0) <= chunk:
        return _scored(hidden, targets, head, token_loss)
    parts = [
        checkpoint(_scored, h, t, head, token_loss, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([loss for loss, _ in parts]), torch.cat([tokens for _, tokens in parts])
