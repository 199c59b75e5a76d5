"""What a forward costs, by how many tokens it takes: why parallel decoding pays on one machine and not on another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dllm_var.benchmarking.instruments import synchronise
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer

WIDTHS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256)
PREFIX = 64  # cached tokens before the window
ROUNDS = 15
SHARE_OF_A_SECOND = 0.02  # time of one reading; small forwards are repeated until they fill it


@dataclass
class ForwardCost:
    """Cost of one forward.

    Args:
        width: Tokens of the forward, behind `PREFIX` cached ones.
        seconds: Wall time of layers and output head, batch 1.
        relative: The same over that of a forward of one token.
    """

    width: int
    seconds: float
    relative: float


@torch.inference_mode()
def measure_forwards(model: Transformer, widths: Sequence[int] = WIDTHS, rounds: int = ROUNDS) -> list[ForwardCost]:
    """Measures forwards of several widths in turn; medians over rounds.

    Args:
        model: A transformer in eval mode.
        widths: Tokens per forward; 1 is measured in any case, for `relative`.
        rounds: Readings per width.
    """
    weight = model.embedding.weight
    widths = sorted({1, *widths})
    cache = KVCache(model.config, 1, PREFIX + widths[-1], weight.device, weight.dtype)
    tokens = torch.zeros(1, max(PREFIX, widths[-1]), dtype=torch.long, device=weight.device)
    cache.open(PREFIX)
    model.hidden_states(tokens[:, :PREFIX], cache=cache)
    cache.advance(np.array([PREFIX]))

    def seconds(width: int, times: int) -> float:
        synchronise(weight.device)
        began = time.perf_counter()
        for _ in range(times):
            cache.open(width)
            model.lm_head(model.hidden_states(tokens[:, :width], cache=cache))
        synchronise(weight.device)
        return (time.perf_counter() - began) / times

    first = {width: min(seconds(width, 1) for _ in range(3)) for width in widths}  # also the warm-up
    times = {width: max(1, round(SHARE_OF_A_SECOND / cost)) for width, cost in first.items()}
    readings: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(rounds):
        for width in widths:
            readings[width].append(seconds(width, times[width]))
    medians = {width: statistics.median(values) for width, values in readings.items()}
    return [ForwardCost(width, cost, cost / medians[1]) for width, cost in medians.items()]
