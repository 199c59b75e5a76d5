"""Packing: how much of each sample goes into rows, and the plan, from lengths alone, of what stands in which row."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dllm_var.datamodules.table import Table

TooLong = Literal["drop", "truncate", "cut"]
Packing = Literal["concat", "best_fit"]
Ints = NDArray[np.integer]

SIZES = 8_192  # best_fit distinguishes at most this many lengths
VERSIONS = {"concat": 1, "best_fit": 3}  # raised when rows change; checkpoints record it


@dataclass(frozen=True)
class Samples:
    """What goes into rows of each sample: tokens of the table, then terminators. Arrays are of shape [samples]."""

    index: NDArray[np.int64]  # which samples of the table are used
    body: NDArray[np.int32]  # how many tokens of each are taken from the table
    content: NDArray[np.int32]  # tokens with the supervised terminators that are added behind those of the table
    answer_start: NDArray[np.int32]  # position where the last answer in what is taken begins
    dropped: int  # number of samples that were too long and left out
    truncated: int  # number of samples that were too long and shortened


def fit_samples(
    table: Table, index: NDArray[np.int64], context_length: int, on_too_long: TooLong, eos_padding: int
) -> Samples:
    """Makes some samples of a table fit into rows, and pads answers to `eos_padding` tokens with terminators.

    A truncated sample keeps its prompt and the beginning of its answer, followed by a terminator. Where no answer would
    be left, the sample ends with the previous answer of the conversation; a sample with no such answer is dropped.
    """
    length = table.offsets[index + 1] - table.offsets[index]
    body, ends = length.astype(np.int32), np.zeros(len(index), dtype=np.int32)
    answer_start = table.answer_start[index].astype(np.int32)
    too_long = np.flatnonzero(length > context_length) if on_too_long != "cut" else np.empty(0, dtype=np.int64)
    body[too_long] = 0
    if on_too_long == "truncate":
        for sample in too_long.tolist():
            body[sample], ends[sample], answer_start[sample] = _truncate(table, int(index[sample]), context_length)
    if eos_padding:
        room = np.minimum(answer_start + np.int64(eos_padding), context_length) - length
        ends = np.maximum(ends, room).astype(np.int32)
    keep = body > 0
    dropped = len(index) - int(np.count_nonzero(keep))
    content = body + ends
    return Samples(index[keep], body[keep], content[keep], answer_start[keep], dropped, len(too_long) - dropped)


def _truncate(table: Table, sample: int, context_length: int) -> tuple[int, int, int]:
    """Tokens of a sample to keep (0 for none), terminators to add, and where its last answer begins."""
    offset = int(table.offsets[sample])
    supervised = table.supervised[offset : offset + context_length + 1].astype(np.int8)
    edges = np.flatnonzero(np.diff(supervised[:-1], prepend=0, append=0)).tolist()
    for start, stop in zip(edges[-2::-2], edges[::-2], strict=True):
        if stop < context_length or not supervised[-1]:  # the answer fits, with the terminator it has
            return stop, 0, start
        if start < context_length - 1:
            return context_length - 1, 1, start
    return 0, 0, 0


class Spans(NamedTuple):
    """Consecutive positions of samples, in the order in which they stand in a batch of rows; each of shape [spans]."""

    sample: Ints  # which
    start: Ints  # first position within the sample
    length: Ints  # number of positions
    row: Ints  # index of the row within the batch, ascending


@dataclass(frozen=True)
class Plan:
    """Where each sample stands in the rows of a section; positions are counted on from row to row."""

    order: Ints  # samples in the order in which they stand, shape [samples]
    begin: Ints  # position where each of them begins, shape [samples]
    end: Ints  # position after its last, in a later row when the sample is cut, shape [samples]
    context_length: int  # positions in a row

    @property
    def rows(self) -> int:
        return -(-int(self.end[-1]) // self.context_length) if len(self.end) else 0

    def spans(self, rows: Ints) -> Spans:
        """Finds what the given rows consist of, shape [batch]."""
        left = np.asarray(rows, dtype=np.int64) * self.context_length
        right = left + self.context_length
        first = np.searchsorted(self.end, left, side="right")
        number = np.searchsorted(self.begin, right, side="left") - first
        row = np.repeat(np.arange(len(number)), number)
        place = np.arange(len(row)) + np.repeat(first - (np.cumsum(number) - number), number)
        begin = self.begin[place]
        start = np.maximum(begin, left[row])
        return Spans(self.order[place], start - begin, np.minimum(self.end[place], right[row]) - start, row)


def make_plan(packing: Packing, lengths: Ints, context_length: int, generator: np.random.Generator) -> Plan:
    """Plans the rows of an epoch for samples of these lengths, shape [samples].

    ``concat`` strings all samples together and cuts every `context_length` positions, as the paper does; ``best_fit``
    cuts no sample, and none may be longer than a row. The generator shuffles the samples, for ``best_fit`` also rows
    and the order within a row.
    """
    order = generator.permutation(np.arange(len(lengths), dtype=np.int32))
    if packing == "concat":
        end = np.cumsum(lengths[order], dtype=np.int64)
        return Plan(order, end - lengths[order], end, context_length)
    sizes, capacity = _coarse(lengths, context_length)
    found = best_fit(np.bincount(sizes, minlength=capacity + 1), capacity)
    per_row = np.repeat([len(pattern) for pattern, _ in found], [rows for _, rows in found]).astype(np.int64)
    size = np.concatenate([np.tile(np.array(pattern, np.uint16), rows) for pattern, rows in found] or [sizes])
    row = np.repeat(generator.permutation(np.arange(len(per_row), dtype=np.int32)).astype(np.int64), per_row)
    places = np.argsort(row << 32 | generator.permutation(len(row)))  # row after row, each in random order
    # Samples of one size are interchangeable: they are dealt to the places of that size at random.
    samples, order = order, np.empty_like(order)
    order[np.argsort(size[places], kind="stable")] = samples[np.argsort(sizes[samples], kind="stable")]
    begin = np.cumsum(lengths[order], dtype=np.int64) - lengths[order]  # as if no row had padding
    in_row = np.bincount(row)
    first = np.cumsum(in_row) - in_row
    begin += (np.arange(len(in_row)) * context_length - begin[first]).repeat(in_row)
    return Plan(order, begin, begin + lengths[order], context_length)


def count_rows(packing: Packing, lengths: Ints, context_length: int) -> int:
    """The number of rows that `make_plan` makes, in a fraction of the time."""
    if packing == "concat":
        return -(-int(lengths.sum(dtype=np.int64)) // context_length)
    sizes, capacity = _coarse(lengths, context_length)
    return sum(rows for _, rows in best_fit(np.bincount(sizes, minlength=capacity + 1), capacity))


def best_fit(counts: Ints, capacity: int) -> list[tuple[list[int], int]]:
    """Best-fit-decreasing on a histogram of sizes (arXiv 2107.02027): its cost hardly depends on the number of samples.

    From the largest size down, each sample goes into the row with the least room that is enough. `counts` of samples by
    size, shape [capacity + 1], become pairs of the sizes that share a row and the number of such rows.
    """
    patterns: list[list[tuple[list[int], int]]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    patterns[capacity] = [([], int(counts.sum()))]  # empty rows, more than are needed
    with_room = 1 << capacity  # bit r is set when patterns[r] has any
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            enough = with_room >> size
            room = size + (enough & -enough).bit_length() - 1
            pattern, rows = patterns[room].pop()
            copies = min(room // size, left)
            used = min(rows, left // copies)
            if rows > used:
                patterns[room].append((pattern, rows - used))
            elif not patterns[room]:
                with_room &= ~(1 << room)
            patterns[room - size * copies].append((pattern + [size] * copies, used))
            with_room |= 1 << (room - size * copies)
            left -= used * copies
    return [(pattern, rows) for group in patterns for pattern, rows in group if pattern]


def _coarse(lengths: Ints, context_length: int) -> tuple[NDArray[np.uint16], int]:
    """Returns lengths rounded up to multiples of a unit, as such multiples, and how many units a row holds."""
    unit = -(-context_length // SIZES)
    capacity = context_length // unit
    # A sample longer than all whole units of a row has the row for itself.
    return np.minimum(-(-lengths // unit), capacity).astype(np.uint16), capacity
