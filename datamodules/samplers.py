"""Samplers that deal rows to ranks. Lightning leaves a `DistributedSampler` as it is and tells it the epoch."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import DistributedSampler


class RowSampler(DistributedSampler):
    """Deals the endless stream of training rows.

    Batch s of rank r has the rows from ``start_row + (s * ranks + r) * batch_size`` on, s counting over the epochs. So
    what a step trains on depends on the global batch size alone, every rank gets equally many batches, and no row is
    left out or repeated: where an epoch of batches ends, the next one runs on.

    Args:
        rows: Rows in a pass over the data; an epoch is the number of batches that covers them.
        batch_size: Rows in a batch of one rank.
        num_replicas: Number of ranks.
        rank: This one.
        start_row: Row at which epoch `start_epoch` begins.
        start_epoch: Epoch that begins there.
    """

    def __init__(
        self, rows: int, batch_size: int, num_replicas: int = 1, rank: int = 0, start_row: int = 0, start_epoch: int = 0
    ) -> None:
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.start_row = start_row
        self.start_epoch = start_epoch
        self.epoch = start_epoch
        self.batches = -(-rows // (batch_size * num_replicas))

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = (self.epoch - self.start_epoch) * self.batches
        for batch in range(first, first + self.batches):
            row = self.start_row + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(row, row + self.batch_size)


class HeldOutSampler(DistributedSampler):
    """Deals the rows of a held-out split, each to one rank; -1, a row of padding, where a rank would have one less.

    Args:
        rows: How many there are.
        num_replicas: Number of ranks.
        rank: This one.
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
