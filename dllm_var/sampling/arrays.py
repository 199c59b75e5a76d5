"""Small work on whichever array library starts it faster.

A decoding step does some hundred operations on a few positions each, and each takes longer to start than to run.
Written for either array library, they run in numpy on CPU tensors, without a copy; those of other devices stay there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def arrays(*values: Any) -> tuple[Any, ...]:
    """Returns numpy and views of CPU tensors as its arrays, or torch and the tensors of any other device."""
    if isinstance(values[0], np.ndarray) or values[0].device.type == "cpu":
        return np, *[value if isinstance(value, np.ndarray) else value.numpy() for value in values]
    return torch, *values


def there(device: torch.device, *values: np.ndarray) -> tuple[Any, ...]:
    """Returns the library for small work on a device, and what the host counted as that library's arrays."""
    if device.type == "cpu":
        return np, *values
    return torch, *(torch.from_numpy(value).to(device) for value in values)


def tensors(*values: Any) -> Any:
    """Returns a tuple of what was computed from `arrays`, as tensors again."""
    return tuple([value if isinstance(value, Tensor) else torch.from_numpy(value) for value in values])


def on_host(*values: Any) -> tuple[np.ndarray, ...]:
    """Returns arrays of one shape as numpy's, waiting for their device once."""
    if isinstance(values[0], np.ndarray):
        return values
    if values[0].device.type == "cpu":
        return tuple(value.numpy() for value in values)
    return tuple(torch.stack([value.long() for value in values]).cpu().numpy())
