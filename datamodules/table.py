"""The tokenized table: all samples of a split in a few flat arrays, on disk with checksums."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_var.errors import UserError, one_line
from dllm_var.text.tokenizer import Tokenizer

COLUMNS = {"tokens": None, "supervised": "bool", "offsets": "int64", "answer_start": "int64"}
"""Files of a table and the types in them; the tokens' own is in ``meta.json``."""

HELD_OUT_SEED = 0  # held-out rows and examples are the same whatever the training seed


@dataclass(frozen=True)
class Example:
    """A held-out prompt with every answer the data has for it."""

    prompt: str
    prompt_ids: list[int]
    references: list[list[int]] = field(default_factory=list)  # token ids of the answers, without terminator


@dataclass(frozen=True)
class Table:
    """Tokenized samples; sample k is ``offsets[k]:offsets[k + 1]`` of `tokens` and ends with a supervised terminator.

    `meta` has the number of ``records`` seen, how many were ``skipped`` and the first ``reasons``, ``unknown_tokens``,
    ``dtype``; on disk also the checksum of each column.
    """

    tokens: NDArray[np.integer[Any]]  # token ids, shape [tokens]
    supervised: NDArray[np.bool_]  # whether each token carries loss, shape [tokens]
    offsets: NDArray[np.int64]  # where samples begin, and where the last one ends, shape [samples + 1]
    answer_start: NDArray[np.int64]  # position within each sample where its last answer begins, shape [samples]
    meta: dict[str, Any]
    folder: Path | None = None  # where the arrays are mapped from, if they are

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Table:
        """Maps the files of a table into memory; `verify` compares their checksums, at some gigabyte per second.

        Raises UserError when a file is missing or damaged.
        """
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            columns = {name: _map(folder / f"{name}.bin", dtype or meta["dtype"]) for name, dtype in COLUMNS.items()}
            for name, column in columns.items():
                if verify and zlib.crc32(column.data) != meta["crc32"][name]:
                    raise ValueError(f"{name}.bin is not as it was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"tokenized data is damaged ({one_line(error)}): delete {folder}, it is made again"
            ) from None
        return cls(**columns, meta=meta, folder=folder)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.answer_start)

    def __reduce__(self) -> Any:  # worker processes map the files too, instead of getting a copy
        return super().__reduce__() if self.folder is None else (Table.open, (self.folder, False))

    def ids(self, sample: int) -> list[int]:
        """Token ids of one sample."""
        return self.tokens[self.offsets[sample] : self.offsets[sample + 1]].tolist()

    def examples(self, tokenizer: Tokenizer, n: int | None = None) -> list[Example]:
        """`n` prompts, or all, with all their answers, in a fixed random order; samples without one are left out."""
        by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
        for sample in np.random.default_rng(HELD_OUT_SEED).permutation(len(self)).tolist():
            ids, start = self.ids(sample), int(self.answer_start[sample])
            if start:
                by_prompt.setdefault(tuple(ids[:start]), []).append(ids[start:-1])
        first = list(by_prompt.items())[:n]
        return [Example(tokenizer.decode(prompt), list(prompt), answers) for prompt, answers in first]


def _map(path: Path, dtype: str) -> NDArray[Any]:
    """A plain array over the pages of a file, which is indexed faster than a memmap; an empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
