"""Pack plans: which piece of which sample stands where in which row, from the samples' lengths alone.

A plan covers one epoch. It is made of a few flat arrays, so that any row is found without walking the ones before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]


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
        return -(-int(self.ends[-1]) // self.context_length)

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
Policy = Callable[[Ints, int, np.random.Generator | None], Plan]


def plan_concat(lengths: Ints, context_length: int, generator: np.random.Generator | None) -> ConcatPlan:
    """Strings all samples together and cuts every `context_length` positions (what the paper does).

    Args:
        lengths: positions each sample takes, shape [samples].
        context_length: positions in a row.
        generator: shuffles the samples; None keeps their order.
    """
    order = _arrange(len(lengths), generator)
    return ConcatPlan(order, np.cumsum(lengths[order], dtype=np.int64), context_length)


def plan_best_fit(lengths: Ints, context_length: int, generator: np.random.Generator | None) -> WholePlan:
    """Puts each sample, longest first, into the fullest row that still has room; no sample is ever cut.

    Samples of equal length are interchangeable, so rows are laid out on the histogram of lengths and the samples dealt
    to the places afterwards: the cost hardly depends on the number of samples. (Histogram packing, arXiv 2107.02027.)

    Args:
        lengths: positions each sample takes, each at most `context_length`, shape [samples].
        context_length: positions in a row.
        generator: shuffles rows, samples of equal length and places within a row; None keeps a fixed order.
    """
    assert lengths.max() <= context_length
    patterns, repeats = fit_histogram(np.bincount(lengths, minlength=context_length + 1), context_length)
    sizes = np.array([len(pattern) for pattern in patterns], dtype=np.int64)
    flat = np.concatenate(patterns)
    # A place is one slot of a row; every pattern stands in as many rows as the histogram allows.
    pattern_of_row = _arrange(int(repeats.sum()), generator)
    pattern_of_row = np.repeat(np.arange(len(patterns), dtype=np.int32), repeats)[pattern_of_row]
    pattern_start = np.cumsum(sizes) - sizes
    row, index = _ragged(pattern_start[pattern_of_row], sizes[pattern_of_row])
    place_length = flat[index]
    first = np.zeros(len(pattern_of_row) + 1, dtype=np.int64)
    np.cumsum(sizes[pattern_of_row], out=first[1:])
    if generator is not None:  # long samples would always lead their row otherwise
        place_length = place_length[np.argsort(row + generator.random(len(row)), kind="stable")]
    dealt = _arrange(len(lengths), generator)
    dealt = dealt[np.argsort(lengths[dealt], kind="stable")]
    order = np.empty_like(dealt)
    order[np.argsort(place_length, kind="stable")] = dealt
    return WholePlan(order, np.cumsum(place_length, dtype=np.int64), first)


def fit_histogram(counts: Ints, capacity: int) -> tuple[list[Ints], Ints]:
    """Best-fit-decreasing over a histogram of lengths.

    Args:
        counts: number of samples of each length, shape [capacity + 1].
        capacity: positions in a row.

    Returns:
        The distinct row patterns (lengths of their samples) and in how many rows each stands, shape [patterns].
    """
    # Rows of the same content are handled as one group (rows, chain of (length, how many)); groups[room] have that room.
    groups: list[list[tuple[int, tuple]]] = [[] for _ in range(capacity + 1)]
    groups_with_room = 0  # bit r is set when groups[r] is not empty
    for length in range(capacity, 0, -1):
        left = int(counts[length])
        while left:
            fitting = groups_with_room >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows, chain = groups[room].pop()
            else:  # no row has room: open as many new ones as these samples fill
                room, rows, chain = capacity, -(-left // (capacity // length)), ()
            each = min(room // length, left)
            used = min(rows, left // each)
            left -= used * each
            for number, content, space in ((used, (length, each, chain), room - each * length), (rows - used, chain, room)):
                if number and content:
                    groups[space].append((number, content))
            for space in (room, room - each * length):
                present = 1 << space
                groups_with_room = groups_with_room | present if groups[space] else groups_with_room & ~present
    patterns, repeats = [], []
    for group in groups:
        for rows, chain in group:
            pattern: list[int] = []
            while chain:
                length, each, chain = chain
                pattern += [length] * each
            patterns.append(np.array(pattern[::-1], dtype=np.int32))
            repeats.append(rows)
    return patterns, np.array(repeats, dtype=np.int64)


def count_concat(lengths: Ints, context_length: int) -> int:
    """Rows that `plan_concat` makes."""
    return -(-int(lengths.sum(dtype=np.int64)) // context_length)


def count_best_fit(lengths: Ints, context_length: int) -> int:
    """Rows that `plan_best_fit` makes."""
    return int(fit_histogram(np.bincount(lengths, minlength=context_length + 1), context_length)[1].sum())


POLICIES: dict[str, Policy] = {"concat": plan_concat, "best_fit": plan_best_fit}
COUNTS: dict[str, Callable[[Ints, int], int]] = {"concat": count_concat, "best_fit": count_best_fit}


def _arrange(count: int, generator: np.random.Generator | None) -> Ints:
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    if generator is not None:
        generator.shuffle(order)
    return order


def _ragged(starts: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """Counts up from each start: the owner of each number, and the number, both of shape [sum of sizes]."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    before = np.cumsum(sizes) - sizes
    return owner, np.arange(len(owner)) + np.repeat(starts - before, sizes)
