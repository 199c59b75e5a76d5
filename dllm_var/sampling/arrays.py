"""Small work on whichever array library starts it faster.

A decoding step does some hundred operations on a few positions each, and each takes longer to start than to run.
Written for either array library, they run in numpy on CPU tensors, without a copy; those of other devices stay there.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def arrays(*values: Tensor) -> tuple[Any, ...]:
    """Returns numpy and views of CPU tensors as its arrays, or torch and the tensors of any other device."""
    if values[0].device.type == "cpu":
        return np, *(value.numpy() for value in values)
    return torch, *values


def tensors(*values: Any) -> Any:
    """Returns a tuple of what was computed from `arrays`, as tensors again."""
    return tuple(value if isinstance(value, Tensor) else torch.from_numpy(value) for value in values)


def on_host(*values: Tensor) -> tuple[np.ndarray, ...]:
    """Returns tensors of one shape as numpy arrays, waiting for their device once."""
    if values[0].device.type == "cpu":
        return tuple(value.numpy() for value in values)
    return tuple(torch.stack([value.long() for value in values]).cpu().numpy())


def row_index(xp: ModuleType, rows: np.ndarray, device: torch.device) -> Any:
    """Returns row numbers [R, 1] for indexing arrays of `xp`."""
    return rows[:, None] if xp is np else torch.from_numpy(rows).to(device)[:, None]
