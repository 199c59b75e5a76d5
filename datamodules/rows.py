"""Rows of packed samples by number."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dllm_var.datamodules.packing import COUNTS, PLANS, Plan
from dllm_var.datamodules.table import Table
from dllm_var.text.tokenizer import SpecialTokens

PLANS_KEPT = 2  # a batch may reach from one section into the next


@dataclass(frozen=True)
class Samples:
    """What goes into rows of each sample: tokens of the table, then terminators.

    Args:
        table: Tokenized samples.
        index: Which samples of the table are used, shape [samples].
        body: How many tokens of each are taken from the table, shape [samples].
        ends: How many supervised terminators are added after them, shape [samples].
        answer_start: Position where the last answer in what is taken begins, shape [samples].
    """

    table: Table
    index: NDArray[np.int64]
    body: NDArray[np.int32]
    ends: NDArray[np.int32]
    answer_start: NDArray[np.int32]

    @cached_property
    def content(self) -> NDArray[np.int32]:
        """Tokens of each sample, shape [samples]."""
        return self.body + self.ends


@dataclass(frozen=True)
class Packed:
    """How one section of the samples is packed in one epoch.

    Args:
        samples: What is packed.
        plan: Which piece of which sample stands where.
        overhang: Unsupervised mask tokens after each sample, or minus the tokens cut off its end, shape [samples].
    """

    samples: Samples
    plan: Plan
    overhang: NDArray[np.int32]


class PackedRows(Dataset):
    """Rows of `context_length` tokens, each a pure function of the seed and its number.

    Rows are numbered on and on over the epochs, and within an epoch over the sections of the samples. For each epoch
    the samples and rows of a section are shuffled and the overhang drawn anew, keyed by seed, epoch and section; the
    number of rows follows from that. Memory depends on the size of a section, not on how many there are.

    Args:
        sections: What is packed, in one or more sections.
        special: Ids of mask, terminators and padding.
        context_length: Tokens in a row.
        packing: Name of the policy, ``concat`` or ``best_fit``.
        overhang: Largest number of unsupervised mask tokens after a sample.
        canvas: Ends samples where the canvas of a sampler with this block length would end; 0 for off.
        cut: Lets the canvas also end with an earlier block than the answer's last.
        seed: With the epoch, decides order and overhang; may be several numbers.
    """

    def __init__(
        self,
        sections: Sequence[Samples],
        special: SpecialTokens,
        context_length: int,
        packing: str,
        overhang: int,
        seed: int | tuple[int, ...],
        canvas: int = 0,
        cut: bool = True,
    ) -> None:
        self.sections, self._sections = sections, len(sections)
        self.special = special
        self.context_length = context_length
        self.packing = packing
        self.overhang = overhang
        self.canvas = canvas
        self.cut = cut
        self.varies = bool(overhang or (canvas and cut))  # whether epochs differ in their lengths
        self.seed = seed if isinstance(seed, tuple) else (seed,)
        self._starts = [0]  # number of the first row of each section, epoch after epoch, as far as they are counted
        self._filled = [0]  # positions that are not padding before each of these rows
        self._kept: OrderedDict[tuple[int, int], Packed] = OrderedDict()

    def __len__(self) -> int:
        """Rows of the first epoch; those of others differ by a few, because their overhang is drawn anew."""
        return self.first_row(1)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Builds a whole batch at once.

        Args:
            rows: Numbers of the rows, over all epochs; -1 stands for a row of nothing but padding.

        Returns:
            ``input_ids``, ``supervised``, ``segment_ids``, ``position_ids`` of shape [batch, context], ``row`` [batch].
        """
        shape = (len(rows), self.context_length)
        batch = {
            "input_ids": np.full(shape, self.special.pad_id, dtype=np.int64),
            "supervised": np.zeros(shape, dtype=np.bool_),
            "segment_ids": np.full(shape, -1, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
            "row": np.array(rows, dtype=np.int64),
        }
        by_section: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, row in enumerate(rows):
            if row >= 0:
                epoch, section, number = self.locate(row)
                by_section.setdefault((epoch, section), []).append((place, number))
        for (epoch, section), pairs in by_section.items():
            places, numbers = np.array(pairs).T
            self._fill(batch, places, numbers, self.packed(epoch, section))
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}  # cheaper to make again than to send to a worker

    def packed(self, epoch: int, section: int = 0) -> Packed:
        """Plans a section of an epoch, or recalls it when it is one of the last used."""
        if (epoch, section) not in self._kept:
            samples = self.sections[section]
            generator, overhang = self._draw(samples, epoch, section)
            plan = PLANS[self.packing](samples.content + overhang, self.context_length, generator)
            self._kept[epoch, section] = Packed(samples, plan, overhang)
            while len(self._kept) > PLANS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end((epoch, section))
        return self._kept[epoch, section]

    def first_row(self, epoch: int) -> int:
        """Number of an epoch's first row."""
        sections = self._sections
        if not self.varies:  # every epoch has as many rows
            self._count(sections)
            return epoch * self._starts[sections]
        self._count(epoch * sections)
        return self._starts[epoch * sections]

    @property
    def utilisation(self) -> float:
        """Share of the positions in the first epoch's rows that is not padding."""
        rows = len(self)
        return self._filled[self._sections] / (rows * self.context_length)

    def cut_samples(self) -> int:
        """How many samples stand in several rows in the first epoch."""
        if self.packing == "best_fit":
            return 0
        return sum(self.packed(0, section).plan.cut for section in range(self._sections))

    def locate(self, row: int) -> tuple[int, int, int]:
        """Epoch of a row, its section, and its number within that section of that epoch."""
        epoch, sections = 0, self._sections
        if self.varies:
            while self._starts[-1] <= row:
                self._count(len(self._starts))
        else:
            if len(self._starts) <= sections:
                self._count(sections)
            epoch, row = divmod(row, self._starts[sections])
        begun = bisect_right(self._starts, row) - 1  # sections without rows are passed over
        more, section = divmod(begun, sections)
        return epoch + more, section, row - self._starts[begun]

    def _count(self, sections: int) -> None:
        """Counts rows until the first row after so many sections, over all epochs, is known."""
        while len(self._starts) <= sections:
            epoch, section = divmod(len(self._starts) - 1, self._sections)
            samples = self.sections[section]
            _, overhang = self._draw(samples, epoch, section)
            lengths = samples.content + overhang
            self._starts.append(self._starts[-1] + COUNTS[self.packing](lengths, self.context_length))
            self._filled.append(self._filled[-1] + int(lengths.sum(dtype=np.int64)))

    def _draw(self, samples: Samples, epoch: int, section: int) -> tuple[np.random.Generator, NDArray[np.int32]]:
        """Generator of a section, and as its first draw the overhang of each sample, as far as a row has room."""
        generator = np.random.default_rng((*self.seed, epoch, section) if section else (*self.seed, epoch))
        content = samples.content
        overhang = np.zeros_like(content)
        if self.canvas:
            answer = content - samples.answer_start
            blocks = -(-answer // self.canvas)
            if self.cut:  # a sampler stands before each of the answer's blocks once
                blocks = generator.integers(1, blocks, endpoint=True, dtype=np.int32)
            overhang = blocks * self.canvas - answer
        elif self.overhang:
            overhang = generator.integers(0, self.overhang, size=len(content), endpoint=True, dtype=np.int32)
        return generator, np.minimum(overhang, np.maximum(self.context_length - content, 0))

    def _fill(self, batch: dict[str, NDArray], places: NDArray, numbers: NDArray, packed: Packed) -> None:
        """Puts rows `numbers` of a section into rows `places` of a batch."""
        samples, spans = packed.samples, packed.plan.spans(numbers)
        sample, start, length = spans.sample, spans.start, spans.length
        body = samples.body[sample]
        origin = samples.table.offsets[samples.index[sample]]
        # One entry per token from here on, in the order of places and columns. What counts up along a piece is the
        # number of the token plus something that is the same for all of the piece.
        count = int(length.sum())
        number = np.arange(count)
        begin = length.cumsum() - length
        token = number + (origin + start - begin).repeat(length)
        all_stored = bool((start + length <= body).all())
        if not all_stored:
            np.minimum(token, (origin + body - 1).repeat(length), out=token)
        ids, supervised = samples.table.tokens[token], samples.table.supervised[token]
        if not all_stored:
            position = number + (start - begin).repeat(length)
            after_body = position >= body.repeat(length)
            hanging = position >= samples.content[sample].repeat(length)
            ids = ids.astype(np.int64)
            ids[after_body] = self.special.terminator_ids[0]
            ids[hanging] = self.special.mask_id
            supervised = (supervised | after_body) & ~hanging
        segment = np.arange(len(length)) - np.searchsorted(spans.row, spans.row)  # counts up from 0 in each row
        columns = {
            "input_ids": ids,
            "supervised": supervised,
            "segment_ids": segment.repeat(length),
            "position_ids": number - begin.repeat(length),
        }
        if count == batch["input_ids"].size:
            for name, values in columns.items():
                batch[name].reshape(-1)[:] = values
        else:
            taken = np.zeros((len(batch["row"]), 1), np.int64)
            taken[places, 0] = np.bincount(spans.row, length, len(numbers))
            here = np.arange(self.context_length) < taken  # padding is at the end of rows
            for name, values in columns.items():
                batch[name][here] = values
