"""Tokenized samples as a few flat arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Table:
    """Tokenized samples; sample k is ``offsets[k]:offsets[k + 1]`` of `tokens` and ends with a supervised terminator.

    Args:
        tokens: Token ids, shape [tokens].
        supervised: Whether each token carries loss, shape [tokens].
        offsets: Where samples begin, and where the last one ends, shape [samples + 1].
        answer_start: Position within each sample where its last answer begins, shape [samples].
        record: Number of the record each sample was made from, shape [samples].
        meta: ``records`` seen, how many were ``skipped`` and the first ``reasons``, ``unknown_tokens``, ``dtype``.
        folder: Where the arrays are mapped from, if they are.
    """

    tokens: NDArray[np.integer[Any]]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    answer_start: NDArray[np.int64]
    record: NDArray[np.int64]
    meta: dict[str, Any]
    folder: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> Table:
        """Maps the files of a table into memory.

        Args:
            folder: Written by `dllm_var.datamodules.cache.load_table`.
        """
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        columns = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "answer_start", "record")
        }
        if len(columns["record"]):
            tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
            supervised = np.memmap(folder / "supervised.bin", dtype=np.bool_, mode="r")
            return cls(tokens, supervised, **columns, meta=meta, folder=folder)
        # An empty file cannot be mapped.
        return cls(np.empty(0, meta["dtype"]), np.empty(0, np.bool_), **columns, meta=meta, folder=folder)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.record)

    def __reduce__(self) -> Any:  # worker processes map the files too, instead of getting a copy
        return super().__reduce__() if self.folder is None else (Table.open, (self.folder,))

    def ids(self, sample: int) -> list[int]:
        """Token ids of one sample."""
        return self.tokens[self.offsets[sample] : self.offsets[sample + 1]].tolist()
