"""Fits samples into rows: what happens to those that are too long, and to answers that are padded with terminators."""

from __future__ import annotations

from itertools import islice
from typing import Literal

import numpy as np

from dllm_var.datamodules.rows import Samples
from dllm_var.datamodules.sources import Source
from dllm_var.datamodules.table import Table
from dllm_var.errors import UserError

TooLong = Literal["drop", "truncate", "cut", "error"]


def fit_samples(
    table: Table, context_length: int, on_too_long: TooLong, eos_padding: int, source: Source, split: str
) -> tuple[Samples, dict[str, int]]:
    """Decides how much of each sample goes into rows.

    A truncated sample keeps its prompt and the beginning of its answer, and gets its terminator right after; where no
    answer would be left, it falls back to the previous answer of the conversation, or is dropped.

    Args:
        table: Tokenized samples.
        context_length: Tokens in a row.
        on_too_long: What to do with samples that have more tokens than that.
        eos_padding: Tokens that answers shorter than that are padded to with terminators.
        source: Tells where a record stands, for an error.
        split: The split the samples are of.

    Returns:
        The samples, and how many were ``dropped`` and ``truncated``.

    Raises:
        UserError: When a sample is too long and that is an error, or no sample is left.
    """
    if not len(table):
        raise UserError(f"the {split} split of {type(source).__name__} has no records that can be used")
    length = np.diff(table.offsets)
    body, ends = length.astype(np.int32), np.zeros(len(table), dtype=np.int32)
    too_long = np.flatnonzero(length > context_length) if on_too_long != "cut" else np.empty(0, dtype=np.int64)
    keep = np.ones(len(table), dtype=np.bool_)
    if on_too_long == "error" and len(too_long):
        where, _ = next(islice(source.located_records(split), int(table.record[too_long[0]]), None))
        raise UserError(
            f"{where} has {length[too_long[0]]:,} tokens, more than data.context_length={context_length}; raise "
            "that, or set data.on_too_long to drop or truncate"
        )
    if on_too_long == "truncate":
        body[too_long] = [_cut_at(table, sample, context_length) for sample in too_long.tolist()]
        ends[too_long] = body[too_long] == context_length - 1
        keep[too_long] = body[too_long] > 0
    else:
        keep[too_long] = False
    if eos_padding:
        fitting = length <= context_length
        room = np.minimum(table.answer_start + eos_padding, context_length) - length
        ends[fitting] = np.maximum(room, 0)[fitting]
    index = np.flatnonzero(keep)
    if not len(index):
        raise UserError(
            f"all {len(table):,} samples of the {split} split are longer than data.context_length={context_length}; "
            f"raise it (the shortest has {length.min():,} tokens), or set data.on_too_long=truncate"
        )
    counts = {"dropped": len(table) - len(index), "truncated": int(np.count_nonzero(keep[too_long]))}
    return Samples(table, index, body[index], ends[index]), counts


def _cut_at(table: Table, sample: int, context_length: int) -> int:
    """How many tokens of a sample to keep: 0 when no answer would be among them."""
    start = int(table.offsets[sample])
    if table.answer_start[sample] < context_length - 1:
        return context_length - 1  # leaves room for the terminator
    supervised = np.flatnonzero(table.supervised[start : start + context_length])
    # An earlier answer that ends in time ends with its own terminator; one that does not is cut like the last one.
    if not len(supervised):
        return 0
    last = int(supervised[-1])
    return last + 1 if last < context_length - 1 else context_length - 1
