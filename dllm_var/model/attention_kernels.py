"""The order in which torch may choose attention kernels in training: measured once per card, and remembered in a file.

On Hopper cuDNN's kernel may be twice as fast as FlashAttention 2, or not be there. Which one wins depends on the card,
on versions and on sizes.
"""

import math
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm_var.files import cache_folder, remember

Sizes = tuple[int, int, int, int]  # length of a row, heads of queries, heads of keys, width of a head
CANDIDATES = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
OTHERWISE = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
WARM_UP, REPEATS = 2, 5
MEASURED_ROWS_TOKENS = 8_192  # tokens that a kernel is measured on


@cache
def kernels_for(sizes: Sizes, causal: bool, dtype: torch.dtype, device: torch.device) -> tuple[SDPBackend, ...]:
    """Returns the kernels for attention without a mask, the fastest forward and backward first."""
    card = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    key = f"{card}, {dtype}, {sizes}{', causal' if causal else ''}"
    return remembered(key, lambda name: seconds_of(CANDIDATES[name], sizes, causal, dtype, device))


def remembered(key: str, measure: Callable[[str], float]) -> tuple[SDPBackend, ...]:
    """Returns the candidates by the seconds that `measure` says or once said, and behind them those for all sizes."""
    seconds = remember(cache_folder(), ["attention kernels", key], lambda: {name: measure(name) for name in CANDIDATES})
    return (*(CANDIDATES[name] for name in sorted(seconds, key=lambda name: seconds[name])), *OTHERWISE)


def seconds_of(kernel: SDPBackend, sizes: Sizes, causal: bool, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the seconds of a forward and a backward pass with random numbers; infinity if there is no such kernel."""
    length, heads, kv_heads, width = sizes
    rows = max(1, MEASURED_ROWS_TOKENS // length)
    shapes = ((rows, count, length, width) for count in (heads, kv_heads, kv_heads))
    queries, keys, values = (torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes)
    times = []
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), sdpa_kernel([kernel]):
            for _ in range(WARM_UP + REPEATS):
                wait_for(device)
                began = time.perf_counter()
                mixed = F.scaled_dot_product_attention(
                    queries, keys, values, is_causal=causal, enable_gqa=heads != kv_heads
                )
                mixed.sum().backward()
                wait_for(device)
                times.append(time.perf_counter() - began)
    except RuntimeError:
        return math.inf
    return min(times[WARM_UP:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
