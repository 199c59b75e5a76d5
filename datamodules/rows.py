"""Rows of packed samples by number, and the sampler that deals them to ranks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from dllm_var.datamodules.packing import COUNTS, POLICIES, Plan
from dllm_var.datamodules.table import Table
from dllm_var.tokenization import SpecialTokens

PLANS_KEPT = 2  # a batch may reach from one epoch into the next


@dataclass(frozen=True)
class Samples:
    """What of each sample goes into rows: tokens of the table, then terminators, then unsupervised masks.

    Args:
        table: tokenized samples.
        index: which samples of the table are used, shape [samples].
        body: how many tokens of each are taken from the table, shape [samples].
        ends: how many supervised terminators are added after them, shape [samples].
    """

    table: Table
    index: NDArray[np.int64]
    body: NDArray[np.int32]
    ends: NDArray[np.int32]


class PackedRows(Dataset):
    """Rows of `context_length` tokens, each a pure function of the seed and its number.

    Rows are numbered over epochs without end: epoch 0 has the first ones, and so on. Samples and rows are shuffled, and
    the overhang is drawn, anew for each epoch.

    Args:
        samples: what is packed.
        special: ids of mask, terminators and padding.
        context_length: tokens in a row.
        packing: name of the policy, ``concat`` or ``best_fit``.
        overhang: largest number of unsupervised mask tokens after a sample.
        seed: with the epoch, decides order and overhang.
    """

    def __init__(
        self, samples: Samples, special: SpecialTokens, context_length: int, packing: str, overhang: int, seed: int
    ) -> None:
        self.samples = samples
        self.special = special
        self.context_length = context_length
        self.packing = packing
        self.overhang = overhang
        self.seed = seed
        self._starts = [0]  # number of the first row of each epoch counted so far
        self._plans: OrderedDict[int, tuple[Plan, NDArray[np.int32]]] = OrderedDict()

    def __len__(self) -> int:
        """Rows in the first epoch; later ones differ by a few when the overhang is drawn anew."""
        return self._start(1)

    def plan(self, epoch: int) -> Plan:
        """The pack plan of an epoch."""
        return self._plan(epoch)[0]

    def locate(self, row: int) -> tuple[int, int]:
        """Epoch of a row and its number within that epoch."""
        epoch = 0 if self.overhang else row // self._start(1)
        while self._start(epoch + 1) <= row:
            epoch += 1
        return epoch, row - self._start(epoch)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Builds a whole batch at once.

        Args:
            rows: numbers of the rows, over all epochs; -1 is a row of nothing but padding.

        Returns:
            ``input_ids``, ``supervised``, ``segment_ids``, ``position_ids`` of shape [batch, context] and ``row`` [batch].
        """
        batch = _Batch(len(rows), self.context_length, self.special)
        by_epoch: dict[int, tuple[list[int], list[int]]] = {}
        for place, row in enumerate(rows):
            if row >= 0:
                epoch, number = self.locate(row)
                places, numbers = by_epoch.setdefault(epoch, ([], []))
                places.append(place)
                numbers.append(number)
        for epoch, (places, numbers) in by_epoch.items():
            plan, overhang = self._plan(epoch)
            batch.fill(np.array(places), plan, np.array(numbers), self.samples, overhang)
        return batch.tensors(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": OrderedDict()}  # cheaper to make again than to send to a worker

    def _draw(self, epoch: int) -> tuple[np.random.Generator, NDArray[np.int32]]:
        """Generator of an epoch, and the overhang of each sample as its first draw."""
        generator = np.random.default_rng((self.seed, epoch))
        content = self.samples.body + self.samples.ends
        if not self.overhang:
            return generator, np.zeros_like(content)
        overhang = generator.integers(0, self.overhang, size=len(content), endpoint=True, dtype=np.int32)
        return generator, np.minimum(overhang, np.maximum(self.context_length - content, 0))

    def _plan(self, epoch: int) -> tuple[Plan, NDArray[np.int32]]:
        if epoch not in self._plans:
            generator, overhang = self._draw(epoch)
            content = self.samples.body + self.samples.ends
            self._plans[epoch] = POLICIES[self.packing](content + overhang, self.context_length, generator), overhang
            while len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return self._plans[epoch]

    def _start(self, epoch: int) -> int:
        """Number of the first row of an epoch."""
        if not self.overhang:  # every epoch has as many rows as the first
            return epoch * (self._starts[1] if len(self._starts) > 1 else self._count(0))
        while len(self._starts) <= epoch:
            self._count(len(self._starts) - 1)
        return self._starts[epoch]

    def _count(self, epoch: int) -> int:
        assert len(self._starts) == epoch + 1
        content = self.samples.body + self.samples.ends
        rows = COUNTS[self.packing](content + self._draw(epoch)[1], self.context_length)
        self._starts.append(self._starts[-1] + rows)
        return rows


class _Batch:
    """A batch under construction: padding everywhere until rows are filled in."""

    def __init__(self, rows: int, context_length: int, special: SpecialTokens) -> None:
        self.special = special
        self.input_ids = np.full((rows, context_length), special.pad_id, dtype=np.int64)
        self.supervised = np.zeros((rows, context_length), dtype=np.bool_)
        self.segment_ids = np.full((rows, context_length), -1, dtype=np.int64)
        self.position_ids = np.zeros((rows, context_length), dtype=np.int64)

    def fill(
        self, places: NDArray, plan: Plan, numbers: NDArray, samples: Samples, overhang: NDArray[np.int32]
    ) -> None:
        """Puts rows `numbers` of a plan into rows `places` of the batch."""
        spans = plan.spans(numbers)
        table, sample = samples.table, samples.index[spans.sample]
        owner = np.repeat(np.arange(len(spans.length)), spans.length)  # which span each position belongs to
        within = np.arange(len(owner)) - np.repeat(np.cumsum(spans.length) - spans.length, spans.length)
        place = (places[spans.row] * self.input_ids.shape[1] + spans.column)[owner] + within
        position = spans.start[owner] + within  # within the sample, of which the span may be a later piece
        body = samples.body[spans.sample][owner]
        content = body + samples.ends[spans.sample][owner]
        source = table.offsets[sample][owner] + np.minimum(position, body - 1)
        ids = table.tokens[source].astype(np.int64)
        supervised = table.supervised[source]
        beyond = position >= body
        if beyond.any():
            ids[beyond] = self.special.terminator_ids[0]
            supervised[beyond] = True
            hanging = position >= content
            ids[hanging] = self.special.mask_id
            supervised[hanging] = False
        first_of_row = np.searchsorted(spans.row, np.arange(len(places)))
        self.input_ids.reshape(-1)[place] = ids
        self.supervised.reshape(-1)[place] = supervised
        self.segment_ids.reshape(-1)[place] = (np.arange(len(spans.row)) - first_of_row[spans.row])[owner]
        self.position_ids.reshape(-1)[place] = within

    def tensors(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        arrays = {
            "input_ids": self.input_ids,
            "supervised": self.supervised,
            "segment_ids": self.segment_ids,
            "position_ids": self.position_ids,
        }
        return {
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            "row": torch.tensor(rows, dtype=torch.int64),
        }


class RowSampler(DistributedSampler):
    """Deals the endless stream of training rows to ranks; Lightning keeps a `DistributedSampler` as it is.

    Batch j of rank r in global batch s has the rows ``start_row + (s * ranks + r) * batch_size`` and on, so what is trained
    on up to a step does not depend on how many ranks share the work, and no row is left out or repeated.

    Args:
        rows: a pass over the data; an epoch is as many whole batches as it takes to cover it.
        batch_size: rows in a batch of one rank.
        num_replicas: ranks.
        rank: this one.
        start_row: first row of epoch `start_epoch`.
        start_epoch: the epoch at which the stream begins.
    """

    def __init__(
        self, rows: int, batch_size: int, num_replicas: int = 1, rank: int = 0, start_row: int = 0, start_epoch: int = 0
    ) -> None:
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.start_row = start_row
        self.start_epoch = start_epoch
        self.epoch = start_epoch
        self.batches = max(1, -(-rows // (batch_size * num_replicas)))

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = (self.epoch - self.start_epoch) * self.batches
        for batch in range(first, first + self.batches):
            begin = self.start_row + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(begin, begin + self.batch_size)


class HeldOutSampler(DistributedSampler):
    """Deals the rows of a held-out split, each to one rank; -1 (padding) evens out what ranks get.

    Args:
        rows: how many there are.
        num_replicas: ranks.
        rank: this one.
    """

    def __init__(self, rows: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.rows = rows

    def __len__(self) -> int:
        return -(-self.rows // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        for index in range(len(self)):
            row = index * self.num_replicas + self.rank
            yield row if row < self.rows else -1
