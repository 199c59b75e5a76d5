"""Sources of records: the base class, splits carved out of training data, and JSON Lines files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import stat
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import count, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.datamodules.cache import read_contents, remember
from dllm_var.datamodules.records import FIELDS, BadRecord, prompt_key
from dllm_var.errors import UserError

SPLITS = ("train", "validation", "test")

Located = tuple[str, "dict[str, Any] | BadRecord"]  # a record behind its place, such as data.jsonl:12
Unparsed = Callable[[], tuple[str, Any]]  # parses one record that was read; returns its place and the record
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


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

    cache_dir: Path | None = None
    """Folder for findings about the data that take long; the data module sets it."""

    @abstractmethod
    def records(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a split, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever the records may have changed; keys the cache of tokenized data."""

    def located_records(self, split: str) -> Iterator[Located]:
        """Yields each record behind its place (``data.jsonl:12``), unreadable ones as `BadRecord`."""
        for number, record in enumerate(self.records(split)):
            yield f"{type(self).__name__} {split} record {number}", record

    def blocks(self, split: str, size: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, list[Located]]]:
        """Yields every `step`-th block of located records with its number; several readers share a split so.

        Args:
            split: One of the splits.
            size: Records in a block; the last one may have fewer.
            first: Number of the first block to read, counted from the first record.
            step: 1 for every block.
        """
        records = self.located_records(split)
        _skip(records, first * size)
        for block in count(first, step):
            if not (chunk := list(islice(records, size))):
                return
            yield block, chunk
            _skip(records, (step - 1) * size)


class SplitSource(Source):
    """A source that comes in splits of its own and may carve missing ones out of its training records.

    Records with the same prompt always go into the same split, decided by a fixed hash of the prompt. Carving reads all
    of the training records first, so a stream should bring its own splits.

    Args:
        validation_size: Prompts for a validation split the data does not bring: a number, or a fraction below 1. When
            not given, 2 % of the prompts, at most 1,000.
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
    def read(self, split: str, start: int = 0) -> Iterator[Unparsed]:
        """Yields the records of a split the data brings, from a given one on, yet to be parsed."""

    @abstractmethod
    def content_fingerprint(self) -> str:
        """A string that changes when the data does."""

    def can_seek(self, split: str) -> bool:
        """Whether `read` finds its first record without reading those before it."""
        return False

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

    def located_records(self, split: str) -> Iterator[Located]:
        return self._of_split(split, self.read(self._within(split)))

    def blocks(self, split: str, size: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, list[Located]]]:
        """Blocks are counted in the split that the data brings: where another is carved out of it they have fewer."""
        own = self._within(split)
        records = self.read(own, first * size)
        for block in count(first, step):
            if not (chunk := list(islice(records, size))):
                return
            yield block, list(self._of_split(split, chunk))
            if step > 1 and self.can_seek(own):
                records = self.read(own, (block + step) * size)
            else:
                _skip(records, (step - 1) * size)

    def fingerprint(self) -> str:
        settings = [self.validation_size, self.test_size, sorted(self.columns.items()), list(self.splits)]
        return f"{type(self).__name__} {self.content_fingerprint()} {json.dumps(settings)}"

    def _within(self, split: str) -> str:
        """The split of the data that a split is, or is carved out of."""
        return split if split in self.own_splits() else "train"

    def _of_split(self, split: str, records: Any) -> Iterator[Located]:
        """Parses records of the data, and yields those that belong to a split."""
        own = self.own_splits()
        carved = split not in own or (split == "train" and not set(self.splits) <= set(own))
        for parse in records:
            where, record = parse()
            record = self._renamed(record)
            if not carved or self._carved_into(record) == split:
                yield where, record

    def _carved_into(self, record: Any) -> str:
        if isinstance(record, BadRecord):
            return "train"
        key = prompt_key(record)
        return next((split for split in ("test", "validation") if key <= self._limits[split]), "train")

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
        records = (self._renamed(parse()[1]) for parse in self.read("train"))
        found = (prompt_key(record) for record in records if not isinstance(record, BadRecord))
        keys = np.unique(np.fromiter(found, dtype=np.uint64))
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
        validation_size: Prompts to carve out for validation: a number, or a fraction below 1. When not given, 2 % of
            them, at most 1,000.
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
        self._contents: dict[Path, dict[str, Any]] = {}
        self.files = {"train": self._find(path, "path")}
        for split, paths in (("validation", validation_path), ("test", test_path)):
            if paths is not None:
                self.files[split] = self._find(paths, f"{split}_path")

    def _find(self, paths: str | list[str], setting: str) -> list[Path]:
        found: list[Path] = []
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            try:
                files = self._matching(Path(path).expanduser()) if str(path) else []
                # Data is read more than once, which a pipe does not allow.
                other = next((file for file in files if not stat.S_ISREG(file.stat().st_mode)), None)
            except (OSError, ValueError, RuntimeError) as error:  # also a loop of links, an impossible name, no home
                reason = getattr(error, "strerror", None) or one_line(error)
                raise UserError(f"data.source {setting}: {str(path)[:200]!r} cannot be read: {reason}") from None
            if other is not None:
                raise UserError(f"data.source {setting}: {other} is no regular file")
            if not files:
                raise UserError(f"data.source {setting}: no file {str(path)!r}")
            found += files
        if not found:
            raise UserError(f"data.source {setting} is an empty list; name a file, or leave it out")
        return found

    def _matching(self, place: Path) -> list[Path]:
        files: Iterator[Path]
        if place.is_dir():
            files = (file for file in place.rglob("*") if set(file.suffixes) & set(self.suffixes) and file.is_file())
        elif place.exists() or place.is_symlink():
            files = iter([place])
        else:  # unlike the module glob, this follows no link to a folder within **, which may lead back
            matches = Path(place.anchor).glob(str(place.relative_to(place.anchor)))
            files = (match for match in matches if not match.name.startswith("."))
        return sorted(files)

    def own_splits(self) -> Mapping[str, Any]:
        return self.files

    def content_fingerprint(self) -> str:
        digests = {split: [self.contents(file)["digest"] for file in files] for split, files in self.files.items()}
        return json.dumps(digests)

    def contents(self, file: Path) -> dict[str, Any]:
        """Digest of a file, and where lines have them its number of records and their places; read once."""
        if file not in self._contents:
            self._contents[file] = read_contents(file, self.cache_dir, self.has_lines(file))
        return self._contents[file]

    def has_lines(self, file: Path) -> bool:
        """Whether records are lines that can be counted in the bytes of the file."""
        return False

    def can_seek(self, split: str) -> bool:
        return all(self.count(file) is not None for file in self.files[split])

    def read(self, split: str, start: int = 0) -> Iterator[Unparsed]:
        for file in self.files[split]:
            records = self.count(file) if start else 0
            if records is None:  # it has to be read to be counted
                for parse in self.read_file(file, 0):
                    if start:
                        start -= 1
                    else:
                        yield parse
            elif start and records <= start:
                start -= records
            else:
                yield from self.read_file(file, start)
                start = 0

    @abstractmethod
    def count(self, file: Path) -> int | None:
        """Number of records in a file; None when only reading it would tell."""

    @abstractmethod
    def read_file(self, file: Path, start: int) -> Iterator[Unparsed]:
        """Yields the records of one file from the given one on, yet to be parsed."""


class JsonlSource(FileSource):
    """Records from JSON Lines files, one object a line; ``.gz``, ``.xz`` and ``.bz2`` are read as they are."""

    suffixes = (".jsonl", ".ndjson", ".json")

    def has_lines(self, file: Path) -> bool:
        return file.suffix not in OPENERS

    def count(self, file: Path) -> int | None:
        return self.contents(file).get("records")

    def read_file(self, file: Path, start: int) -> Iterator[Unparsed]:
        places = self.contents(file).get("places", []) if start else []
        before = bisect_right(places, start, key=itemgetter(0))
        record, number, offset = places[before - 1] if before else (0, 0, 0)
        lines = ((at, line) for at, line in enumerate(_read_lines(file, offset), number + 1) if not line.isspace())
        return (partial(_parse_line, file, at, line) for at, line in islice(lines, start - record, None))


def _parse_line(file: Path, number: int, line: bytes) -> tuple[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        record = BadRecord("is not UTF-8")
    except (ValueError, RecursionError) as error:
        record = BadRecord(f"is not valid JSON ({error}); each line must be one object")
    return f"{file}:{number}", record


def _read_lines(file: Path, offset: int) -> Iterator[bytes]:
    try:
        with OPENERS.get(file.suffix, open)(file, "rb") as lines:
            if offset:
                lines.seek(offset)
            yield from lines
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None


def _skip(records: Iterator[Any], number: int) -> None:
    next(islice(records, number, number), None)


def one_line(error: Exception) -> str:
    """The message of an exception, or its type when it has none."""
    return " ".join(str(error).split()) or type(error).__name__
