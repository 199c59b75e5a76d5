"""The output head where a policy needs it, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer
from dllm_var.sampling.arrays import arrays, tensors


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
    rows, length = hidden.shape[:2]
    xp, where, starts = arrays(where, shift)
    scored: Any
    places: Any
    if xp is np:
        scored = np.flatnonzero(where)
        places = (starts[:, None] + np.arange(where.shape[1]))[where]
        places = places + np.repeat(np.arange(0, rows * length, length), where.sum(1)) if rows > 1 else places
    else:
        scored = where.reshape(-1).nonzero_static(size=count).squeeze(1)
        row = scored // where.size(1)
        places = row * length + starts[row] + scored % where.size(1)
    scored, places = tensors(scored, places)
    chosen = hidden.flatten(0, 1).index_select(0, places)
    logits = model.lm_head(chosen).float()
    return scored, forbid(logits, model.config.mask_id, suppressed)


def forbid(logits: Tensor, mask_id: int | None, suppressed: Sequence[int] = ()) -> Tensor:
    """Sets the logits [M, V] of the mask token and of suppressed ones to -inf, in place."""
    if mask_id is not None:
        logits.select(1, mask_id).fill_(-torch.inf)
    if suppressed:
        logits[:, list(suppressed)] = -torch.inf
    return logits


def position_keys(key: Tensor, scored: Tensor, width: int) -> Tensor:
    """Returns a number for each scored position [M] from its row's key [R], for draws."""
    return key[scored // width] * width + scored % width
