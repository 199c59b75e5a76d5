"""The output head where a policy needs it, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer


def score_positions(
    model: Transformer, hidden: Tensor, where: Tensor, shift: Tensor, count: int, suppressed: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Runs the head at some positions of every row's block.

    Args:
        model: The transformer; its mask token gets -inf.
        hidden: Hidden states [R, L, hidden] of a forward.
        where: The positions wanted, in the block [R, K].
        shift: Where each row's block begins within the forward [R].
        count: How many positions that is, known beforehand so that the device need not be asked.
        suppressed: Token ids that get -inf, too.

    Returns:
        Indices of the positions in the flattened block [M], and their logits [M, V] in float32.
    """
    scored = where.reshape(-1).nonzero_static(size=count).squeeze(1)
    row, offset = scored // where.size(1), scored % where.size(1)
    logits = model.lm_head(hidden[row, offset + shift[row]]).float()
    return scored, forbid(logits, model.config.mask_id, suppressed)


def forbid(logits: Tensor, mask_id: int | None, suppressed: Sequence[int] = ()) -> Tensor:
    """Sets the logits [M, V] of the mask token and of suppressed ones to -inf, in place."""
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf
    if suppressed:
        logits[:, list(suppressed)] = -torch.inf
    return logits


def position_keys(key: Tensor, scored: Tensor, width: int) -> Tensor:
    """Returns a number for each scored position [M] from its row's key [R], for draws."""
    return key[scored // width] * width + scored % width
