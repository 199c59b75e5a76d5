"""Records from Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from dllm_var.datamodules.records import FIELDS
from dllm_var.datamodules.sources import FileSource, Unparsed, one_line
from dllm_var.errors import UserError


class ParquetSource(FileSource):
    """Records from Parquet files, one a row."""

    suffixes = (".parquet",)

    def count(self, file: Path) -> int | None:
        return self._open(file).metadata.num_rows

    def read_file(self, file: Path, start: int) -> Iterator[Unparsed]:
        parquet = self._open(file)
        wanted = {*FIELDS, *self.columns.values()}
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        number = group = 0
        groups = parquet.metadata.num_row_groups
        while group < groups and number + (rows := parquet.metadata.row_group(group).num_rows) <= start:
            number, group = number + rows, group + 1
        batches = parquet.iter_batches(columns=columns or None, row_groups=list(range(group, groups)))
        while (batch := _read_rows(file, number, lambda: next(batches, None))) is not None:
            rows = cache(batch.to_pylist)
            for row in range(max(start - number, 0), batch.num_rows):
                yield partial(_parse_row, file, number, row, rows)
            number += batch.num_rows

    def _open(self, file: Path) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(file)
        except Exception as error:  # Arrow raises many kinds
            raise UserError(f"{file} is no Parquet file: {one_line(error)}") from None


def _parse_row(file: Path, first: int, row: int, rows: Callable[[], list[Any]]) -> tuple[str, Any]:
    return f"{file} row {first + row}", _read_rows(file, first, rows)[row]


def _read_rows(file: Path, row: int, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # damage shows when it comes to be read
        raise UserError(f"{file} cannot be read beyond row {row}: {one_line(error)}") from None
