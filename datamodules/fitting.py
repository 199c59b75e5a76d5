"""Fits samples into rows: what happens to those that are too long, and to answers that are padded with terminators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from dllm_var.datamodules.rows import Samples
from dllm_var.datamodules.table import Table
from dllm_var.errors import UserError

TooLong = Literal["drop", "truncate", "cut", "error"]

LONGEST = 2**16  # rows up to this length share a table, in which longer samples may lack their end
SECTION = 2**21  # samples packed together; decides what planning takes, about 300 MB, however large the table
STRETCH = 1_024  # neighbouring samples that stay in one section, so that memory-mapped files are read in pages


@dataclass(frozen=True)
class Sections(Sequence[Samples]):
    """The samples of a table in sections of bounded size, each fitted into rows when it is asked for.

    Stretches of the table are dealt to the sections in turn, so that each of them is a cross-section of the data
    whatever its order. A table of at most `section` samples is one section.

    Args:
        table: Tokenized samples.
        context_length: As for `fit_samples`, and so the next two.
        on_too_long: What to do with samples that have more tokens than that.
        eos_padding: Tokens that answers shorter than that are padded to with terminators.
        section: Samples in a section, at most.
        stretch: Neighbouring samples that stay together.
    """

    table: Table
    context_length: int
    on_too_long: TooLong
    eos_padding: int
    section: int = SECTION
    stretch: int = STRETCH

    def __len__(self) -> int:
        return max(-(-len(self.table) // self.section), 1)

    @overload
    def __getitem__(self, section: int) -> Samples: ...
    @overload
    def __getitem__(self, section: slice) -> Sequence[Samples]: ...
    def __getitem__(self, section: int | slice) -> Samples | Sequence[Samples]:
        if isinstance(section, slice):
            return [self[number] for number in range(len(self))[section]]
        if not 0 <= section < len(self):
            raise IndexError(section)
        return self._fit(section, None)[0]

    def totals(self, place: Callable[[int], str]) -> dict[str, int]:
        """What becomes of all samples together, one section in memory at a time.

        Args:
            place: Tells where the record with a given number stands, for an error.

        Returns:
            How many ``samples`` are kept, their ``tokens``, and how many samples were ``dropped`` and ``truncated``.

        Raises:
            UserError: When a sample is too long and that is an error.
        """
        totals = {"samples": 0, "tokens": 0, "dropped": 0, "truncated": 0}
        for section in range(len(self)):
            samples, counts = self._fit(section, place)
            counts |= {"samples": len(samples.index), "tokens": int(samples.content.sum(dtype=np.int64))}
            totals = {name: total + counts[name] for name, total in totals.items()}
        return totals

    def _fit(self, section: int, place: Callable[[int], str] | None) -> tuple[Samples, dict[str, int]]:
        chosen: NDArray[np.int64] | None = None
        if len(self) > 1:
            starts = np.arange(section, -(-len(self.table) // self.stretch), len(self)) * self.stretch
            chosen = (starts[:, None] + np.arange(self.stretch)).reshape(-1)
            chosen = chosen[chosen < len(self.table)]
        return fit_samples(self.table, self.context_length, self.on_too_long, self.eos_padding, place, chosen)


def fit_samples(
    table: Table,
    context_length: int,
    on_too_long: TooLong,
    eos_padding: int,
    place: Callable[[int], str] | None = None,
    chosen: NDArray[np.int64] | None = None,
) -> tuple[Samples, dict[str, int]]:
    """Decides how much of each sample goes into rows.

    A truncated sample keeps its prompt and the beginning of its answer, and gets its terminator right after; where no
    answer would be left, it falls back to the previous answer of the conversation, or is dropped.

    Args:
        table: Tokenized samples.
        context_length: Tokens in a row.
        on_too_long: What to do with samples that have more tokens than that.
        eos_padding: Tokens that answers shorter than that are padded to with terminators.
        place: Tells where the record with a given number stands, for an error; without it too long ones are dropped.
        chosen: Samples to fit, shape [chosen]; all when null.

    Returns:
        The samples, and how many were ``dropped`` and ``truncated``.

    Raises:
        UserError: When a sample is too long and that is an error.
    """
    index = np.arange(len(table)) if chosen is None else chosen
    length = np.diff(table.offsets) if chosen is None else table.offsets[chosen + 1] - table.offsets[chosen]
    body, ends = length.astype(np.int32), np.zeros(len(index), dtype=np.int32)
    answer_start = table.answer_start[index].astype(np.int32)
    too_long = np.flatnonzero(length > context_length) if on_too_long != "cut" else np.empty(0, dtype=np.int64)
    keep = np.ones(len(index), dtype=np.bool_)
    if on_too_long == "error" and place is not None and len(too_long):
        where, tokens = place(int(table.record[index[too_long[0]]])), length[too_long[0]]
        size = f"over {LONGEST:,}" if tokens > LONGEST else f"{tokens:,}"
        raise UserError(
            f"{where} has {size} tokens, more than data.context_length={context_length}; raise that, or set "
            "data.on_too_long to drop or truncate"
        )
    if on_too_long == "truncate":
        for sample in too_long.tolist():
            body[sample], ends[sample], answer_start[sample] = _truncate(table, int(index[sample]), context_length)
        keep[too_long] = body[too_long] > 0
    else:
        keep[too_long] = False
    if eos_padding:
        fitting = length <= context_length
        room = np.minimum(answer_start + np.int64(eos_padding), context_length) - length
        ends[fitting] = np.maximum(room, 0)[fitting]
    counts = {
        "dropped": int(np.count_nonzero(~keep)),
        "truncated": int(np.count_nonzero(keep[too_long])) if on_too_long == "truncate" else 0,
    }
    return Samples(table, index[keep], body[keep], ends[keep], answer_start[keep]), counts


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
