"""Sources of records: the base class, splits carved out of training data, and files of JSON Lines or Parquet."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.datamodules.records import FIELDS, prompt_key
from dllm_var.errors import UserError, one_line
from dllm_var.files import naming, remember

SPLITS = ("train", "validation", "test")
LARGE = 2**24  # bytes from which on the digest of a file is kept in the cache

Located = tuple[str, Any]  # a record behind its place, such as data.jsonl:12; a UserError for one that is unreadable
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class Source(ABC):
    """A collection of records in up to three splits.

    A record is a dict in one of five formats: ``{prompt, response}``, ``{instruction, input, output}``, ``{messages}``,
    ``{input_ids, prompt_length}`` or ``{text}``. A subclass implements `records` and `fingerprint`.
    """

    splits: tuple[str, ...] = ("train",)  # those this source has, out of ``train``, ``validation``, ``test``
    default_tokenizer: str | None = None  # folder or name used when the data module is given none
    cache_dir: Path | None = None  # for findings about the data that take long; the data module sets it

    @abstractmethod
    def records(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a split, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever the records may have changed; keys the cache of tokenized data."""

    def located_records(self, split: str) -> Iterator[Located]:
        """Yields each record behind its place (``data.jsonl:12``), a UserError for one that cannot be read."""
        return self.parsed(split, self.unparsed(split))

    def blocks(self, split: str, size: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, list[Located]]]:
        """Yields every `step`-th block of `size` records with its number, from block `first` on.

        So readers share a split, each parsing its own records alone. Blocks are smaller where splits are carved out.
        """
        records = self.unparsed(split)
        for block, chunk in enumerate(iter(lambda: list(islice(records, size)), [])):
            if block >= first and (block - first) % step == 0:
                yield block, list(self.parsed(split, chunk))

    def unparsed(self, split: str) -> Iterator[Located]:
        """Yields what `parsed` makes a record of, such as a line, behind its place."""
        for number, record in enumerate(self.records(split)):
            yield f"{type(self).__name__} {split} record {number}", record

    def parsed(self, split: str, records: Iterable[Located]) -> Iterator[Located]:
        """Yields the records of a split among those that `unparsed` has read."""
        return iter(records)


class SplitSource(Source):
    """A source that comes in splits of its own and may carve missing ones out of its training records.

    A fixed hash of the prompt decides into which split a record goes. Carving reads all of the training records first.

    Args:
        validation_size: Prompts for a validation split the data does not bring, as a number or as a share below 1; when
            not given, 2 % of the prompts, at most 1,000.
        test_size: The same for a test split; None for a size as that of validation.
        columns: Names our fields have in the data, such as ``{prompt: question, response: answer}``.
    """

    own: Mapping[str, Any]  # what the data brings, by split: files, or a dataset

    def __init__(
        self,
        validation_size: int | float | None = None,
        test_size: int | float | None = 0,
        columns: dict[str, str] | None = None,
    ) -> None:
        for name, size in (("validation_size", validation_size), ("test_size", test_size)):
            if size is not None and (size < 0 or (size >= 1 and size != int(size))):
                raise UserError(f"{name} is {size}; give a number of prompts, or a share between 0 and 1")
        if unknown := set(columns or {}) - set(FIELDS):
            raise UserError(f"columns names the field {min(unknown)!r}; fields are {', '.join(FIELDS)}")
        self.validation_size, self.test_size = validation_size, test_size
        self.columns = columns or {}

    @abstractmethod
    def read_own(self, split: str) -> Iterator[Located]:
        """Yields what `parse` makes a record of, for a split the data brings."""

    @property
    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Plain values for each split the data brings, which change when its records do."""

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        sizes = dict(zip(SPLITS, (None, self.validation_size, self.test_size), strict=True))
        return tuple(split for split in SPLITS if split in self.own or sizes[split] != 0)

    def fingerprint(self) -> str:
        settings = [self.validation_size, self.test_size, sorted(self.columns.items()), list(self.splits)]
        return f"{type(self).__name__} {json.dumps(self.content)} {json.dumps(settings)}"

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        return (record for _, record in self.located_records(split) if not isinstance(record, UserError))

    def own_split(self, split: str) -> str:
        """The split of the data that a split is, or is carved out of."""
        return split if split in self.own else "train"

    def unparsed(self, split: str) -> Iterator[Located]:
        return self.read_own(self.own_split(split))

    def parsed(self, split: str, records: Iterable[Located]) -> Iterator[Located]:
        carved = split not in self.own or (split == "train" and not set(self.splits) <= set(self.own))
        for where, unparsed in records:
            record = self.parse(unparsed)
            if not carved or self._carved_into(record) == split:
                yield where, record

    def parse(self, record: Any) -> Any:
        """A record of `read_own` with our names of its fields."""
        if not self.columns or not isinstance(record, dict):
            return record
        renamed = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        return {**{name: value for name, value in record.items() if name not in self.columns}, **renamed}

    def _carved_into(self, record: Any) -> str:
        if isinstance(record, UserError):
            return "train"
        key = prompt_key(record)
        return next((split for split, limit in self._limits.items() if key <= limit), "train")

    @cached_property
    def _limits(self) -> dict[str, int]:
        """Largest prompt key of each carved split, in the order in which they take the smallest keys.

        A test split that was not asked for comes behind validation, which is therefore the same with and without it.
        """
        return remember(self.cache_dir, self.fingerprint(), self._find_limits)

    def _find_limits(self) -> dict[str, int]:
        records = (self.parse(record) for _, record in self.read_own("train"))
        found = (prompt_key(record) for record in records if not isinstance(record, UserError))
        keys = np.unique(np.fromiter(found, dtype=np.uint64))
        limits, used = {}, 0
        sizes = {"test": self.test_size, "validation": self.validation_size}
        for split in sorted(sizes, key=lambda split: split == "test" and self.test_size is None):
            size = sizes[split]
            if split not in self.own:
                if size is None:  # and a prompt is left for training
                    size = max(0, min(1_000, -(-len(keys) // 50), len(keys) - used - 1))
                used += round(size * len(keys)) if size < 1 else int(size)
            limits[split] = int(keys[used - 1]) if 0 < used <= len(keys) else -1
        if used >= len(keys) > 0:
            raise UserError(f"validation_size and test_size take all of the {len(keys)} prompts; leave some")
        return limits


class FileSource(SplitSource):
    """Records from files, a path per split.

    Args:
        path: File, folder or pattern (``data/*.jsonl``) of training records; several in a list.
        validation_path: The same for validation; carved out of training when not given.
        test_path: The same for test.
        test_size: As for `SplitSource`; when not given, 2 % of the prompts, at most 1,000, and none with
            `validation_size` 0, which says that nothing is to be held out.
        kwargs: As for `SplitSource`.
    """

    suffixes: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | list[str],
        validation_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        test_size: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        if test_size is None and kwargs.get("validation_size") == 0:
            test_size = 0
        super().__init__(test_size=test_size, **kwargs)
        paths = {"train": path, "validation": validation_path, "test": test_path}
        self.own = {split: self._find(split, given) for split, given in paths.items() if given is not None}

    def _find(self, split: str, paths: str | list[str]) -> list[Path]:
        found: list[Path] = []
        setting = "path" if split == "train" else f"{split}_path"
        for path in [paths] if isinstance(paths, str | Path) else paths:
            place = Path(os.path.expanduser(path))
            if not str(path):
                files = []
            elif place.is_dir():
                files = [file for file in place.rglob("*") if set(file.suffixes) & set(self.suffixes)]
            elif place.exists():
                files = [place]
            else:  # unlike the module glob, this follows no link to a folder within **, which may lead back
                matches = Path(place.anchor).glob(str(place.relative_to(place.anchor)))
                files = [match for match in matches if not match.name.startswith(".")]
            files = sorted(file for file in files if file.is_file())
            if not files:
                raise UserError(f"data.source {setting}: no file {str(path)!r}")
            found += files
        if not found:
            raise UserError(f"data.source {setting} is an empty list: name a file, or leave it out")
        return found

    @cached_property
    def content(self) -> dict[str, Any]:
        return {split: [file_digest(file, self.cache_dir) for file in files] for split, files in self.own.items()}

    def read_own(self, split: str) -> Iterator[Located]:
        for file in self.own[split]:
            yield from self.read_file(file)

    @abstractmethod
    def read_file(self, file: Path) -> Iterator[Located]:
        """Yields what `parse` makes a record of, for each record of a file."""


class JsonlSource(FileSource):
    """Records from JSON Lines files, one object a line; ``.gz``, ``.xz`` and ``.bz2`` are read as they are."""

    suffixes = (".jsonl", ".ndjson", ".json")

    def read_file(self, file: Path) -> Iterator[Located]:
        try:
            with OPENERS.get(file.suffix, open)(file, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    if not line.isspace():
                        yield f"{file}:{number}", line
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}") from None

    def parse(self, record: bytes) -> Any:
        try:
            return super().parse(json.loads(record))
        except UnicodeDecodeError:
            return UserError("is not UTF-8")
        except (ValueError, RecursionError) as error:
            return UserError(f"is not valid JSON ({error}); each line must be one object")


class ParquetSource(FileSource):
    """Records from Parquet files, one a row."""

    suffixes = (".parquet",)

    def read_file(self, file: Path) -> Iterator[Located]:
        import pyarrow.parquet

        wanted = {*FIELDS, *self.columns.values()}
        row = 0
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            columns = [name for name in parquet.schema_arrow.names if name in wanted]
            for batch in parquet.iter_batches(4_096, columns=columns or None):
                decoded = cache(batch.to_pylist)
                for number in range(len(batch)):
                    yield f"{file} row {row}", (decoded, number)
                    row += 1
        except Exception as error:  # Arrow raises many kinds, when it opens a file and when it comes to damage
            raise UserError(f"{file} cannot be read as Parquet from row {row} on: {one_line(error)}") from None

    def parse(self, record: tuple[Callable[[], list[Any]], int]) -> Any:
        decoded, number = record  # a batch is decoded when the first of its records is wanted
        return super().parse(decoded()[number])


def file_digest(file: Path, cache: Path | None) -> str:
    """The SHA-256 of a file; that of a large file is remembered until its path, size, time or inode changes."""

    def read() -> str:
        digest = hashlib.sha256()
        with naming(file), open(file, "rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
        return digest.hexdigest()

    state = file.stat()
    key = [str(file.absolute()), state.st_size, state.st_mtime_ns, state.st_ino]
    return remember(cache if state.st_size >= LARGE else None, key, read)
