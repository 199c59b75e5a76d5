"""Tokenized samples in a few flat files, built once and memory-mapped by every process."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dllm_var.datamodules.records import Chat, Ids, RecordError, Turns, parse_record
from dllm_var.datamodules.sources import BadRecord, Located, Source
from dllm_var.errors import UserError
from dllm_var.tokenization import Tokenizer

VERSION = 1  # of the files' layout and meaning; part of the cache key
CHUNK = 4_096  # records tokenized at a time
REASONS_KEPT = 5
PROGRESS_AFTER = 5.0  # seconds of tokenizing before progress is shown

Runs = list[tuple[list[int], bool]]  # token ids, and whether they carry loss


class Table:
    """Tokenized samples of one split as flat memory-mapped arrays.

    Sample k is ``offsets[k]:offsets[k + 1]`` of `tokens` and `supervised`, and ends with a supervised terminator.

    Args:
        folder: Written by `load_table`.
    """

    tokens: NDArray[np.integer[Any]]
    """Token ids, shape [tokens]."""
    supervised: NDArray[np.bool_]
    """Whether each token carries loss, shape [tokens]."""
    offsets: NDArray[np.int64]
    """Where samples begin, and where the last one ends, shape [samples + 1]."""
    answer_start: NDArray[np.int64]
    """Position within each sample where its last answer begins, shape [samples]."""
    record: NDArray[np.int64]
    """Number of the record each sample was made from, shape [samples]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if len(self):
            self.tokens = np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r")
            self.supervised = np.memmap(folder / "supervised.bin", dtype=np.bool_, mode="r")
        else:  # an empty file cannot be mapped
            self.tokens, self.supervised = np.empty(0, self.meta["dtype"]), np.empty(0, np.bool_)
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.answer_start = np.load(folder / "answer_start.npy", mmap_mode="r")
        self.record = np.load(folder / "record.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Number of samples."""
        return self.meta["samples"]

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes map the files too, instead of getting a copy
        return Table, (self.folder,)

    def ids(self, sample: int) -> list[int]:
        """Token ids of one sample."""
        return self.tokens[self.offsets[sample] : self.offsets[sample + 1]].tolist()


def load_table(
    source: Source, split: str, tokenizer: Tokenizer, cache: Path, chat: bool = False, skip_bad: bool = False
) -> Table:
    """Opens the tokenized table of a split, building it first if the cache has none.

    Several processes may do so at once: each writes a folder of its own, and the first to finish gives it its name.

    Args:
        source: Where the records come from.
        split: One of the source's splits.
        tokenizer: Makes token ids of them.
        cache: Folder of tables, shared by runs and processes.
        chat: Whether prompt and answer go through the tokenizer's chat template.
        skip_bad: Whether records that cannot be used are counted instead of being an error.

    Raises:
        UserError: When a record cannot be used, with its place; or when the cache cannot be written.
    """
    settings = {"version": VERSION, "source": source.fingerprint(), "tokenizer": tokenizer.fingerprint, "chat": chat}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"{key}-{split}"
    if not (folder / "meta.json").is_file():
        try:
            _build(source, split, tokenizer, folder, chat, skip_bad)
        except OSError as error:
            raise UserError(f"cannot keep tokenized data in {cache}: {error}; set data.cache_dir") from None
    table = Table(folder)
    if table.meta["skipped"] and not skip_bad:  # built by a run that skipped them
        raise _bad_record(table.meta["reasons"][0])
    return table


def _build(source: Source, split: str, tokenizer: Tokenizer, folder: Path, chat: bool, skip_bad: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # others may share the cache
        _Writer(tokenizer, unfinished, chat, skip_bad).write(source.located_records(split), split)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process was faster with the same table, which is as good
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Writer:
    """Writes the files of a table, chunk by chunk."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, chat: bool, skip_bad: bool) -> None:
        self.tokenizer = tokenizer
        self.folder = folder
        self.chat = chat
        self.skip_bad = skip_bad
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
        self.seen = self.skipped = self.unknown = 0
        self.reasons: list[str] = []
        self.columns: dict[str, list[NDArray[np.int64]]] = {"length": [], "answer_start": [], "record": []}

    def write(self, records: Located, split: str) -> None:
        with (
            open(self.folder / "tokens.bin", "wb") as tokens,
            open(self.folder / "supervised.bin", "wb") as supervised,
            tqdm(desc=f"tokenizing {split}", unit=" records", delay=PROGRESS_AFTER, leave=False) as progress,
            _without_cycle_collection(),
        ):
            while chunk := list(islice(records, CHUNK)):
                samples = self._tokenize(chunk)
                flat = np.fromiter(chain.from_iterable(ids for runs in samples.values() for ids, _ in runs), self.dtype)
                sizes = [[len(ids) for ids, _ in runs] for runs in samples.values()]
                flags = np.array([flag for runs in samples.values() for _, flag in runs], dtype=np.bool_)
                flat.tofile(tokens)
                np.repeat(flags, list(chain.from_iterable(sizes))).tofile(supervised)
                self._note_columns([sum(size) for size in sizes], [sum(size[:-1]) for size in sizes], list(samples))
                if self.tokenizer.unknown_id is not None:
                    self.unknown += int(np.count_nonzero(flat == self.tokenizer.unknown_id))
                self.seen += len(chunk)
                progress.update(len(chunk))
        self._finish()

    def _tokenize(self, chunk: list[tuple[str, dict[str, Any] | BadRecord]]) -> dict[int, Runs]:
        """Runs of each usable record of a chunk, by its number."""
        parsed: list[tuple[int, str, Turns | Chat | Ids]] = []
        for number, (where, record) in enumerate(chunk, self.seen):
            try:
                if isinstance(record, BadRecord):
                    raise RecordError(record.reason)
                parsed.append((number, where, parse_record(record, self.chat)))
            except RecordError as error:
                self._skip(where, error)
        texts = iter(
            self.tokenizer.encode_batch(
                [text for _, _, turns in parsed if isinstance(turns, Turns) for text in turns.texts]
            )
        )
        samples: dict[int, Runs] = {}
        for number, where, form in parsed:
            try:
                samples[number] = self._runs(form, texts)
            except (RecordError, UserError) as error:
                self._skip(where, error)
        return samples

    def _runs(self, record: Turns | Chat | Ids, texts: Iterator[list[int]]) -> Runs:
        """Token ids of a record as runs, the last of them an answer that ends with a terminator."""
        end = [self.tokenizer.terminator_id]
        if isinstance(record, Turns):
            runs = [(next(texts), flag) for flag in record.supervised]
            if not all(ids for ids, flag in runs if flag):
                raise RecordError("has an answer of no tokens")
            runs = [(ids + end if flag else ids, flag) for ids, flag in runs]
        elif isinstance(record, Chat):
            ids, flags = self.tokenizer.encode_chat(record.messages)
            edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(ids)]
            runs = [(ids[start:stop], flags[start]) for start, stop in pairwise(edges)]
        else:
            wrong = next((index for index in record.ids if not 0 <= index < self.tokenizer.vocab_size), None)
            if wrong is not None:
                raise RecordError(f"has token id {wrong}, outside the vocabulary of {self.tokenizer.vocab_size}")
            answer = record.ids[record.prompt_length :]
            end = [] if answer[-1] in self.tokenizer.terminator_ids else end
            runs = [(record.ids[: record.prompt_length], False), (answer + end, True)]
        if any(self.tokenizer.mask_id in ids for ids, _ in runs):
            raise RecordError(f"contains the mask token {self.tokenizer.id_to_token(self.tokenizer.mask_id)}")
        return runs

    def _skip(self, where: str, error: Exception) -> None:
        reason = f"{where} {error}"
        if not self.skip_bad:
            raise _bad_record(reason)
        self.skipped += 1
        if len(self.reasons) < REASONS_KEPT:
            self.reasons.append(reason)

    def _note_columns(self, *values: list[int]) -> None:
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(np.array(value, dtype=np.int64))

    def _finish(self) -> None:
        length, answer_start, record = (
            np.concatenate([np.empty(0, np.int64), *column]) for column in self.columns.values()
        )
        np.save(self.folder / "offsets.npy", np.concatenate([np.zeros(1, np.int64), np.cumsum(length)]))
        np.save(self.folder / "answer_start.npy", answer_start)
        np.save(self.folder / "record.npy", record)
        meta = {
            "samples": len(length),
            "tokens": int(length.sum()),
            "records": self.seen,
            "skipped": self.skipped,
            "reasons": self.reasons,
            "unknown_tokens": self.unknown,
            "dtype": self.dtype.name,
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


@contextmanager
def _without_cycle_collection() -> Iterator[None]:
    """Millions of short-lived lists without cycles would keep the collector walking over everything (40 % slower)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _bad_record(reason: str) -> UserError:
    return UserError(f"{reason} (data.on_bad_record=skip leaves out and counts such records)")
