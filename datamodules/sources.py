"""Where records come from: the base class that every source extends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadRecord:
    """Stands in the stream for a record that could not even be read.

    Args:
        reason: what is wrong with it.
    """

    reason: str


class Source(ABC):
    """A collection of records in up to three splits.

    A record is a dict in one of five formats: ``{prompt, response}``, ``{instruction, input, output}``, ``{messages}``,
    ``{input_ids, prompt_length}`` or ``{text}``. A subclass implements `records` and `fingerprint`; the rest has defaults.
    """

    splits: tuple[str, ...] = ("train",)
    """Splits this source has, out of ``train``, ``validation``, ``test``."""

    default_tokenizer: str | None = None
    """Tokenizer folder or name used when the data module is given none."""

    @abstractmethod
    def records(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a split, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever the records may have changed; keys the cache of tokenized data."""

    def located_records(self, split: str) -> Iterator[tuple[str, dict[str, Any] | BadRecord]]:
        """Yields each record with where it stands (``data.jsonl:12``), unreadable ones as `BadRecord`."""
        for number, record in enumerate(self.records(split)):
            yield f"{type(self).__name__} {split} record {number}", record
