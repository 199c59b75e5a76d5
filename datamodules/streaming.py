"""Rows from a stream of records, for corpora too large to tokenize beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dllm_var.datamodules.data_module import PackedDataModule
from dllm_var.datamodules.packing import fit_samples
from dllm_var.datamodules.rows import PackedRows
from dllm_var.errors import UserError

Batch = dict[str, torch.Tensor]
POSITION = "stream_position"  # what batches carry on their way to the training loop


@dataclass(frozen=True)
class Position:
    """How far a reader has come.

    Args:
        epoch: Passes over the source it has finished.
        block: Block of records it reads.
        row: Rows of that block it has given out.
        total: Rows it has given out in all.
    """

    epoch: int = 0
    block: int = 0
    row: int = 0
    total: int = 0


class RowStream(IterableDataset):
    """Endless batches of rows, packed block by block; a pure function of settings and positions.

    The records of the source are taken in blocks. Reader k of n packs blocks k, k + n, ..., each like an epoch of its
    own, shuffled by a generator keyed with seed, epoch and block. Readers are the workers of all ranks.

    Args:
        data: Has source, tokenizer and settings.
        rank: Which rank this is.
        ranks: How many there are.
        positions: Where each reader of this rank begins, the one whose turn is next first.
    """

    def __init__(self, data: StreamingDataModule, rank: int, ranks: int, positions: list[tuple[int, Position]]) -> None:
        self.source, self.special = data.source, data.tokenizer.special
        self.encoder = data.encoder()
        self.batch_size, self.block_records = data.batch_size, data.block_records
        self.packing = (data.context_length, data.packing, data.overhang)
        self.fitting = (data.context_length, data.on_too_long, data.eos_padding)
        self.canvas, self.seed = data.canvas, data.seed
        self.rank, self.ranks = rank, ranks
        self.positions = positions

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        reader, position = self.positions[worker.id if worker is not None else 0]
        shard, shards = self.rank * len(self.positions) + reader, self.ranks * len(self.positions)
        parts: list[Batch] = []
        missing = self.batch_size
        while True:
            found = False
            for block, rows in self._blocks(position.epoch, position.block, shard, shards):
                found = True
                row = position.row if block == position.block else 0
                while row < len(rows):
                    taken = range(row, min(row + missing, len(rows)))
                    part = rows.__getitems__(taken)
                    part["row"] = (torch.arange(len(taken)) + position.total) * shards + shard  # unique over readers
                    parts.append(part)
                    row, missing = taken.stop, missing - len(taken)
                    position = Position(position.epoch, block, row, position.total + len(taken))
                    if not missing:
                        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                        batch[POSITION] = torch.tensor([reader, position.epoch, position.block, row, position.total])
                        yield batch
                        parts, missing = [], self.batch_size
            if not found and position.block == 0:
                raise UserError(
                    f"{type(self.source).__name__} has too few usable records for {shards} readers of blocks of "
                    f"{self.block_records:,}; lower data.block_records, or use PackedDataModule"
                )
            position = Position(position.epoch + 1, 0, 0, position.total)

    def _blocks(self, epoch: int, first: int, shard: int, shards: int) -> Iterator[tuple[int, PackedRows]]:
        """Packed blocks of one reader, from a given one on."""
        first += (shard - first) % shards  # the reader's own next block
        for block, chunk in self.source.blocks("train", self.block_records, first, shards):
            if not chunk:
                continue
            begin = block * self.block_records
            table = self.encoder.encode(chunk, begin)
            samples = fit_samples(table, *self.fitting, place=lambda record: chunk[record - begin][0])  # noqa: B023
            if len(samples.index):
                key = (self.seed, epoch, block)
                yield block, PackedRows([samples], self.special, *self.packing, key, self.canvas)


class _StreamLoader:
    """A new reading each time it is iterated over, from where training stands."""

    def __init__(self, data: StreamingDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        ranks, rank = self.data._ranks()
        rows = RowStream(self.data, rank, ranks, list(self.data._turns))
        return iter(DataLoader(rows, None, num_workers=self.data.num_workers, pin_memory=self.data._on_cuda()))


class StreamingDataModule(PackedDataModule):
    """Packs training rows while they are needed, for corpora that are too large to tokenize beforehand.

    Records are read in blocks in the source's order, and shuffled and packed within a block: a source that is sorted
    should be shuffled once. A reader parses the records of its own blocks alone, and resuming begins at the right one,
    where the source can pass over the others (`Source.blocks`): uncompressed JSON Lines, Parquet and datasets can. The
    stream has no end, so set ``trainer.max_steps``. Checkpoints hold how far every reader has come, and training goes
    on with the very next row. Validation and test splits are tokenized as usual; bring them as files of their own,
    because carving them out reads the whole source once.

    Args:
        block_records: Records read, shuffled and packed at a time.
        kwargs: As for `PackedDataModule`; with ``num_workers`` at least 1 packing does not hold up training.

    Raises:
        UserError: When a setting makes no sense, or the tokenizer cannot be loaded.
    """

    def __init__(self, block_records: int = 5_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if block_records < 1:
            raise UserError(f"data.block_records is {block_records}; it must be at least 1")
        self.block_records = block_records
        # Positions of this rank's readers, the one whose turn is next first.
        self._turns: deque[tuple[int, Position]] = deque()
        self._restored: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        """Tokenizes the held-out splits; Lightning calls it in one process per node."""
        for split in self.source.splits:
            if split != "train":
                self.table(split)

    def train_dataloader(self) -> _StreamLoader:  # type: ignore[override]
        """Batches of an endless stream, from where a restored training stood."""
        self._turns = deque(self._begin(*self._ranks()))
        return _StreamLoader(self)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes the position of the batch that is about to be trained on; later ones may have been read already."""
        if isinstance(batch, dict) and POSITION in batch:
            batch = dict(batch)
            reader, *position = batch.pop(POSITION).tolist()
            self._turns.popleft()
            self._turns.append((reader, Position(*position)))
        return self.with_document_ends(batch)

    def state_dict(self) -> dict[str, Any]:
        """How far every reader of every rank has come; called on all ranks."""
        if not self._turns:
            return self._restored or {}
        turns = [
            [reader, position.epoch, position.block, position.row, position.total] for reader, position in self._turns
        ]
        by_rank: list[Any] = [(self._ranks()[1], turns)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            by_rank = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(by_rank, (self._ranks()[1], turns))
        # Processes that share the parts of one model have the same data, and the same rank here.
        return {
            "block_records": self.block_records,
            "turns": [turns for _, turns in sorted(dict(by_rank).items())],
            "identity": self.identity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the positions of a checkpoint when training begins.

        Raises:
            UserError: When rows would not be those of the checkpoint, unless `check_resume` is off; names the setting.
        """
        self._check_identity(state_dict)
        self._restored = state_dict

    def summary(self) -> str:
        """What is known of the stream beforehand."""
        return (
            f"data: streaming from {type(self.source).__name__}, {self.block_records:,} records at a time, into rows "
            f"of {self.context_length} ({self.packing})"
        )

    def report(self, split: str = "train") -> dict[str, Any]:
        """What became of a held-out split; see `PackedDataModule.report`.

        Args:
            split: ``validation`` or ``test``.

        Raises:
            UserError: For the training split, of which nothing is known as a whole.
        """
        if split == "train":
            raise UserError("the training split is streamed: there is no report on it as a whole")
        return super().report(split)

    def _begin(self, ranks: int, rank: int) -> list[tuple[int, Position]]:
        """Where each reader of this rank begins."""
        readers = max(self.num_workers, 1)
        fresh = [(reader, Position()) for reader in range(readers)]
        if self._restored is None:
            return fresh
        turns = [[(turn[0], Position(*turn[1:])) for turn in rank_turns] for rank_turns in self._restored["turns"]]
        if self._restored["block_records"] != self.block_records:
            raise UserError(
                f"data.block_records was {self._restored['block_records']} when the checkpoint was written and is "
                f"{self.block_records}: set it back to resume"
            )
        if len(turns) == ranks and len(turns[rank]) == readers:
            return turns[rank]
        # Blocks are dealt out anew: all readers go on after the furthest block any of them has begun.
        last = max((position for rank_turns in turns for _, position in rank_turns), key=lambda p: (p.epoch, p.block))
        total = max(position.total for rank_turns in turns for _, position in rank_turns)
        rank_zero_warn(
            "the number of ranks or workers differs from the checkpoint's: training goes on after the last block begun "
            "and leaves out what remains of the blocks that were being read"
        )
        return [(reader, Position(last.epoch, last.block + 1, 0, total)) for reader, _ in fresh]
