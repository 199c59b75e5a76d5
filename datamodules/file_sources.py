"""Records from JSON Lines and Parquet files."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any

from dllm_var.datamodules.sources import FIELDS, BadRecord, Located, SplitSource
from dllm_var.errors import UserError

HASHED_WHOLE = 2**24  # bytes up to which a file's fingerprint covers all of its content
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
        for number, line in enumerate(_read_lines(file), 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except UnicodeDecodeError:
                    record = BadRecord("is not UTF-8")
                except (ValueError, RecursionError) as error:
                    record = BadRecord(f"is not valid JSON ({error}); each line must be one object")
                yield f"{file}:{number}", record


def _read_lines(file: Path) -> Iterator[bytes]:
    try:
        with OPENERS.get(file.suffix, open)(file, "rb") as lines:
            yield from lines
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {_one_line(error)}") from None


class ParquetSource(FileSource):
    """Records from Parquet files, one a row."""

    suffixes = (".parquet",)

    def read_file(self, file: Path) -> Located:
        import pyarrow.parquet

        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            wanted = {*FIELDS, *self.columns.values()}
            columns = [name for name in parquet.schema_arrow.names if name in wanted]
            batches = parquet.iter_batches(columns=columns or None)
        except Exception as error:  # Arrow raises many kinds
            raise UserError(f"{file} is no Parquet file: {_one_line(error)}") from None
        number = 0
        while True:
            try:
                batch = next(batches, None)
                records = batch.to_pylist() if batch is not None else []
            except Exception as error:  # damage shows when it comes to be read
                raise UserError(f"{file} cannot be read beyond row {number}: {_one_line(error)}") from None
            if batch is None:
                return
            for record in records:
                yield f"{file} row {number}", record
                number += 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
