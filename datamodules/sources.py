"""Sources of records: the base class that every source extends, and the one that makes missing splits."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.datamodules.contents import remember
from dllm_var.datamodules.readers import Blocks, Reader
from dllm_var.datamodules.records import prompt_key
from dllm_var.errors import UserError

SPLITS = ("train", "validation", "test")
FIELDS = ("prompt", "response", "instruction", "input", "output", "messages", "input_ids", "prompt_length", "text")


@dataclass(frozen=True)
class BadRecord:
    """Stands in the stream for a record that could not even be read.

    Args:
        reason: What is wrong with it.
    """

    reason: str


Located = Iterator[tuple[str, "dict[str, Any] | BadRecord"]]


class Source(ABC):
    """A collection of records in up to three splits.

    A record is a dict in one of five formats: ``{prompt, response}``, ``{instruction, input, output}``, ``{messages}``,
    ``{input_ids, prompt_length}`` or ``{text}``. A subclass implements `records` and `fingerprint`; the rest has
    defaults.
    """

    splits: tuple[str, ...] = ("train",)
    """Splits this source has, out of ``train``, ``validation``, ``test``."""

    default_tokenizer: str | None = None
    """Tokenizer folder or name used when the data module is given none."""

    fingerprint_version: int = 1
    """Raised when the same records get another fingerprint than in an earlier version; checkpoints record it."""

    cache_dir: Path | None = None
    """Folder for what takes long to find out about the data; the data module sets it."""

    @abstractmethod
    def records(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a split, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever the records may have changed; keys the cache of tokenized data."""

    def located_records(self, split: str) -> Located:
        """Yields each record with where it stands (``data.jsonl:12``), unreadable ones as `BadRecord`."""
        for number, record in enumerate(self.records(split)):
            yield f"{type(self).__name__} {split} record {number}", record

    def blocks(self, split: str, size: int, first: int = 0, step: int = 1) -> Blocks:
        """Yields every `step`-th block of located records with its number, from a given one on.

        Args:
            split: One of the splits.
            size: Records in a block.
            first: Number of the first block to read.
            step: 1 for every block; several readers have one each of as many blocks.
        """
        return Reader(self.located_records(split)).blocks(size, first, step)


class SplitSource(Source):
    """A source that comes in splits of its own and may carve missing ones out of its training records.

    Records with the same prompt always go into the same split, chosen by a fixed hash of the prompt. Splits are told
    apart by reading all of the training records first, so a stream should bring its own.

    Args:
        validation_size: Prompts for a validation split the data does not bring: a number, or a share below 1. When not
            given, 2 % of the prompts, at most 1,000.
        test_size: The same for a test split; none when not given.
        columns: Names our fields have in the data, such as ``{prompt: question, response: answer}``.
    """

    fingerprint_version = 2

    def __init__(
        self,
        validation_size: int | float | None = None,
        test_size: int | float = 0,
        columns: dict[str, str] | None = None,
    ) -> None:
        for name, size in (("validation_size", validation_size), ("test_size", test_size)):
            if size is not None and (size < 0 or (size >= 1 and size != int(size))):
                raise UserError(f"{name} is {size}; give a number of prompts, or a share between 0 and 1")
        for name in columns or {}:
            if name not in FIELDS:
                raise UserError(f"columns names the field {name!r}; fields are {', '.join(FIELDS)}")
        self.validation_size = validation_size
        self.test_size = test_size
        self.columns = columns or {}

    @abstractmethod
    def own_splits(self) -> Mapping[str, Any]:
        """Splits the data brings, by name."""

    @abstractmethod
    def read(self, split: str) -> Located:
        """Yields the records of a split the data brings, each with its place."""

    @abstractmethod
    def content_fingerprint(self) -> str:
        """A string that changes when the data does."""

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        sizes = {
            "train": 1,
            "validation": 1 if self.validation_size is None else self.validation_size,
            "test": self.test_size,
        }
        return tuple(split for split in SPLITS if split in self.own_splits() or sizes[split])

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        return (record for _, record in self.located_records(split) if not isinstance(record, BadRecord))

    def located_records(self, split: str) -> Located:
        for where, record in self.read(self._stored_in(split)):
            record = self._renamed(record)
            if self._is_of(split, record):
                yield where, record

    def reader(self, split: str) -> Reader:
        """Reads a split that the data brings; passes over records as cheaply as it can."""
        return Reader(self.read(split))

    def blocks(self, split: str, size: int, first: int = 0, step: int = 1) -> Blocks:
        """Blocks are counted in the split that the data brings: where another is carved out of it they have fewer."""
        for block, chunk in self.reader(self._stored_in(split)).blocks(size, first, step):
            renamed = ((where, self._renamed(record)) for where, record in chunk)
            yield block, [(where, record) for where, record in renamed if self._is_of(split, record)]

    def _stored_in(self, split: str) -> str:
        return split if split in self.own_splits() else "train"

    def _is_of(self, split: str, record: Any) -> bool:
        """Whether a record of the split where `split` is stored belongs to `split`."""
        own = self.own_splits()
        if split in own and (split != "train" or set(self.splits) <= set(own)):
            return True
        # Records that cannot be read count among the training records.
        key = None if isinstance(record, BadRecord) else prompt_key(record)
        chosen = "train"
        if key is not None and key <= self._limits["test"]:
            chosen = "test"
        elif key is not None and key <= self._limits["validation"]:
            chosen = "validation"
        return chosen == split

    def fingerprint(self) -> str:
        settings = [self.validation_size, self.test_size, sorted(self.columns.items()), list(self.splits)]
        return f"{type(self).__name__} {self.content_fingerprint()} {json.dumps(settings)}"

    def _renamed(self, record: Any) -> Any:
        if not self.columns or not isinstance(record, dict):
            return record
        renamed = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        return {**{name: value for name, value in record.items() if name not in self.columns}, **renamed}

    @cached_property
    def _limits(self) -> dict[str, int]:
        """Largest prompt key of each carved split: test takes the smallest keys, validation the next."""
        return remember(self.cache_dir, "splits", self.fingerprint(), self._find_limits)

    def _find_limits(self) -> dict[str, int]:
        records = (self._renamed(record) for _, record in self.read("train") if not isinstance(record, BadRecord))
        keys = np.unique(np.fromiter((prompt_key(record) for record in records), dtype=np.uint64))
        limits, used = {}, 0
        for split, size in (("test", self.test_size), ("validation", self.validation_size)):
            if split not in self.own_splits():
                if size is None:
                    size = min(1_000, -(-len(keys) // 50)) if len(keys) > 1 else 0
                used += round(size * len(keys)) if size < 1 else int(size)
            limits[split] = int(keys[used - 1]) if 0 < used <= len(keys) else -1
        if used >= len(keys) > 0:
            raise UserError(
                f"validation_size and test_size take all of the {len(keys)} prompts; leave some for training"
            )
        return limits
