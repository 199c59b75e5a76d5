"""Rows from a stream of records, for corpora too large to tokenize beforehand."""

from collections import deque
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dllm_var.datamodules.data_module import PackedDataModule
from dllm_var.datamodules.rows import PackedRows
from dllm_var.errors import UserError

POSITION = "stream_position"  # what batches carry on their way to the training loop


class Position(NamedTuple):
    """How far a reader has come: passes over the source, block it reads, rows it gave out of that block, and in all."""

    epoch: int = 0
    block: int = 0
    row: int = 0
    total: int = 0


class RowStream(IterableDataset):
    """Endless batches of rows, packed block by block; a pure function of settings and positions.

    The records of the source are taken in blocks. Reader k of n packs blocks k, k + n, ..., each like an epoch of its
    own, shuffled by a generator keyed with seed, epoch and block. Readers are the workers of all `ranks`; `turns` says
    where each reader of this rank begins, the one whose turn is next first.
    """

    def __init__(self, data: "StreamingDataModule", rank: int, ranks: int, turns: deque[tuple[int, Position]]) -> None:
        self.source, self.encoder, self.packer = data.source, data.encoder(), data.packer()
        self.batch_size, self.block_records, self.seed = data.batch_size, data.block_records, data.seed
        self.rank, self.ranks, self.turns = rank, ranks, turns

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        reader, position = self.turns[worker.id if worker is not None else 0]
        shard, shards = self.rank * len(self.turns) + reader, self.ranks * len(self.turns)
        rows = self._rows(position, shard, shards)
        while taken := list(islice(rows, self.batch_size)):
            blocks = groupby(taken, key=itemgetter(0))
            parts = [block.__getitems__([row for _, row, _ in group]) for block, group in blocks]
            batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            numbers = torch.tensor([position.total - 1 for *_, position in taken])
            batch["row"] = numbers * shards + shard  # unique over readers
            batch[POSITION] = torch.tensor([reader, *taken[-1][2]])
            yield batch

    def _rows(self, position: Position, shard: int, shards: int) -> Iterator[tuple[PackedRows, int, Position]]:
        """Yields the next rows: the block that each is in, its number there, and the position after it."""
        epoch, first, done, total = position
        while True:
            start = first + (shard - first) % shards  # the reader's own next block
            blocks = 0
            for block, records in self.source.blocks("train", self.block_records, start, shards):
                table = self.encoder.encode(records)
                packed = self.packer(table, seed=(self.seed, epoch, block))
                blocks += len(packed) > 0
                for row in range(done if block == first else 0, len(packed)):
                    total += 1
                    yield packed, row, Position(epoch, block, row + 1, total)
            if not blocks and first == 0:
                raise UserError(
                    f"{type(self.source).__name__} has too few usable records for {shards} readers of blocks of "
                    f"{self.block_records:,}; lower data.block_records, or use PackedDataModule"
                )
            epoch, first, done = epoch + 1, 0, 0


class StreamingDataModule(PackedDataModule):
    """Packs training rows while they are needed, for corpora that are too large to tokenize beforehand.

    Records are read in blocks in the source's order, and shuffled and packed within a block: a source that is sorted
    should be shuffled once. The stream has no end, so set ``trainer.max_steps``. A resumed training goes on with the
    very next row. A reader reads through all of the files, and parses its own blocks alone; for dozens of readers use
    `DatasetSource`, which passes over the blocks of the others. Bring validation and test splits as files of their own,
    because carving them out reads the whole source once.

    Args:
        block_records: Records read, shuffled and packed at a time.
        kwargs: As for `PackedDataModule`; with ``num_workers`` at least 1 packing does not hold up training.
    """

    row_settings = (*PackedDataModule.row_settings, "block_records")

    def __init__(self, block_records: int = 5_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if block_records < 1:
            raise UserError(f"data.block_records is {block_records}; it must be at least 1")
        self.block_records = block_records
        # Positions of this rank's readers, the one whose turn is next first.
        self._turns: deque[tuple[int, Position]] = deque()
        self._restored: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Tokenizes the held-out splits."""
        for split in self.source.splits:
            if split != "train":
                self.table(split)

    def train_dataloader(self) -> DataLoader:
        """Batches of an endless stream, which goes on from where training stands."""
        ranks, rank = self._ranks()
        self._turns = deque(self._begin(ranks, rank))
        rows = RowStream(self, rank, ranks, self._turns)
        return DataLoader(rows, None, num_workers=self.num_workers, pin_memory=self._on_cuda())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes the position of the batch that is about to be trained on; later ones may have been read already."""
        if isinstance(batch, dict) and POSITION in batch:
            batch = dict(batch)
            reader, *position = batch.pop(POSITION).tolist()
            self._turns.popleft()
            self._turns.append((reader, Position(*position)))
        return self._prepared(batch)

    def state_dict(self) -> dict[str, Any]:
        """How far every reader of every rank has come; called on all ranks."""
        if not self._turns:
            return self._restored
        own = (self._ranks()[1], [[reader, *position] for reader, position in self._turns])
        by_rank: list[Any] = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            by_rank = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(by_rank, own)
        # Processes that share the parts of one model have the same data, and the same rank here.
        return {"turns": [turns for _, turns in sorted(dict(by_rank).items())], "identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the positions of a checkpoint when training begins; refuses what `PackedDataModule` refuses."""
        self._check_identity(state_dict)
        self._restored = state_dict

    def summary(self) -> str:
        """What is known of the stream beforehand."""
        blocks = f"data: streaming from {type(self.source).__name__}, {self.block_records:,} records at a time"
        return f"{blocks}, into rows of {self.context_length} ({self.packing})"

    def warnings(self) -> list[str]:
        """What can be known to be a mistake before the stream is read."""
        return self._missing_template()

    def _begin(self, ranks: int, rank: int) -> list[tuple[int, Position]]:
        """Where each reader of this rank begins."""
        readers = range(max(self.num_workers, 1))
        if not self._restored:
            return [(reader, Position()) for reader in readers]
        turns = [[(reader, Position(*place)) for reader, *place in turns] for turns in self._restored["turns"]]
        if len(turns) == ranks and len(turns[rank]) == len(readers):
            return turns[rank]
        # Blocks are dealt out anew: all readers go on after the furthest block any of them has begun.
        positions = [position for rank_turns in turns for _, position in rank_turns]
        last, total = max(positions), max(position.total for position in positions)
        rank_zero_warn(
            "the number of ranks or workers differs from the checkpoint's: training goes on after the last block begun "
            "and leaves out what remains of the blocks that were being read"
        )
        return [(reader, Position(last.epoch, last.block + 1, 0, total)) for reader in readers]
