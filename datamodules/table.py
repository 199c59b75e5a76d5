"""Tokenized samples in a few flat files, built once and memory-mapped by every process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dllm_var.datamodules.records import Chat, Ids, RecordError, Turns, parse_record
from dllm_var.datamodules.sources import BadRecord, Source
from dllm_var.errors import UserError
from dllm_var.tokenization import Tokenizer

VERSION = 1  # of the files' layout and of what they mean; part of the cache key
CHUNK = 4_096  # records tokenized at a time
REASONS_KEPT = 5


class Table:
    """Tokenized samples of one split: flat memory-mapped arrays.

    Sample k takes ``offsets[k]:offsets[k + 1]`` of `tokens` and `supervised`; it ends with a supervised terminator.

    Args:
        folder: written by `build_table`.
    """

    tokens: NDArray[np.integer]
    """Token ids, shape [tokens]."""
    supervised: NDArray[np.bool_]
    """Whether each token carries loss, shape [tokens]."""
    offsets: NDArray[np.int64]
    """Where samples begin, and where the last ends, shape [samples + 1]."""
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

    def __reduce__(self):  # worker processes map the files themselves instead of receiving a copy
        return Table, (self.folder,)

    def ids(self, sample: int) -> list[int]:
        """Token ids of one sample."""
        return self.tokens[self.offsets[sample] : self.offsets[sample + 1]].tolist()


def load_table(source: Source, split: str, tokenizer: Tokenizer, cache: Path, chat: bool = False, skip_bad: bool = False) -> Table:
    """Opens the tokenized table of a split, building it if it is not in the cache.

    Args:
        source: where the records come from.
        split: one of the source's splits.
        tokenizer: makes token ids of them.
        cache: folder that holds tables, shared by runs and processes.
        chat: whether prompt and answer go through the tokenizer's chat template.
        skip_bad: whether records that cannot be used are counted instead of being an error.

    Raises:
        UserError: a record that cannot be used, with its place; or a cache folder that cannot be written.
    """
    settings = {"version": VERSION, "source": source.fingerprint(), "tokenizer": tokenizer.fingerprint, "chat": chat}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"{key}-{split}"
    if not (folder / "meta.json").is_file():
        _build(source, split, tokenizer, folder, chat, skip_bad)
    table = Table(folder)
    if table.meta["skipped"] and not skip_bad:
        raise _bad_record(table.meta["reasons"][0])
    return table


def _bad_record(reason: str) -> UserError:
    return UserError(f"{reason}; mend it, or set data.on_bad_record=skip to leave out and count such records")


def _build(source: Source, split: str, tokenizer: Tokenizer, folder: Path, chat: bool, skip_bad: bool) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write tokenized data to {folder.parent} ({error.strerror}); set data.cache_dir") from None
    try:
        _write_table(source, split, tokenizer, unfinished, chat, skip_bad)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
            # Another process was faster with the same table; what it wrote is as good.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_table(source: Source, split: str, tokenizer: Tokenizer, folder: Path, chat: bool, skip_bad: bool) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    lengths: list[NDArray] = []
    answer_starts: list[NDArray] = []
    kept: list[NDArray] = []
    reasons: list[str] = []
    seen = skipped = unknown = 0
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "supervised.bin", "wb") as supervised,
        tqdm(desc=f"tokenizing {split}", unit=" records", delay=3, leave=False) as progress,
    ):
        located = source.located_records(split)
        while batch := list(islice(located, CHUNK)):
            samples = _Samples(tokenizer)
            parsed = []
            for number, (where, record) in enumerate(batch):
                try:
                    if isinstance(record, BadRecord):
                        raise RecordError(record.reason)
                    parsed.append((seen + number, where, parse_record(record, chat)))
                except RecordError as error:
                    skipped += 1
                    _note(f"{where}: {error}", reasons, skip_bad)
            texts = iter(tokenizer.encode_batch(list(chain.from_iterable(p.texts for _, _, p in parsed if isinstance(p, Turns)))))
            for number, where, record in parsed:
                try:
                    samples.add(number, _pieces(record, texts, tokenizer))
                except RecordError as error:
                    skipped += 1
                    _note(f"{where}: {error}", reasons, skip_bad)
            unknown += samples.write(tokens, supervised, dtype)
            lengths.append(np.array(samples.lengths, dtype=np.int64))
            answer_starts.append(np.array(samples.answer_starts, dtype=np.int64))
            kept.append(np.array(samples.numbers, dtype=np.int64))
            seen += len(batch)
            progress.update(len(batch))
    offsets = np.concatenate([[0], *lengths]).astype(np.int64).cumsum()
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "answer_start.npy", np.concatenate([np.empty(0, np.int64), *answer_starts]))
    np.save(folder / "record.npy", np.concatenate([np.empty(0, np.int64), *kept]))
    meta = {
        "samples": len(offsets) - 1,
        "tokens": int(offsets[-1]),
        "records": seen,
        "skipped": skipped,
        "reasons": reasons,
        "unknown_tokens": unknown,
        "dtype": dtype.name,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _note(reason: str, reasons: list[str], skip_bad: bool) -> None:
    if not skip_bad:
        raise _bad_record(reason)
    if len(reasons) < REASONS_KEPT:
        reasons.append(reason)


def _pieces(record: Turns | Chat | Ids, texts: Iterator[list[int]], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Token ids of a record as runs, each supervised or not; every supervised run ends with a terminator."""
    end = [tokenizer.terminator_id]
    if isinstance(record, Turns):
        runs = [(next(texts), supervised) for supervised in record.supervised]
        if not all(ids for ids, supervised in runs if supervised):
            raise RecordError("has an answer of no tokens")
        runs = [(ids + end if supervised else ids, supervised) for ids, supervised in runs]
    elif isinstance(record, Chat):
        ids, flags = tokenizer.encode_chat(record.messages)
        edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(ids)]
        runs = [(ids[a:b], bool(flags[a])) for a, b in zip(edges, edges[1:])]
    else:
        answer = list(record.ids[record.prompt_length :])
        runs = [(list(record.ids[: record.prompt_length]), False), (answer if answer[-1] in tokenizer.terminator_ids else answer + end, True)]
    for ids, _ in runs:
        if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            wrong = next(index for index in ids if not 0 <= index < tokenizer.vocab_size)
            raise RecordError(f"has token id {wrong}, outside the vocabulary of {tokenizer.vocab_size}")
        if tokenizer.mask_id in ids:
            raise RecordError(f"contains the mask token {tokenizer.id_to_token(tokenizer.mask_id)}")
    return runs


class _Samples:
    """Samples of one chunk, gathered run by run and written at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.runs: list[list[int]] = []
        self.flags: list[bool] = []
        self.lengths: list[int] = []
        self.answer_starts: list[int] = []
        self.numbers: list[int] = []

    def add(self, number: int, runs: Iterable[tuple[list[int], bool]]) -> None:
        length = answer_start = 0
        for ids, supervised in runs:
            self.runs.append(ids)
            self.flags.append(supervised)
            if supervised:
                answer_start = length
            length += len(ids)
        self.lengths.append(length)
        self.answer_starts.append(answer_start)
        self.numbers.append(number)

    def write(self, tokens: BinaryIO, supervised: BinaryIO, dtype: np.dtype) -> int:
        """Appends to the two files; tells how many tokens stand for something the vocabulary cannot spell."""
        flat = np.fromiter(chain.from_iterable(self.runs), dtype=dtype)
        flat.tofile(tokens)
        np.repeat(np.array(self.flags, dtype=np.bool_), [len(run) for run in self.runs]).tofile(supervised)
        return 0 if self.tokenizer.unknown_id is None else int(np.count_nonzero(flat == self.tokenizer.unknown_id))
