"""How much accuracy a decoder keeps while it commits more tokens per forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

ALPHA = 3.0  # how much lost accuracy costs
TOLERANCE = 5.0  # per cent below the first point's accuracy that still count


def aup(parallelism: Sequence[float], accuracy: Sequence[float], best_accuracy: float | None = None) -> float:
    """Accuracy under parallelism: the weighted area under accuracy as a function of tokens per forward.

    Points are taken from the least to the most parallel; those more than `TOLERANCE` below the first are left out. The
    area left of the first point is a rectangle, the others are trapezoids of y W(y), where the weight
    W(y) = min(exp(-ALPHA (1 - y / best_accuracy)), 1) makes lost accuracy cost more than the tokens it buys
    (d3LLM, arXiv 2601.07568). Accuracies are in per cent; `best_accuracy` is the best that any method has on the task,
    of these points when None. Raises ValueError without a point, or with one whose parallelism is not above 0.
    """
    if len(parallelism) != len(accuracy) or not parallelism or min(parallelism) <= 0:
        raise ValueError("aup needs as many accuracies as parallelisms, at least one, and parallelisms above 0")
    points = sorted(zip(parallelism, accuracy, strict=True), key=lambda point: (point[0], -point[1]))
    first, floor = points[0], points[0][1] - TOLERANCE
    best = max(accuracy) if best_accuracy is None else best_accuracy
    lost = {y: max(1 - y / best, 0) if best > 0 else 0 for _, y in points}
    kept = [(tokens, y * math.exp(-ALPHA * lost[y])) for tokens, y in points if y >= floor]
    area = first[0] * first[1]
    for (left, low), (right, high) in pairwise(kept):
        area += (right - left) * (low + high) / 2
    return area
