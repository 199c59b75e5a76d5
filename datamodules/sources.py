"""Sources of records: the base class, splits carved out of training data, and JSON Lines files."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import chain, count, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.datamodules.records import FIELDS, BadRecord, prompt_key
from dllm_var.datamodules.table import seal, unseal
from dllm_var.errors import UserError, one_line
from dllm_var.files import write_atomically

SPLITS = ("train", "validation", "test")
LARGE = 2**24  # bytes from which on the digest of a file is kept in the cache
STRIDE = 4_096  # records between the places in a file that are noted

Located = tuple[str, Any]  # a record, or a `BadRecord`, behind its place, such as data.jsonl:12
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
        """Yields every `step`-th block of `size` records with its number, from block `first` on.

        So several readers share a split. A block of a split that is carved out of the training data has fewer records:
        those of the other split are left out of it.
        """
        records = self.read(split, first * size)
        for block in count(first, step):
            if not (chunk := list(islice(records, size))):
                return
            yield block, [located for located in chunk if located is not None]
            if step > 1 and self.can_seek(split):
                records = self.read(split, (block + step) * size)
            elif skipped := (step - 1) * size:
                next(islice(records, skipped, skipped), None)

    def read(self, split: str, start: int = 0) -> Iterator[Located | None]:
        """Yields located records from the one with the number `start` on; None for those of a split carved out."""
        return islice(self.located_records(split), start, None)

    def can_seek(self, split: str) -> bool:
        """Whether `read` finds its first record without reading all before it."""
        return False


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
    def read_own(self, split: str, start: int = 0) -> Iterator[Located]:
        """Yields the records of a split the data brings, from the one with the number `start` on."""

    @abstractmethod
    def content_fingerprint(self) -> str:
        """A string that changes when the data does."""

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        sizes = {"train": 1, "validation": 1 if self.validation_size is None else self.validation_size}
        sizes["test"] = self.test_size
        return tuple(split for split in SPLITS if split in self.own_splits() or sizes[split])

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        return (record for _, record in self.located_records(split) if not isinstance(record, BadRecord))

    def located_records(self, split: str) -> Iterator[Located]:
        return (located for located in self.read(split) if located is not None)

    def read(self, split: str, start: int = 0) -> Iterator[Located | None]:
        own = self.own_splits()
        carved = split not in own or (split == "train" and not set(self.splits) <= set(own))
        for where, record in self.read_own(self.own_split(split), start):
            record = self.renamed(record)
            yield (where, record) if not carved or self._carved_into(record) == split else None

    def own_split(self, split: str) -> str:
        """The split of the data that a split is, or is carved out of."""
        return split if split in self.own_splits() else "train"

    def fingerprint(self) -> str:
        settings = [self.validation_size, self.test_size, sorted(self.columns.items()), list(self.splits)]
        return f"{type(self).__name__} {self.content_fingerprint()} {json.dumps(settings)}"

    def renamed(self, record: Any) -> Any:
        """The record with our names of its fields."""
        if not self.columns or not isinstance(record, dict):
            return record
        renamed = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        return {**{name: value for name, value in record.items() if name not in self.columns}, **renamed}

    def _carved_into(self, record: Any) -> str:
        if isinstance(record, BadRecord):
            return "train"
        key = prompt_key(record)
        return next((split for split in ("test", "validation") if key <= self._limits[split]), "train")

    @cached_property
    def _limits(self) -> dict[str, int]:
        """Largest prompt key of each carved split: test takes the smallest keys, validation the next."""
        return remember(self.cache_dir, "splits", self.fingerprint(), self._find_limits)

    def _find_limits(self) -> dict[str, int]:
        records = (self.renamed(record) for _, record in self.read_own("train"))
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
        kwargs: As for `SplitSource`.
    """

    suffixes: tuple[str, ...] = ()
    by_line = False  # whether records are lines, which can be counted without parsing them

    def __init__(
        self,
        path: str | list[str],
        validation_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._contents: dict[Path, dict[str, Any]] = {}
        self._ends: dict[str, list[int]] = {}  # number of records up to the end of each file of a split
        self.files = {"train": self._find(path, "path")}
        for split, paths in (("validation", validation_path), ("test", test_path)):
            if paths is not None:
                self.files[split] = self._find(paths, f"{split}_path")

    def _find(self, paths: str | list[str], setting: str) -> list[Path]:
        found: list[Path] = []
        for path in [paths] if isinstance(paths, str | Path) else paths:
            try:
                files = self._matching(Path(path).expanduser()) if str(path) else []
                other = next((file for file in files if not file.is_file()), None)
            except (OSError, ValueError, RuntimeError) as error:  # an impossible name, no home folder
                reason = getattr(error, "strerror", None) or one_line(error)
                raise UserError(f"data.source {setting}: {str(path)[:200]!r} cannot be read: {reason}") from None
            if other is not None:  # such as a pipe, but data is read more than once
                raise UserError(f"data.source {setting}: {other} is no regular file, or a broken link")
            if not files:
                raise UserError(f"data.source {setting}: no file {str(path)!r}")
            found += files
        if not found:
            raise UserError(f"data.source {setting} is an empty list: name a file, or leave it out")
        return found

    def _matching(self, place: Path) -> list[Path]:
        if place.is_dir():
            files = (file for file in place.rglob("*") if set(file.suffixes) & set(self.suffixes) and file.is_file())
            return sorted(files)
        if place.exists() or place.is_symlink():
            return [place]
        # Unlike the module glob, this follows no link to a folder within **, which may lead back.
        matches = Path(place.anchor).glob(str(place.relative_to(place.anchor)))
        return sorted(match for match in matches if not match.name.startswith("."))

    def own_splits(self) -> Mapping[str, Any]:
        return self.files

    def content_fingerprint(self) -> str:
        return json.dumps(
            {split: [self.contents(file)["digest"] for file in self.files[split]] for split in self.files}
        )

    def contents(self, file: Path) -> dict[str, Any]:
        """The digest of a file, and where it has lines their number and places; read once."""
        if file not in self._contents:
            self._contents[file] = read_contents(file, self.cache_dir, self.by_line and file.suffix not in OPENERS)
        return self._contents[file]

    def count(self, file: Path) -> int | None:
        """Number of records in a file that can be read from any of them on; None for others."""
        return self.contents(file).get("records")

    def can_seek(self, split: str) -> bool:
        return all(self.count(file) is not None for file in self.files[self.own_split(split)])

    def read_own(self, split: str, start: int = 0) -> Iterator[Located]:
        files = self.files[split]
        if not start or not self.can_seek(split):
            return islice(chain.from_iterable(map(self.read_file, files)), start, None)
        if split not in self._ends:
            self._ends[split] = np.cumsum([self.count(file) for file in files]).tolist()
        ends = self._ends[split]
        first = bisect_right(ends, start)
        start -= ends[first - 1] if first else 0
        return chain.from_iterable(map(self.read_file, files[first:], chain([start], repeat(0))))

    @abstractmethod
    def read_file(self, file: Path, start: int = 0) -> Iterator[Located]:
        """Yields the records of one file; from the one with the number `start` on, where it has a `count`."""


class JsonlSource(FileSource):
    """Records from JSON Lines files, one object a line; ``.gz``, ``.xz`` and ``.bz2`` are read as they are."""

    suffixes = (".jsonl", ".ndjson", ".json")
    by_line = True

    def read_file(self, file: Path, start: int = 0) -> Iterator[Located]:
        record, number, offset = 0, 0, 0
        if start:
            places = self.contents(file)["places"]
            record, number, offset = places[bisect_right(places, start, key=itemgetter(0)) - 1]
        try:
            with OPENERS.get(file.suffix, open)(file, "rb") as stream:
                stream.seek(offset)
                lines = ((at, line) for at, line in enumerate(stream, number + 1) if not line.isspace())
                for at, line in islice(lines, start - record, None):
                    yield f"{file}:{at}", _parse(line)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}") from None


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return BadRecord("is not UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"is not valid JSON ({error}); each line must be one object")


def read_contents(file: Path, cache: Path | None, lines: bool = False) -> dict[str, Any]:
    """Returns the SHA-256 ``digest`` of a file; a large file is read once, until its path, size, time or inode changes.

    Where records are lines of uncompressed text, it also returns the number of ``records``, which are lines that are
    not blank, and ``places``: of every `STRIDE`-th record its number, its line's number and the byte where it begins.

    Raises:
        UserError: When the file cannot be read.
    """
    try:
        state = file.stat()
        key = [str(file.absolute()), state.st_size, state.st_mtime_ns, state.st_ino, lines, STRIDE]
        return remember(cache if state.st_size >= LARGE else None, "files", key, lambda: _read(file, lines))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def _read(file: Path, lines: bool) -> dict[str, Any]:
    digest = hashlib.sha256()
    places: list[list[int]] = []
    records = offset = 0
    with open(file, "rb") as stream:
        for number, part in enumerate(stream if lines else iter(lambda: stream.read(2**20), b"")):
            digest.update(part)
            if lines and not part.isspace():
                if records % STRIDE == 0:
                    places.append([records, number, offset])
                records += 1
            offset += len(part)
    return {"digest": digest.hexdigest(), **({"records": records, "places": places} if lines else {})}


def remember(cache: Path | None, kind: str, key: Any, find_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the finding that the cache has for a key of plain values, or finds it out and keeps it if it can."""
    if cache is None:
        return find_out()
    path = cache / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):  # missing or damaged
        return unseal(path.read_text(encoding="utf-8"))
    found = find_out()
    with contextlib.suppress(OSError), write_atomically(path, shared=True) as partial:
        partial.write_text(seal(found), encoding="utf-8")
    return found
