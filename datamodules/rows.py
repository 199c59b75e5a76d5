"""Rows of packed samples by number, and the samplers that deal row numbers to ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from dllm_var.datamodules.packing import Packing, Plan, Samples, Sections, count_rows, make_plan
from dllm_var.text.tokenizer import SpecialTokens

PLANS_KEPT = 2  # a batch may reach from one section into the next


class PackedRows(Dataset):
    """Rows of `context_length` tokens, each a pure function of the seed and its number.

    Rows are numbered on and on over the epochs, and within an epoch over the sections of the samples. For each epoch
    the samples and rows of a section are shuffled and the overhang is chosen anew, with a generator keyed by seed,
    epoch and section; the number of rows follows. Memory depends on the size of a section, not on how many there are.

    Args:
        sections: What is packed, in one or more sections.
        special: Ids of mask, terminators and padding.
        packing: ``concat`` or ``best_fit``.
        overhang: Largest number of unsupervised mask tokens after a sample.
        seed: One number, or several.
        canvas: Ends samples where the canvas of a sampler with this block length would end; 0 for off.
        cut: Lets the canvas also end with an earlier block than the answer's last.
    """

    def __init__(
        self,
        sections: Sections,
        special: SpecialTokens,
        packing: Packing,
        overhang: int,
        seed: int | tuple[int, ...],
        canvas: int = 0,
        cut: bool = True,
    ) -> None:
        self.sections = sections
        self.special = special
        self.context_length = sections.context_length
        self.packing: Packing = packing
        self.overhang = overhang
        self.canvas = canvas
        self.cut = cut
        self.seed = seed if isinstance(seed, tuple) else (seed,)
        self._starts = [0]  # number of the first row of each section, epoch after epoch, as far as they are counted
        self._totals = Counter(samples=0, tokens=0, dropped=0, truncated=0, filled=0)  # of the first epoch
        self._planned: dict[tuple[int, int], tuple[Samples, Plan]] = {}

    def __len__(self) -> int:
        """Rows of the first epoch; other epochs have a few more or less when the overhang changes."""
        return self.first_row(1)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Builds a batch of the rows with these numbers; -1 stands for a row of nothing but padding.

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
            self._fill(batch, places, numbers, *self.packed(epoch, section))
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": {}}  # cheaper to make again than to send to a worker

    def packed(self, epoch: int, section: int = 0) -> tuple[Samples, Plan]:
        """Plans a section of an epoch, unless it is one of the last planned."""
        if (epoch, section) not in self._planned:
            samples = self.sections[section]
            generator, overhang = self._overhang(samples, epoch, section)
            while len(self._planned) >= PLANS_KEPT:
                del self._planned[next(iter(self._planned))]
            plan = make_plan(self.packing, samples.content + overhang, self.context_length, generator)
            self._planned[epoch, section] = samples, plan
        return self._planned[epoch, section]

    def report(self) -> dict[str, Any]:
        """Returns what the first epoch consists of; see `PackedDataModule.report`."""
        rows = len(self)
        filled = self._totals["filled"] / (rows * self.context_length)
        counts = {name: count for name, count in self._totals.items() if name != "filled"}
        return {**counts, "rows": rows, "utilisation": filled}

    def locate(self, row: int) -> tuple[int, int, int]:
        """Epoch of a row, its section, and its number within that section of that epoch."""
        before = 0
        if not (self.overhang or (self.canvas and self.cut)):  # all epochs have as many rows: the first is counted
            before, row = divmod(row, len(self))
        while self._starts[-1] <= row:
            self._count_section()
        begun = bisect_right(self._starts, row) - 1  # sections without rows are passed over
        epoch, section = divmod(begun, len(self.sections))
        return before + epoch, section, row - self._starts[begun]

    def first_row(self, epoch: int) -> int:
        """Number of an epoch's first row."""
        while len(self._starts) <= epoch * len(self.sections):
            self._count_section()
        return self._starts[epoch * len(self.sections)]

    def _count_section(self) -> None:
        """Counts the rows of the next section, over all epochs."""
        epoch, section = divmod(len(self._starts) - 1, len(self.sections))
        samples = self.sections[section]
        _, overhang = self._overhang(samples, epoch, section)
        lengths = samples.content + overhang
        self._starts.append(self._starts[-1] + count_rows(self.packing, lengths, self.context_length))
        if epoch == 0:
            tokens, filled = (int(array.sum(dtype=np.int64)) for array in (samples.content, lengths))
            left_out = {"dropped": samples.dropped, "truncated": samples.truncated}
            self._totals.update(samples=len(lengths), tokens=tokens, filled=filled, **left_out)

    def _overhang(self, samples: Samples, epoch: int, section: int) -> tuple[np.random.Generator, NDArray[np.int32]]:
        """Returns the generator of a section, and what it gave: the mask tokens after each sample, shape [samples].

        There are no more than a row has room for. A negative number is that of tokens cut off the end.
        """
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

    def _fill(self, batch: dict[str, NDArray], places: NDArray, numbers: NDArray, samples: Samples, plan: Plan) -> None:
        """Puts rows `numbers` of a section into rows `places` of a batch."""
        spans = plan.spans(numbers)
        sample, start, length = spans.sample, spans.start, spans.length
        body = samples.body[sample]
        origin = samples.table.offsets[samples.index[sample]]
        # One entry per token from here on, in the order of places and columns. What counts up along a span is the
        # number of the token plus a constant of the span.
        count = int(length.sum())
        number = np.arange(count)
        begin = length.cumsum() - length
        token = number + (origin + start - begin).repeat(length)
        all_in_table = bool((start + length <= body).all())
        if not all_in_table:
            np.minimum(token, (origin + body - 1).repeat(length), out=token)
        ids, supervised = samples.table.tokens[token], samples.table.supervised[token]
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
        if count == batch["input_ids"].size:
            for name, values in columns.items():
                batch[name].reshape(-1)[:] = values
        else:
            taken = np.zeros((len(batch["row"]), 1), np.int64)
            taken[places, 0] = np.bincount(spans.row, length, len(numbers))
            here = np.arange(self.context_length) < taken  # padding is at the end of rows
            for name, values in columns.items():
                batch[name][here] = values


# Lightning leaves a `DistributedSampler` as it is and tells it the epoch.


class RowSampler(DistributedSampler):
    """Deals the endless stream of training rows.

    Batch s of rank r has the rows from ``next_row + (s * ranks + r) * batch_size`` on. So what a step trains on depends
    on the global batch size alone, every rank gets equally many batches, and no row is left out or repeated: each epoch
    goes on where `next_row` stands, which the data module moves with every batch that is trained. An epoch has as many
    batches as cover `rows`.
    """

    def __init__(self, rows: int, batch_size: int, num_replicas: int = 1, rank: int = 0, next_row: int = 0) -> None:
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.next_row = next_row
        self.batches = -(-rows // (batch_size * num_replicas))

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.next_row
        for batch in range(self.batches):
            row = first + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(row, row + self.batch_size)

    def trained(self, first_row: int) -> None:
        """Notes that the batch of this rank that begins with `first_row` is trained."""
        self.next_row = first_row + (self.num_replicas - self.rank) * self.batch_size


class HeldOutSampler(DistributedSampler):
    """Deals the rows of a held-out split, each to one rank; -1, a row of padding, to ranks that would have one less."""

    def __init__(self, rows: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.rows = rows

    def __len__(self) -> int:
        return -(-self.rows // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        for index in range(len(self)):
            row = index * self.num_replicas + self.rank
            yield row if row < self.rows else -1
