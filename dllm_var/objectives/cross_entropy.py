"""The output head and its cross-entropy where, and only where, a prediction is scored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of float32 logits alive at a time


def _scored(hidden: Tensor, targets: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(dim=-1)


def head_cross_entropy(
    head: nn.Linear, hidden: Tensor, targets: Tensor, logits_per_chunk: int = LOGITS_PER_CHUNK
) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy [M] in nats and the most likely token [M] at M positions.

    Beyond `logits_per_chunk` the head runs in chunks whose logits are computed again in the backward pass, so that
    [M, vocabulary] never exists as a whole.

    Args:
        head: The output head, hidden size to vocabulary.
        hidden: Hidden states at the scored positions [M, hidden].
        targets: Token ids [M].
        logits_per_chunk: Number of logits that may exist at a time.
    """
    chunk = max(1, logits_per_chunk // head.out_features)
    if hidden.size(0) <= chunk:
        return _scored(hidden, targets, head)
    parts = [
        checkpoint(_scored, h, t, head, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([loss for loss, _ in parts]), torch.cat([tokens for _, tokens in parts])
