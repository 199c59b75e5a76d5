"""Fits samples into rows: what happens to those that are too long, and to answers that are padded with terminators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from dllm_var.datamodules.rows import Samples
from dllm_var.datamodules.table import Table
from dllm_var.errors import UserError

TooLong = Literal["drop", "truncate", "cut", "error"]


def fit_samples(
    table: Table, context_length: int, on_too_long: TooLong, eos_padding: int, place: Callable[[int], str]
) -> tuple[Samples, dict[str, int]]:
    """Decides how much of each sample goes into rows.

    A truncated sample keeps its prompt and the beginning of its answer, and gets its terminator right after; where no
    answer would be left, it falls back to the previous answer of the conversation, or is dropped.

    Args:
        table: Tokenized samples.
        context_length: Tokens in a row.
        on_too_long: What to do with samples that have more tokens than that.
        eos_padding: Tokens that answers shorter than that are padded to with terminators.
        place: Tells where the record with a given number stands, for an error.

    Returns:
        The samples, and how many were ``dropped`` and ``truncated``.

    Raises:
        UserError: When a sample is too long and that is an error.
    """
    length = np.diff(table.offsets)
    body, ends = length.astype(np.int32), np.zeros(len(table), dtype=np.int32)
    answer_start = table.answer_start.astype(np.int32)
    too_long = np.flatnonzero(length > context_length) if on_too_long != "cut" else np.empty(0, dtype=np.int64)
    keep = np.ones(len(table), dtype=np.bool_)
    if on_too_long == "error" and len(too_long):
        where = place(int(table.record[too_long[0]]))
        raise UserError(
            f"{where} has {length[too_long[0]]:,} tokens, more than data.context_length={context_length}; raise that, "
            "or set data.on_too_long to drop or truncate"
        )
    if on_too_long == "truncate":
        for sample in too_long.tolist():
            body[sample], ends[sample], answer_start[sample] = _truncate(table, sample, context_length)
        keep[too_long] = body[too_long] > 0
    else:
        keep[too_long] = False
    if eos_padding:
        fitting = length <= context_length
        room = np.minimum(table.answer_start + eos_padding, context_length) - length
        ends[fitting] = np.maximum(room, 0)[fitting]
    index = np.flatnonzero(keep)
    counts = {"dropped": len(table) - len(index), "truncated": int(np.count_nonzero(keep[too_long]))}
    return Samples(table, index, body[index], ends[index], answer_start[index]), counts


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
