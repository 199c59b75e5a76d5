"""Pack plans: which piece of which sample stands where in which row, from the samples' lengths alone.

A plan covers one epoch. It is made of a few flat arrays, so that any row is found without walking the ones before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]

MIXED = 0.48  # share of the short samples that best_fit deals out at random; more, and fewer are left to fill gaps
SIZES = 8_192  # best_fit tells no more sizes apart than this, however long the context


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
    """Puts each sample into the fullest row that still has room, longest first; no sample is ever cut.

    Samples of equal length are interchangeable, so rows are laid out on the histogram of lengths and the samples dealt
    to the places afterwards: the cost hardly depends on the number of samples. (Histogram packing, arXiv 2107.02027.)

    Args:
        lengths: positions each sample takes, each from 1 to `context_length`, shape [samples].
        context_length: positions in a row.
        generator: shuffles the rows, the samples of equal length and the places within a row.
    """
    sizes, capacity = _coarse(lengths, context_length)
    size, row = lay_out(np.bincount(sizes, minlength=capacity + 1), capacity)
    row = _shuffled(int(row.max(initial=-1)) + 1, generator)[row]
    places = np.argsort(row + generator.random(len(row)))  # rows one after the other, each in a random order
    size, row = size[places], row[places]
    samples = _shuffled(len(lengths), generator)
    order = np.empty_like(samples)
    order[np.argsort(size, kind="stable")] = samples[np.argsort(sizes[samples], kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return WholePlan(order, np.cumsum(lengths[order], dtype=np.int64), first)


def count_best_fit(lengths: Ints, context_length: int) -> int:
    """Number of rows that `plan_best_fit` makes."""
    sizes, capacity = _coarse(lengths, context_length)
    return int(lay_out(np.bincount(sizes, minlength=capacity + 1), capacity)[1].max(initial=-1)) + 1


def lay_out(counts: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Decides which sizes share a row, the same way for the same histogram.

    Best-fit alone fills rows with samples of one length, which would tell a model that attends across them where each
    ends. So rows are first filled to about a half with short samples at random, and the rest is fitted in.

    Args:
        counts: number of samples of each size, shape [capacity + 1].
        capacity: what a row holds.

    Returns:
        Size and row of every place, each of shape [samples].
    """
    short = np.repeat(np.arange(capacity // 4 + 1, dtype=np.uint16), counts[: capacity // 4 + 1])
    np.random.default_rng(0).shuffle(short)
    ends = np.cumsum(short, dtype=np.int64)
    mixed = int(np.searchsorted(ends, MIXED * ends[-1])) if len(ends) else 0
    mixed_size = short[:mixed]
    mixed_row = (ends[:mixed] - mixed_size) // (capacity // 2 or 1)
    rooms = capacity - np.bincount(mixed_row, mixed_size).astype(np.int64)
    rest = counts - np.bincount(mixed_size, minlength=len(counts))
    fitted = fit_histogram(rest, capacity, np.bincount(rooms, minlength=len(counts)))

    # Rows with the same room are interchangeable: those begun above are taken by room, new ones are numbered after.
    rows_by_room = np.argsort(rooms, kind="stable")
    next_of_room = np.searchsorted(rooms[rows_by_room], np.arange(capacity + 1))
    next_new = len(rooms)
    sizes, rows = [mixed_size], [mixed_row]
    for pattern, room, repeats in fitted:
        if room is None:
            row = np.arange(next_new, next_new + repeats)
            next_new += repeats
        else:
            row = rows_by_room[next_of_room[room] : next_of_room[room] + repeats]
            next_of_room[room] += repeats
        sizes.append(np.tile(np.array(pattern, dtype=np.uint16), repeats))
        rows.append(np.repeat(row, len(pattern)))
    return np.concatenate(sizes), np.concatenate(rows)


def fit_histogram(counts: Ints, capacity: int, rooms: Ints) -> Iterator[tuple[list[int], int | None, int]]:
    """Best-fit-decreasing over a histogram of lengths.

    Args:
        counts: number of samples of each length, shape [capacity + 1].
        capacity: positions in a new row.
        rooms: number of rows already begun with each room left, shape [capacity + 1].

    Yields:
        Lengths that go into a row, the room it had or None if it is new, and how many such rows.
    """
    # Rows of equal content are one group: (how many, room at first, chain of (length, chain)); groups[r] have room r.
    groups: list[list[tuple[int, int | None, tuple]]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r tells whether groups[r] has any
    for room in np.flatnonzero(rooms).tolist():
        groups[room].append((int(rooms[room]), room, ()))
        occupied |= 1 << room
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = occupied >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows, begun, chain = groups[room].pop()
            else:  # no row has room: open as many as these samples fill
                room, rows, begun, chain = capacity, -(-left // (capacity // length)), None, ()
            used = min(rows, left)
            left -= used
            groups[room - length].append((used, begun, (length, chain)))
            if rows > used:
                groups[room].append((rows - used, begun, chain))
            occupied |= 1 << (room - length)
            occupied = occupied | 1 << room if groups[room] else occupied & ~(1 << room)
    for group in groups:
        for rows, begun, chain in group:
            pattern = []
            while chain:
                length, chain = chain
                pattern.append(length)
            if pattern:
                yield pattern, begun, rows


PLANS: dict[str, Callable[[Ints, int, np.random.Generator], Plan]] = {
    "concat": plan_concat,
    "best_fit": plan_best_fit,
}
COUNTS: dict[str, Callable[[Ints, int], int]] = {"concat": count_concat, "best_fit": count_best_fit}


def _shuffled(count: int, generator: np.random.Generator) -> Ints:
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    generator.shuffle(order)
    return order


def _coarse(lengths: Ints, context_length: int) -> tuple[NDArray[np.uint16], int]:
    """Lengths rounded up to at most `SIZES` distinct sizes, and how many of their unit a row holds."""
    unit = -(-context_length // SIZES)
    capacity = context_length // unit
    # What is longer than all whole units of a row has the row for itself anyway.
    return np.minimum(-(-lengths // unit), capacity).astype(np.uint16), capacity


def _ragged(starts: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """Counts up from each start: the owner of each number, and the number, both of shape [sum of sizes]."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    before = np.cumsum(sizes) - sizes
    return owner, np.arange(len(owner)) + np.repeat(starts - before, sizes)
