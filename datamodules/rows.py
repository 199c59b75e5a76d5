"""Rows of packed samples by number, and the samplers that deal row numbers to ranks."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from dllm_var.datamodules.packing import Packing, Plan, Samples, TooLong, count_rows, fit_samples, make_plan
from dllm_var.datamodules.table import Table
from dllm_var.text.tokenizer import SpecialTokens

SECTION = 2**21  # samples planned together: about 300 MB, however large the table
PLANS_KEPT = 2  # a batch may reach from one section into the next


@dataclass(eq=False, repr=False)
class PackedRows(Dataset):
    """Rows of `context_length` tokens, each a pure function of the seed and its number.

    Stretches of the table are dealt in turn to sections of bounded size, so that memory does not grow with the table.
    Rows are numbered on and on over the epochs, and within an epoch over the sections. For each epoch the samples and
    rows of a section are shuffled and the overhang is chosen anew, with a generator keyed by seed, epoch and section.
    """

    table: Table
    special: SpecialTokens
    context_length: int
    packing: Packing = "concat"
    on_too_long: TooLong = "drop"
    eos_padding: int = 0  # shorter answers are padded to this many tokens with terminators
    overhang: int = 0  # largest number of unsupervised mask tokens after a sample
    canvas: int = 0  # samples end where the canvas of a sampler with this block length would end; 0 for off
    cut: bool = True  # whether a canvas may also end with an earlier block than the answer's last
    seed: tuple[int, ...] = (0,)
    section: int = SECTION  # samples in a section
    stretch: int = 1_024  # neighbouring samples in one section, so that memory-mapped files are read in pages

    def __post_init__(self) -> None:
        self.sections = max(-(-len(self.table) // self.section), 1)
        self._starts = [0]  # number of the first row of each section, epoch after epoch, as far as they are counted
        self._totals = Counter(samples=0, tokens=0, dropped=0, truncated=0, filled=0)  # of the first epoch
        self._planned: dict[tuple[int, int], tuple[Samples, Plan]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": {}}  # cheaper to make again than to send to a worker

    def __len__(self) -> int:
        """Rows of the first epoch; other epochs have a few more or less when the overhang changes."""
        return self.first_row(1)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Builds a batch of the rows with these numbers; -1 stands for a row of nothing but padding."""
        shape = (len(rows), self.context_length)  # [batch, context]
        batch = {
            "input_ids": np.full(shape, self.special.pad_id, dtype=np.int64),
            "supervised": np.zeros(shape, dtype=np.bool_),
            "segment_ids": np.full(shape, -1, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
            "row": np.array(rows, dtype=np.int64),  # [batch]
        }
        by_section: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, row in enumerate(rows):
            if row >= 0:
                epoch, section, number = self.locate(row)
                by_section.setdefault((epoch, section), []).append((place, number))
        for (epoch, section), pairs in by_section.items():
            places, numbers = np.array(pairs).T
            self._fill(batch, places, numbers, *self.packed(epoch, section))
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def report(self) -> dict[str, Any]:
        """What the first epoch consists of; its ``tokens`` are without overhang."""
        rows = len(self)
        counts = dict(self._totals)
        filled = counts.pop("filled")
        return {**counts, "rows": rows, "utilisation": filled / (rows * self.context_length)}

    def locate(self, row: int) -> tuple[int, int, int]:
        """Epoch of a row, its section, and its number within that section of that epoch."""
        before = 0
        if not (self.overhang or (self.canvas and self.cut)):  # all epochs have as many rows: the first is counted
            before, row = divmod(row, len(self))
        while self._starts[-1] <= row:
            self._count_section()
        begun = bisect_right(self._starts, row) - 1  # sections without rows are passed over
        epoch, section = divmod(begun, self.sections)
        return before + epoch, section, row - self._starts[begun]

    def first_row(self, epoch: int) -> int:
        """Number of an epoch's first row."""
        while len(self._starts) <= epoch * self.sections:
            self._count_section()
        return self._starts[epoch * self.sections]

    def _count_section(self) -> None:
        """Counts the rows of the next section, over all epochs."""
        epoch, section = divmod(len(self._starts) - 1, self.sections)
        samples, lengths, _ = self._with_overhang(epoch, section)
        self._starts.append(self._starts[-1] + count_rows(self.packing, lengths, self.context_length))
        if epoch == 0:
            tokens, filled = (int(array.sum(dtype=np.int64)) for array in (samples.content, lengths))
            left_out = {"dropped": samples.dropped, "truncated": samples.truncated}
            self._totals.update(samples=len(lengths), tokens=tokens, filled=filled, **left_out)

    def packed(self, epoch: int, section: int = 0) -> tuple[Samples, Plan]:
        """Plans a section of an epoch, unless it is one of the last planned."""
        if (epoch, section) not in self._planned:
            samples, lengths, generator = self._with_overhang(epoch, section)
            if len(self._planned) >= PLANS_KEPT:
                del self._planned[next(iter(self._planned))]
            self._planned[epoch, section] = samples, make_plan(self.packing, lengths, self.context_length, generator)
        return self._planned[epoch, section]

    def samples(self, section: int) -> Samples:
        """Samples of a section, as far as they fit into rows."""
        starts = np.arange(section, -(-len(self.table) // self.stretch), self.sections) * self.stretch
        index = (starts[:, None] + np.arange(self.stretch)).reshape(-1)
        index = index[index < len(self.table)]
        return fit_samples(self.table, index, self.context_length, self.on_too_long, self.eos_padding)

    def _with_overhang(self, epoch: int, section: int) -> tuple[Samples, NDArray[np.int32], np.random.Generator]:
        """Samples of a section, their lengths with the overhang, and the generator that has chosen it.

        Mask tokens follow a sample, no more than a row has room for; a negative overhang cuts tokens off its end.
        """
        generator = np.random.default_rng((*self.seed, epoch, section) if section else (*self.seed, epoch))
        samples = self.samples(section)
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
        lengths = content + np.minimum(overhang, np.maximum(self.context_length - content, 0))
        return samples, lengths, generator

    def _fill(self, batch: dict[str, NDArray], places: NDArray, numbers: NDArray, samples: Samples, plan: Plan) -> None:
        """Puts rows `numbers` of a section into rows `places` of a batch."""
        spans = plan.spans(numbers)
        sample, start, length = spans.sample, spans.start, spans.length
        body = samples.body[sample]
        origin = self.table.offsets[samples.index[sample]]
        # One entry per token from here on, in the order of places and columns. What counts up along a span is the
        # number of the token plus a constant of the span.
        count = int(length.sum())
        number = np.arange(count)
        begin = length.cumsum() - length
        token = number + (origin + start - begin).repeat(length)
        all_in_table = bool((start + length <= body).all())
        if not all_in_table:
            np.minimum(token, (origin + body - 1).repeat(length), out=token)
        ids, supervised = self.table.tokens[token], self.table.supervised[token]
        if not all_in_table:
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
        if count == batch["input_ids"].size:  # nothing is padding: a copy is faster than a mask
            for name, values in columns.items():
                batch[name].reshape(-1)[:] = values
            return
        taken = np.zeros((len(batch["row"]), 1), np.int64)
        taken[places, 0] = np.bincount(spans.row, length, len(numbers))
        here = np.arange(self.context_length) < taken  # padding is at the end of rows
        for name, values in columns.items():
            batch[name][here] = values


class RowSampler(DistributedSampler):
    """Deals the endless stream of training rows; Lightning leaves a `DistributedSampler` as it is.

    Batch s of rank r has the rows from ``next_row + (s * ranks + r) * batch_size`` on, so that what a step trains on
    depends on the global batch size alone. Each epoch has as many batches as cover `rows`, and goes on at `next_row`.
    """

    def __init__(self, rows: int, batch_size: int, num_replicas: int = 1, rank: int = 0, next_row: int = 0) -> None:
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.next_row = next_row
        self.batches = -(-rows // (batch_size * num_replicas))
        self.num_samples = self.batches * batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.next_row
        for batch in range(self.batches):
            row = first + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(row, row + self.batch_size)

    def trained(self, first_row: int) -> int:
        """Moves `next_row` behind the step in which this rank's batch begins with `first_row`."""
        self.next_row = first_row + (self.num_replicas - self.rank) * self.batch_size
        return self.next_row


class HeldOutSampler(DistributedSampler):
    """Deals the rows of a held-out split, each to one rank; -1, a row of padding, to ranks that would have one less."""

    def __iter__(self) -> Iterator[int]:
        rows = len(self.dataset)  # type: ignore[arg-type]
        return (row if row < rows else -1 for row in range(self.rank, self.total_size, self.num_replicas))
