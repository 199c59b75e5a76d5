"""Layouts: which sizes share a row, from how many samples there are of each size.

Samples of one size are interchangeable, so that rows are decided on the histogram of sizes and the cost hardly depends
on the number of samples (histogram packing, arXiv 2107.02027). What each row holds is drawn at random among the
contents that fill it. So rows are full, and mixed: a model that attends across a row cannot tell from the lengths of
some samples where others end, beyond what their sum says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from dllm_var.datamodules.best_fit import Ints, fit_histogram

Floats = NDArray[np.float64]

GOOD = 0.99  # where rows are less full than this, another layout is tried
ONE_SIZE = 0.75  # and where more of the rows than this hold samples of one size, taken
MIXED = 0.48  # share of the short samples that `deal_half` deals out; more, and fewer are left to fill gaps
ROUNDS, TOLERANCE = 30, 0.005  # when weights are good enough: share of the samples that may be left to best-fit


@dataclass(frozen=True)
class Begun:
    """Rows that are not finished yet.

    Args:
        rest: How many samples of each size are not in rows yet, shape [capacity + 1].
        rooms: Number of rows that have each room left, shape [capacity + 1].
        places: Makes the size and row of every place taken, each of shape [places].
        of_one_size: Share of the rows that hold samples of one size only, as far as it is known.
    """

    rest: Ints
    rooms: Ints
    places: Callable[[], tuple[Ints, Ints]]
    of_one_size: float = 0.0


Fitted = list[tuple[list[int], int | None, int]]  # sizes, the room of the row they go into or None if new, how often


def lay_out(counts: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Decides which sizes share a row, the same way for the same histogram.

    Args:
        counts: Number of samples of each size, shape [capacity + 1].
        capacity: What a row holds.

    Returns:
        Size and row of every place, each of shape [samples].
    """
    begun, fitted, _ = _decide(counts.astype(np.int64).tobytes(), capacity)
    size, row = begun.places()
    # Rows with the same room are interchangeable: those begun are taken by room, new ones are numbered after.
    next_new = int(begun.rooms.sum())
    rooms = capacity - np.bincount(row, size, minlength=next_new).astype(np.int64)
    rows_by_room = np.argsort(rooms, kind="stable")
    next_of_room = np.cumsum(begun.rooms) - begun.rooms
    sizes, rows = [size], [row]
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


def count_rows(counts: Ints, capacity: int) -> int:
    """Number of rows that `lay_out` makes of the same, in a fraction of the time.

    Args:
        counts: Number of samples of each size, shape [capacity + 1].
        capacity: What a row holds.
    """
    return _decide(counts.astype(np.int64).tobytes(), capacity)[2]


@lru_cache(maxsize=2)  # rows are counted first, and laid out when they are asked for
def _decide(histogram: bytes, capacity: int) -> tuple[Begun, Fitted, int]:
    """Rows that are begun, what is fitted in where, and the number of rows in the end."""
    counts = np.frombuffer(histogram, np.int64)
    best: tuple[Begun, Fitted, int] | None = None
    # The second way is for few samples, sizes that rarely add up to a row, and sizes that only do so by themselves.
    for begin in (draw_rows, deal_half):
        begun = begin(counts, capacity)
        fitted = list(fit_histogram(begun.rest, capacity, begun.rooms))
        rows = int(begun.rooms.sum()) + sum(repeats for _, room, repeats in fitted if room is None)
        if best is None or rows < best[2] or best[0].of_one_size > ONE_SIZE:
            best = begun, fitted, rows
        full = counts @ np.arange(capacity + 1) >= GOOD * capacity * best[2]
        if full and best[0].of_one_size <= ONE_SIZE:
            break
    assert best is not None
    return best


def draw_rows(counts: Ints, capacity: int) -> Begun:
    """Draws rows at random among all that are full, or as full as they can be, so that hardly a sample is left.

    A row is filled from a room of `capacity` down, in steps: at room r a sample of size a follows with probability
    w[a] F[r - a] / F[r], where F[r] is the weight of all ways to go on from r (a renewal equation) and stopping early
    costs a factor of 16 for each position left. With weights w that use the sizes in proportion to their counts, this
    is the distribution of largest entropy among those whose rows are full. Rows at the same room are taken together.

    Args:
        counts: Number of samples of each size, shape [capacity + 1].
        capacity: What a row holds.
    """
    sizes = np.flatnonzero(counts)
    if not len(sizes):
        return Begun(counts, np.zeros_like(counts), partial(_assemble, [], 0, capacity))
    slack = np.maximum(np.multiply.accumulate(np.full(capacity + 1, 1 / 16)), 1e-200)  # any can be, and be drawn
    weights, ways, arriving, rows = _balance(sizes, counts[sizes].astype(np.float64), slack)
    offsets = np.random.default_rng(0).random(capacity + 1)
    left = counts[sizes]
    expected = left.astype(np.float64)  # what would be left at this point if all went by the probabilities
    rooms = np.zeros(capacity + 1, np.int64)  # rows that stand at each room, then those that stop there
    rooms[capacity] = rows
    leaving: list[tuple[int, Ints, Ints]] = []  # a room, sizes that are put into rows there, and how often each
    for room in range(capacity, 0, -1):
        fitting = int(np.searchsorted(sizes, room, side="right"))
        if not fitting:
            break
        fits = sizes[:fitting]
        after = room - fits
        odds = ways[after]
        odds *= weights[:fitting]
        if rooms[room]:
            wanted = left[:fitting] / np.maximum(expected[:fitting], 1e-9)
            wanted = np.minimum(wanted, 4.0, out=wanted)
            wanted *= odds
            until = np.cumsum(wanted)
            if until[-1] > 0:
                until *= rooms[room] / (until[-1] + slack[room])
                until += offsets[room]
                taken = np.minimum(until.astype(np.int64), rooms[room])
                taken[1:] -= taken[:-1].copy()
                taken = np.minimum(taken, left[:fitting], out=taken)
                left[:fitting] -= taken
                some = np.flatnonzero(taken)
                taken = taken[some]
                rooms[after[some]] += taken
                rooms[room] -= taken.sum()
                leaving.append((room, fits[some], taken))
        odds *= rows * arriving[room] / ways[capacity]
        expected[:fitting] -= odds
    rest = np.zeros_like(counts)
    rest[sizes] = left
    times = capacity // sizes
    odds_alone = [math.prod([weight] * count) for weight, count in zip(weights.tolist(), times.tolist(), strict=True)]
    alone = _sum(np.array(odds_alone) * slack[capacity - times * sizes] * (times > 1)) / ways[capacity]
    return Begun(rest, rooms, partial(_assemble, leaving, rows, capacity), alone)


def _balance(sizes: Ints, counts: Floats, slack: Floats) -> tuple[Floats, Floats, Floats, int]:
    """Weights of the sizes with which drawn rows use them in proportion to their counts, by iterative scaling.

    All ranks must come to the same rows, whatever their processors: there is no sum here whose order a library may
    choose, and nothing but the operations that IEEE 754 rounds correctly.

    Args:
        sizes: The sizes there are, shape [sizes].
        counts: Number of samples of each, shape [sizes].
        slack: Weight of stopping with each room left, shape [capacity + 1].

    Returns:
        Weights, shape [sizes]; weight of the ways to go on from each room, and of those to arrive there, shape
        [capacity + 1]; and how many rows to draw.
    """
    capacity, total = len(slack) - 1, _sum(counts)
    weights, steps, best_error = counts / total, 0, np.inf
    for _ in range(ROUNDS):
        weights = weights * _tilt(weights, sizes, capacity)
        dense = np.zeros(capacity + 1)
        dense[sizes] = weights
        sums = np.stack([np.zeros(capacity + 1), slack])  # by what is taken, by the room left: the same recursion
        sums[0, 0] = 1.0
        for place in range(capacity):
            sums[:, place + 1 :] += dense[1 : capacity + 1 - place] * sums[:, place : place + 1]
        taken, ways = sums
        both = np.zeros(capacity + 1)
        for place in np.flatnonzero(taken).tolist():
            both[place:] += taken[place] * ways[: capacity + 1 - place]
        used = weights * both[capacity - sizes] / ways[capacity]  # of each size in a row, on average
        rows = _sum(counts * sizes) / _sum(used * sizes)
        error = _sum(np.abs(rows * used - counts)) / total
        if error < best_error:
            change = np.clip(counts / np.maximum(rows * used, 1e-300), 1 / 16, 16)
            best_error, best, steps = error, (weights, ways, taken[::-1], int(rows)), max(steps - 1, 0)
        else:
            steps += 1
        if best_error < max(TOLERANCE, len(sizes) / total / 2):  # whole samples come no closer
            break
        step = change
        for _ in range(steps):
            step = np.sqrt(step)
        weights = best[0] * step
    return best


def _tilt(weights: Floats, sizes: Ints, capacity: int) -> Floats:
    """The powers z ** size that make the weights add up to 1: full rows keep their odds, and slack its cost."""
    low, high = 0.0, 2.0 * max(1 / _sum(weights), 1.0)
    for _ in range(24):
        middle = (low + high) / 2
        with np.errstate(over="ignore"):
            powers = np.multiply.accumulate(np.full(capacity, middle))[sizes - 1]
        low, high = (low, middle) if _sum(weights * powers) > 1 else (middle, high)
    return powers


def _sum(values: Floats) -> float:
    """Adds from the first to the last."""
    return float(np.add.accumulate(values)[-1])


def _assemble(leaving: list[tuple[int, Ints, Ints]], rows: int, capacity: int) -> tuple[Ints, Ints]:
    """Size and row of every place, from what is put into rows at each room."""
    if not leaving:
        return np.empty(0, np.uint16), np.empty(0, np.int64)
    sizes, times = (np.concatenate(column) for column in list(zip(*leaving, strict=True))[1:])
    room_of = np.repeat(np.array([room for room, _, _ in leaving], np.uint16), [len(some) for _, some, _ in leaving])
    room_of, size_of = np.repeat(room_of, times), np.repeat(sizes.astype(np.uint16), times)
    shuffled = np.random.default_rng(1).permutation(len(size_of))
    size_of = size_of[shuffled][np.argsort(room_of[shuffled], kind="stable")]  # by room, within it at random
    per_room = np.bincount(room_of, minlength=capacity + 1)
    end = np.cumsum(per_room)
    next_place = end - per_room

    rooms = np.full(rows, capacity, np.uint16)
    active = np.arange(rows)
    taken: list[tuple[Ints, Ints]] = []
    while len(active):  # one more sample for each of them
        active = active[np.argsort(rooms[active], kind="stable")]
        room = rooms[active]
        here = np.bincount(room, minlength=capacity + 1)
        place = (next_place - (np.cumsum(here) - here))[room] + np.arange(len(room))
        goes_on = place < end[room]  # the others stop, with room left
        next_place += here
        active = active[goes_on]
        size = size_of[place[goes_on]]
        rooms[active] -= size
        taken.append((size, active))
    return np.concatenate([size for size, _ in taken]), np.concatenate([row for _, row in taken])


def deal_half(counts: Ints, capacity: int) -> Begun:
    """Fills rows to about a half with short samples at random, so that what is fitted in then is never all there is.

    Args:
        counts: Number of samples of each size, shape [capacity + 1].
        capacity: What a row holds.
    """
    short = np.repeat(np.arange(capacity // 4 + 1, dtype=np.uint16), counts[: capacity // 4 + 1])
    np.random.default_rng(0).shuffle(short)
    ends = np.cumsum(short, dtype=np.int64)
    size = short[: int(np.searchsorted(ends, MIXED * ends[-1])) if len(ends) else 0]
    row = (ends[: len(size)] - size) // (capacity // 2 or 1)
    rooms = capacity - np.bincount(row, size).astype(np.int64)
    rest = counts - np.bincount(size, minlength=len(counts))
    return Begun(rest, np.bincount(rooms, minlength=capacity + 1), lambda: (size, row))
