"""Best-fit-decreasing on a histogram: for what has to go into rows that are already begun."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]


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
