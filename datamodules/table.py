"""The tokenized table: all samples of a split in a few flat arrays, on disk with checksums."""

from __future__ import annotations

import hashlib
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
    ``dtype``; on disk also how many ``samples`` and ``tokens`` there are.
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

        Raises:
            UserError: When a file is missing, has another length or another checksum.
        """
        try:
            meta = unseal((folder / "meta.json").read_text(encoding="utf-8"))
            lengths = dict.fromkeys(COLUMNS, meta["samples"])
            lengths |= {"tokens": meta["tokens"], "supervised": meta["tokens"], "offsets": meta["samples"] + 1}
            columns = {
                name: _map(folder / f"{name}.bin", np.dtype(dtype or meta["dtype"]), lengths[name])
                for name, dtype in COLUMNS.items()
            }
            changed = [name for name in COLUMNS if verify and zlib.crc32(columns[name].data) != meta["crc32"][name]]
            if changed:
                raise ValueError(f"{changed[0]}.bin is not as it was written")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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


def seal(values: dict[str, Any]) -> str:
    """Returns plain values as JSON text with a checksum."""
    checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "seal": checksum}, indent=1)


def unseal(text: str) -> dict[str, Any]:
    """Returns the values of `seal`; raises ValueError when the text is not as it was written."""
    values = json.loads(text)
    if not isinstance(values, dict) or seal({name: values[name] for name in values if name != "seal"}) != text:
        raise ValueError("its description is not as it was written")
    return values


def _map(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    size = path.stat().st_size
    if size != length * dtype.itemsize:
        raise ValueError(f"{path.name} has {size:,} bytes instead of {length * dtype.itemsize:,}")
    # An empty file cannot be mapped; a plain array over the same pages is indexed faster than a memmap.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if length else np.empty(0, dtype)
