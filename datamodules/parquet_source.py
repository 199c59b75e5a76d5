"""Records from Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.datamodules.records import FIELDS
from dllm_var.datamodules.sources import FileSource, Located
from dllm_var.errors import UserError, one_line


class ParquetSource(FileSource):
    """Records from Parquet files, one a row."""

    suffixes = (".parquet",)

    def can_seek(self, split: str) -> bool:
        return True

    def count(self, file: Path) -> int | None:
        return self._open(file).metadata.num_rows

    def read_file(self, file: Path, start: int = 0) -> Iterator[Located]:
        parquet = self._open(file)
        groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
        ends = np.cumsum([0, *groups])
        first = max(int(np.searchsorted(ends, start, side="right")) - 1, 0)
        wanted = {*FIELDS, *self.columns.values()}
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        row = int(ends[first])
        try:
            for batch in parquet.iter_batches(4_096, list(range(first, len(groups))), columns or None):
                skipped = min(max(start - row, 0), len(batch))
                for number, record in enumerate(batch.slice(skipped).to_pylist(), row + skipped):
                    yield f"{file} row {number}", record
                row += len(batch)
        except Exception as error:  # damage shows when it comes to be read, as many kinds of exception
            raise UserError(f"{file} cannot be read beyond row {row}: {one_line(error)}") from None

    def _open(self, file: Path) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(file)
        except Exception as error:  # Arrow raises many kinds
            raise UserError(f"{file} is no Parquet file: {one_line(error)}") from None
