"""Readers of records that pass over those of others without parsing them: what streams and resumed streams need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any

Blocks = Iterator[tuple[int, list[Any]]]


class Reader:
    """Takes records, or passes over them, one after another.

    Args:
        records: All of them; they are passed over one by one. Subclasses do better.
    """

    def __init__(self, records: Iterator[Any]) -> None:
        self.records = records

    def take(self, number: int) -> list[Any]:
        """Returns the next records, fewer at the end."""
        return list(islice(self.records, number))

    def skip(self, number: int) -> None:
        """Passes over the next records."""
        next(islice(self.records, number, number), None)

    def blocks(self, size: int, first: int, step: int) -> Blocks:
        """Yields every `step`-th block of records with its number, from the block `first` on.

        Args:
            size: Records in a block; the last one may have fewer.
            first: Number of the first block to read, counted from the first record.
            step: 1 for every block.
        """
        self.skip(first * size)
        for block in count(first, step):
            if not (chunk := self.take(size)):
                return
            yield block, chunk
            self.skip((step - 1) * size)


class FilesReader(Reader):
    """Reads files one after another; those that are passed over whole are not opened.

    Args:
        counts: Records of each file; negative where that is not known.
        open_at: Yields the records of the file of the given index, from the given record on, as calls without arguments
            that parse it.
    """

    def __init__(self, counts: Sequence[int], open_at: Callable[[int, int], Iterator[Callable[[], Any]]]) -> None:
        self.counts, self.open_at = counts, open_at
        self.file = self.at = 0  # the next record
        self.pending: Iterator[Callable[[], Any]] | None = None

    def take(self, number: int) -> list[Any]:
        return [parse() for parse in self._next(number)]

    def skip(self, number: int) -> None:
        while self.file < len(self.counts) and 0 <= self.counts[self.file] <= self.at + number:
            number -= self.counts[self.file] - self.at
            self._go_to(self.file + 1)
        if self.file < len(self.counts) and self.counts[self.file] >= 0 and number:
            self._go_to(self.file, self.at + number)
        else:  # a file that has to be read to be counted
            for _ in self._next(number):
                pass

    def _next(self, number: int) -> Iterator[Callable[[], Any]]:
        while number and self.file < len(self.counts):
            self.pending = self.pending or self.open_at(self.file, self.at)
            for parse in islice(self.pending, number):
                self.at, number = self.at + 1, number - 1
                yield parse
            if number:
                self._go_to(self.file + 1)

    def _go_to(self, file: int, at: int = 0) -> None:
        self.file, self.at, self.pending = file, at, None


class RowsReader(Reader):
    """Reads a table whose rows have numbers.

    Args:
        rows: Its length.
        get: Returns the records from one number up to another.
    """

    def __init__(self, rows: int, get: Callable[[int, int], list[Any]]) -> None:
        self.rows, self.get, self.at = rows, get, 0

    def take(self, number: int) -> list[Any]:
        start = min(self.at, self.rows)
        self.at = min(start + number, self.rows)
        return self.get(start, self.at) if start < self.at else []

    def skip(self, number: int) -> None:
        self.at += number
