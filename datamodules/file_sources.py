"""Records from JSON Lines and Parquet files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import stat
import zlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from dllm_var.datamodules.contents import Contents, read_contents
from dllm_var.datamodules.readers import FilesReader, Reader
from dllm_var.datamodules.sources import FIELDS, BadRecord, Located, SplitSource
from dllm_var.errors import UserError

Parse = Callable[[], tuple[str, Any]]  # makes a record, with its place, of what was read
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


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
        self._contents: dict[Path, Contents] = {}
        self.files = {split: self._find(found, settings[split]) for split, found in paths.items() if found is not None}

    def _find(self, paths: str | list[str], setting: str) -> list[Path]:
        found: list[Path] = []
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            try:
                files = self._files(Path(path).expanduser()) if str(path) else []
                for file in files:
                    # Data is read more than once, and never waited for as a pipe would be.
                    if not stat.S_ISREG(file.stat().st_mode):
                        raise UserError(f"data.source {setting}: {file} is no regular file")
            except (OSError, ValueError, RuntimeError) as error:  # also a loop of links, or a name that none can have
                if isinstance(error, UserError):
                    raise
                reason = getattr(error, "strerror", None) or _one_line(error)
                raise UserError(f"data.source {setting}: {str(path)[:200]!r} cannot be read: {reason}") from None
            if not files:
                raise UserError(f"data.source {setting}: no file {str(path)!r}")
            found += files
        if not found:
            raise UserError(f"data.source {setting} is an empty list; name a file, or leave it out")
        return found

    def _files(self, place: Path) -> list[Path]:
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
        digests = {split: [self.contents(file).digest for file in files] for split, files in self.files.items()}
        return json.dumps(digests)

    def contents(self, file: Path) -> Contents:
        """What is in a file, as this source first found it."""
        if file not in self._contents:
            self._contents[file] = read_contents(file, self.cache_dir, self.has_lines(file))
        return self._contents[file]

    def has_lines(self, file: Path) -> bool:
        """Says whether records are lines that can be counted in the bytes of the file."""
        return False

    def read(self, split: str) -> Located:
        return (parse() for file in self.files[split] for parse in self.read_file(file, 0))

    def reader(self, split: str) -> Reader:
        files = self.files[split]
        return FilesReader([self.count(file) for file in files], lambda file, start: self.read_file(files[file], start))

    @abstractmethod
    def count(self, file: Path) -> int:
        """Number of records in a file; negative when nothing but reading it would tell."""

    @abstractmethod
    def read_file(self, file: Path, start: int) -> Iterator[Parse]:
        """Yields the records of one file from the given one on, yet to be parsed."""


class JsonlSource(FileSource):
    """Records from JSON Lines files, one object a line; ``.gz``, ``.xz`` and ``.bz2`` are read as they are."""

    suffixes = (".jsonl", ".ndjson", ".json")

    def has_lines(self, file: Path) -> bool:
        return file.suffix not in OPENERS

    def count(self, file: Path) -> int:
        return self.contents(file).records

    def read_file(self, file: Path, start: int) -> Iterator[Parse]:
        places = self.contents(file).places if start else []
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
        raise UserError(f"{file} cannot be read: {_one_line(error)}") from None


class ParquetSource(FileSource):
    """Records from Parquet files, one a row."""

    suffixes = (".parquet",)

    def count(self, file: Path) -> int:
        return self._open(file).metadata.num_rows

    def read_file(self, file: Path, start: int) -> Iterator[Parse]:
        parquet = self._open(file)
        wanted = {*FIELDS, *self.columns.values()}
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        number = group = 0
        groups = parquet.metadata.num_row_groups
        while group < groups and number + (rows := parquet.metadata.row_group(group).num_rows) <= start:
            number, group = number + rows, group + 1
        batches = parquet.iter_batches(columns=columns or None, row_groups=list(range(group, groups)))
        while (batch := _told(file, number, lambda: next(batches, None))) is not None:
            rows = cache(batch.to_pylist)
            for row in range(max(start - number, 0), batch.num_rows):
                yield partial(_parse_row, file, number, row, rows)
            number += batch.num_rows

    def _open(self, file: Path) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(file)
        except Exception as error:  # Arrow raises many kinds
            raise UserError(f"{file} is no Parquet file: {_one_line(error)}") from None


def _parse_row(file: Path, first: int, row: int, rows: Callable[[], list[Any]]) -> tuple[str, Any]:
    return f"{file} row {first + row}", _told(file, first, rows)[row]


def _told(file: Path, row: int, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # damage shows when it comes to be read
        raise UserError(f"{file} cannot be read beyond row {row}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
