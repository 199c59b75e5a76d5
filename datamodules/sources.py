"""Sources of records: the base class that every source extends, and the ones for files and for `datasets`."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.datamodules.records import prompt_key
from dllm_var.errors import UserError

SPLITS = ("train", "validation", "test")
HASHED_WHOLE = 2**24  # bytes up to which a file's fingerprint covers all of its content
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
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


class SplitSource(Source):
    """A source that comes in splits of its own and may carve missing ones out of its training records.

    Records with the same prompt always go into the same split, chosen by a fixed hash of the prompt.

    Args:
        validation_size: Prompts for a validation split the data does not bring: a number, or a share below 1. When not
            given, 2 % of the prompts, at most 1,000.
        test_size: The same for a test split; none when not given.
        columns: Names our fields have in the data, such as ``{prompt: question, response: answer}``.
    """

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
        own = self.own_splits()
        if split in own and (split != "train" or set(self.splits) <= set(own)):
            yield from self._renamed(split)
            return
        for where, record in self._renamed("train"):
            # Records that cannot be read count among the training records.
            key = None if isinstance(record, BadRecord) else prompt_key(record)
            chosen = "train"
            if key is not None and key <= self._limits["test"]:
                chosen = "test"
            elif key is not None and key <= self._limits["validation"]:
                chosen = "validation"
            if chosen == split:
                yield where, record

    def fingerprint(self) -> str:
        settings = [self.validation_size, self.test_size, sorted(self.columns.items()), list(self.splits)]
        return f"{type(self).__name__} {self.content_fingerprint()} {json.dumps(settings)}"

    def _renamed(self, split: str) -> Located:
        if not self.columns:
            yield from self.read(split)
            return
        for where, record in self.read(split):
            if isinstance(record, dict):
                renamed = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
                record = {**{name: value for name, value in record.items() if name not in self.columns}, **renamed}
            yield where, record

    @cached_property
    def _limits(self) -> dict[str, int]:
        """Largest prompt key of each carved split: test takes the smallest keys, validation the next."""
        records = (record for _, record in self._renamed("train") if not isinstance(record, BadRecord))
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


class FileSource(SplitSource):
    """Records from files, a path per split.

    Args:
        path: File, folder or pattern (``data/*.jsonl``) of training records; several in a list.
        validation_path: The same for validation; carved out of training when not given.
        test_path: The same for test.
        validation_size: Prompts to carve out for validation: a number, or a share below 1. When not given, 2 % of them,
            at most 1,000.
        test_size: The same for test; none when not given.
        columns: Names our fields have in the files, such as ``{prompt: question, response: answer}``.
    """

    suffixes: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | list[str],
        validation_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        validation_size: int | float | None = None,
        test_size: int | float = 0,
        columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__(validation_size, test_size, columns)
        paths = {"train": path, "validation": validation_path, "test": test_path}
        settings = {"train": "path", "validation": "validation_path", "test": "test_path"}
        self.files = {split: self._find(found, settings[split]) for split, found in paths.items() if found}

    def _find(self, paths: str | list[str], setting: str) -> list[Path]:
        found: list[Path] = []
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            place = Path(path).expanduser()
            if place.is_dir():
                files = sorted(
                    file for file in place.rglob("*") if file.is_file() and set(file.suffixes) & set(self.suffixes)
                )
            else:
                files = (
                    [place] if place.is_file() else sorted(Path(match) for match in glob(str(place), recursive=True))
                )
            if not files:
                raise UserError(f"data.source {setting}: no file {path}")
            found += files
        return found

    def own_splits(self) -> Mapping[str, Any]:
        return self.files

    def content_fingerprint(self) -> str:
        return json.dumps({split: [_file_fingerprint(file) for file in files] for split, files in self.files.items()})

    def read(self, split: str) -> Located:
        for file in self.files[split]:
            yield from self.read_file(file)

    @abstractmethod
    def read_file(self, file: Path) -> Located:
        """Yields the records of one file, each with its place."""


class JsonlSource(FileSource):
    """Records from JSON Lines files, one object a line; ``.gz``, ``.xz`` and ``.bz2`` are read as they are."""

    suffixes = (".jsonl", ".ndjson", ".json")

    def read_file(self, file: Path) -> Located:
        with OPENERS.get(file.suffix, open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except UnicodeDecodeError:
                    record = BadRecord("is not UTF-8")
                except ValueError as error:
                    record = BadRecord(f"is not valid JSON ({error}); each line must be one object")
                yield f"{file}:{number}", record


class ParquetSource(FileSource):
    """Records from Parquet files, one a row."""

    suffixes = (".parquet",)

    def read_file(self, file: Path) -> Located:
        import pyarrow
        import pyarrow.parquet

        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is no Parquet file: {error}") from None
        wanted = {*FIELDS, *self.columns.values()}
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        number = 0
        for batch in parquet.iter_batches(columns=columns or None):
            for record in batch.to_pylist():
                yield f"{file} row {number}", record
                number += 1


class DatasetSource(SplitSource):
    """Records from a Hugging Face dataset: a folder written by ``save_to_disk``, or anything ``load_dataset`` takes.

    Args:
        path: Folder, or hub name such as ``GSAI-ML/some-data``.
        name: Configuration of a hub dataset.
        train_split: What the dataset calls its training split.
        validation_split: What it calls its validation split; carved out of training when it has none of that name.
        test_split: What it calls its test split.
        validation_size: Prompts to carve out for validation: a number, or a share below 1. When not given, 2 % of them,
            at most 1,000.
        test_size: The same for test; none when not given.
        columns: Names our fields have in the dataset, such as ``{prompt: question, response: answer}``.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        validation_size: int | float | None = None,
        test_size: int | float = 0,
        columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__(validation_size, test_size, columns)
        self.path = path
        self.name = name
        self.split_names = dict(zip(SPLITS, (train_split, validation_split, test_split), strict=True))

    @cached_property
    def _datasets(self) -> dict[str, Any]:
        import datasets

        folder = Path(self.path).expanduser()
        saved = (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()
        try:
            loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(self.path, self.name)
        except (
            Exception
        ) as error:  # offline, not found, gated, broken files: many libraries raise through this one call
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"data.source path: no dataset {self.path}: {reason}") from None
        if not isinstance(loaded, dict):
            return {"train": loaded}
        if self.split_names["train"] not in loaded:
            raise UserError(
                f"{self.path} has no split {self.split_names['train']!r}; set train_split to one of {', '.join(loaded)}"
            )
        return {split: loaded[name] for split, name in self.split_names.items() if name in loaded}

    def own_splits(self) -> Mapping[str, Any]:
        return self._datasets

    def content_fingerprint(self) -> str:
        return json.dumps({split: dataset._fingerprint for split, dataset in self._datasets.items()})

    def read(self, split: str) -> Located:
        for number, record in enumerate(self._datasets[split]):
            yield f"{self.path} {self.split_names[split]} row {number}", record


def _file_fingerprint(file: Path) -> list[str | int]:
    """Of small files the content, of large ones size, time and both ends."""
    state = file.stat()
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        digest.update(stream.read(HASHED_WHOLE))
        if state.st_size <= HASHED_WHOLE:
            return [str(file), digest.hexdigest()]
        stream.seek(-HASHED_WHOLE, 2)
        digest.update(stream.read())
    return [str(file), state.st_size, state.st_mtime_ns, digest.hexdigest()]
