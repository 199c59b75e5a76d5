"""The output head where a policy needs it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.arrays import arrays, tensors


class NotFinite(UserError):
    """A model's logits were NaN or infinite, so that there is no most likely token."""


@contextmanager
def finite_logits(model: Transformer) -> Iterator[Callable[[], None]]:
    """Watches the head of a model while it decodes, whichever sampler calls it.

    Yields:
        What raises `NotFinite` when a logit so far was NaN or infinite. It waits for the device, so it is called when
        an answer is told; in between, each forward leaves one number on the device.
    """
    largest: list[Tensor] = []

    def watch(head: Any, inputs: Any, logits: Tensor) -> None:
        if logits.numel():
            largest.append(logits.aminmax().max)  # NaN when any is; amax is slower in 16 bits
        if len(largest) > 1:
            largest[:] = [torch.maximum(*largest)]

    def check() -> None:
        if largest and not largest[0].isfinite():
            raise NotFinite(
                "the model's predictions are not numbers (NaN or infinite): its training diverged, or its numbers are "
                "too large for its type; take an earlier checkpoint, or weights in bfloat16 or float32"
            )

    handle = model.lm_head.register_forward_hook(watch)
    try:
        yield check
    finally:
        handle.remove()


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
    if xp is np and rows == 1 and count == where.size:  # one row's whole block: a slice, and nothing to look for
        scored = torch.arange(count)
        chosen = hidden[0].narrow(0, int(starts[0]), count)
    else:
        scored, places = tensors(*_places(xp, where, starts, length, count))
        chosen = hidden.flatten(0, 1).index_select(0, places)
    logits = model.lm_head(chosen).float()
    return scored, forbid(logits, model.config.mask_id, suppressed)


def _places(xp: ModuleType, where: Any, starts: Any, length: int, count: int) -> tuple[Any, Any]:
    """Returns indices of the wanted positions in the flattened block, and in the flattened forward, each [M]."""
    if xp is np:
        places = (starts[:, None] + np.arange(where.shape[1]))[where]
        return np.flatnonzero(where), places + np.repeat(np.arange(0, len(where) * length, length), where.sum(1))
    scored = where.reshape(-1).nonzero_static(size=count).squeeze(1)
    row = scored // where.size(1)
    return scored, row * length + starts[row] + scored % where.size(1)


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
