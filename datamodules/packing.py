"""Pack plans: which piece of which sample stands where in which row, from the samples' lengths alone.

A plan covers one epoch. It is made of a few flat arrays, so that any row is found without walking the ones before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_var.datamodules.best_fit import Ints
from dllm_var.datamodules.layout import count_rows, lay_out

SIZES = 8_192  # best_fit tells no more sizes apart than this, however long the context
SIZES_AT_LEAST = 2_048  # nor more than this where rounding up adds less than half a percent to the lengths


@dataclass(frozen=True)
class Spans:
    """Pieces of samples in the order they stand in a batch of rows.

    Args:
        sample: which sample, shape [pieces].
        start: first position within the sample, shape [pieces].
        length: number of positions, shape [pieces].
        row: index of the row within the batch, ascending, shape [pieces].
        column: first position within the row, shape [pieces].
    """

    sample: Ints
    start: Ints
    length: Ints
    row: Ints
    column: Ints


@dataclass(frozen=True)
class ConcatPlan:
    """One stream of samples, cut every `context_length` positions.

    Args:
        order: samples in stream order, shape [samples].
        ends: stream position where each of them ends, shape [samples].
        context_length: positions in a row.
    """

    order: Ints
    ends: Ints
    context_length: int

    @property
    def rows(self) -> int:
        return -(-int(self.ends[-1]) // self.context_length) if len(self.ends) else 0

    @property
    def cut(self) -> int:
        """How many samples stand in more than one row."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return int(np.count_nonzero(starts // self.context_length != (self.ends - 1) // self.context_length))

    def spans(self, rows: Ints) -> Spans:
        """Finds the pieces that make up the given rows, shape [batch]."""
        left = np.asarray(rows, dtype=np.int64) * self.context_length
        right = np.minimum(left + self.context_length, self.ends[-1])
        first = np.searchsorted(self.ends, left, side="right")
        last = np.searchsorted(self.ends, right, side="left")
        row, place = _ragged(first, last + 1 - first)
        end = self.ends[place]
        begin = np.where(place > 0, self.ends[place - 1], 0)
        start = np.maximum(begin, left[row])
        return Spans(self.order[place], start - begin, np.minimum(end, right[row]) - start, row, start - left[row])


@dataclass(frozen=True)
class WholePlan:
    """Rows of whole samples, none of them cut.

    Args:
        order: samples in the order of rows and columns, shape [samples].
        ends: running total of their lengths, shape [samples].
        first: index into `order` of each row's first sample, and one past the last, shape [rows + 1].
    """

    order: Ints
    ends: Ints
    first: Ints

    cut = 0

    @property
    def rows(self) -> int:
        return len(self.first) - 1

    def spans(self, rows: Ints) -> Spans:
        """Finds the pieces that make up the given rows, shape [batch]."""
        rows = np.asarray(rows, dtype=np.int64)
        first = self.first[rows]
        row, place = _ragged(first, self.first[rows + 1] - first)
        begin = np.where(place > 0, self.ends[place - 1], 0)
        left = np.where(first > 0, self.ends[first - 1], 0)
        return Spans(self.order[place], np.zeros_like(begin), self.ends[place] - begin, row, begin - left[row])


Plan = ConcatPlan | WholePlan


def plan_concat(lengths: Ints, context_length: int, generator: np.random.Generator) -> ConcatPlan:
    """Strings all samples together and cuts every `context_length` positions (what the paper does).

    Args:
        lengths: positions each sample takes, shape [samples].
        context_length: positions in a row.
        generator: shuffles the samples.
    """
    order = _shuffled(len(lengths), generator)
    return ConcatPlan(order, np.cumsum(lengths[order], dtype=np.int64), context_length)


def count_concat(lengths: Ints, context_length: int) -> int:
    """Number of rows that `plan_concat` makes."""
    return -(-int(lengths.sum(dtype=np.int64)) // context_length)


def plan_best_fit(lengths: Ints, context_length: int, generator: np.random.Generator) -> WholePlan:
    """Puts samples together that fill a row, or nearly; no sample is ever cut.

    Which lengths share a row is decided by `dllm_var.datamodules.layout.lay_out`, from their histogram; the samples are
    dealt to the places afterwards.

    Args:
        lengths: positions each sample takes, each from 1 to `context_length`, shape [samples].
        context_length: positions in a row.
        generator: shuffles the rows, the samples of equal length and the places within a row.
    """
    sizes, capacity = _coarse(lengths, context_length)
    size, row = lay_out(np.bincount(sizes, minlength=capacity + 1), capacity)
    row = _shuffled(int(row.max(initial=-1)) + 1, generator)[row].astype(np.int64)
    places = np.argsort(row << 32 | generator.permutation(len(row)))  # row after row, each in a random order
    size, row = size[places], row[places]
    samples = _shuffled(len(lengths), generator)
    order = np.empty_like(samples)
    order[np.argsort(size, kind="stable")] = samples[np.argsort(sizes[samples], kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return WholePlan(order, np.cumsum(lengths[order], dtype=np.int64), first)


def count_best_fit(lengths: Ints, context_length: int) -> int:
    """Number of rows that `plan_best_fit` makes."""
    sizes, capacity = _coarse(lengths, context_length)
    return count_rows(np.bincount(sizes, minlength=capacity + 1), capacity)


PLANS: dict[str, Callable[[Ints, int, np.random.Generator], Plan]] = {
    "concat": plan_concat,
    "best_fit": plan_best_fit,
}
VERSIONS = {"concat": 1, "best_fit": 2}  # raised whenever rows would not be the same any more; checkpoints record it
COUNTS: dict[str, Callable[[Ints, int], int]] = {"concat": count_concat, "best_fit": count_best_fit}


def _shuffled(count: int, generator: np.random.Generator) -> Ints:
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    generator.shuffle(order)
    return order


def _coarse(lengths: Ints, context_length: int) -> tuple[NDArray[np.uint16], int]:
    """Lengths rounded up to few distinct sizes, and how many of their unit a row holds."""
    mean = int(lengths.sum(dtype=np.int64)) // max(len(lengths), 1)
    unit = max(-(-context_length // SIZES), min(-(-context_length // SIZES_AT_LEAST), mean // 200), 1)
    capacity = context_length // unit
    # What is longer than all whole units of a row has the row for itself anyway.
    return np.minimum(-(-lengths // unit), capacity).astype(np.uint16), capacity


def _ragged(starts: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """Counts up from each start: the owner of each number, and the number, both of shape [sum of sizes]."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    before = np.cumsum(sizes) - sizes
    return owner, np.arange(len(owner)) + np.repeat(starts - before, sizes)
