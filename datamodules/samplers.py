"""Samplers that deal rows to ranks. Lightning leaves a `DistributedSampler` as it is and tells it the epoch."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import DistributedSampler


class RowSampler(DistributedSampler):
    """Deals the endless stream of training rows.

    Batch s of rank r has the rows from ``next_row + (s * ranks + r) * batch_size`` on. So what a step trains on depends
    on the global batch size alone, every rank gets equally many batches, and no row is left out or repeated: each epoch
    goes on where `next_row` stands, which the data module moves with every batch that is trained.

    Args:
        rows: Rows in a pass over the data; an epoch is the number of batches that covers them.
        batch_size: Rows in a batch of one rank.
        num_replicas: Number of ranks.
        rank: This one.
        next_row: Row at which the next epoch begins.
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
