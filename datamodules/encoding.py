"""Tokenizing: records become samples, and the samples of a split a table that is kept in a cache.

The terminator is appended here. A table is tokenized once, kept under a fingerprint of its records and settings, and
memory-mapped by every process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dllm_var.datamodules.records import Ids, Turns, parse_record
from dllm_var.datamodules.sources import Located, Source
from dllm_var.datamodules.table import COLUMNS, Table, seal
from dllm_var.errors import UserError, one_line
from dllm_var.files import PARTIAL, write_atomically
from dllm_var.text.tokenizer import Piece, Tokenizer

VERSION = 4  # of a table's files and what they mean; part of the cache key
CHUNK = 4_096  # records tokenized at a time
PROGRESS_AFTER = 5.0  # seconds of tokenizing before progress is shown
ABANDONED_AFTER = 86_400.0  # seconds without a write after which an unfinished folder is taken for abandoned
REASONS_KEPT = 5
BATCH = 2**20  # characters encoded at a time, for each of which the tokenizer takes up to 200 bytes

Runs = list[tuple[list[int], bool]]  # token ids, and whether they carry loss


@dataclass
class RecordEncoder:
    """Tokenizes records, and counts in `meta` what it has seen."""

    tokenizer: Tokenizer
    chat: bool = False  # whether prompt and answer go through the tokenizer's chat template
    skip_bad: bool = False  # whether records that cannot be used are counted; otherwise the first one is an error
    refuse_special: bool = False  # whether a text that spells a special token cannot be used
    longest: int = 0  # tokens of the longest row; of a text with many more only a beginning is encoded; 0 encodes all

    def __post_init__(self) -> None:
        dtype = "uint16" if self.tokenizer.vocab_size <= 2**16 else "int32"
        self.meta: dict[str, Any] = {"records": 0, "skipped": 0, "reasons": [], "unknown_tokens": 0, "dtype": dtype}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the token ids of a usable record, as plain values."""
        names = ("chat", "refuse_special", "longest")
        return {"tokenizer": self.tokenizer.fingerprint, **{name: getattr(self, name) for name in names}}

    def encode(self, records: Sequence[Located]) -> Table:
        """Tokenizes a number of records at once.

        Raises:
            UserError: When a record cannot be used and that is an error; names its place.
        """
        with _without_cycle_collection():
            samples = self._samples(records)
        sizes = [[len(ids) for ids, _ in runs] for runs in samples]
        ids = chain.from_iterable(ids for runs in samples for ids, _ in runs)
        tokens = np.fromiter(ids, dtype=self.meta["dtype"])
        flags = np.array([flag for runs in samples for _, flag in runs], dtype=np.bool_)
        self.meta["records"] += len(records)
        if self.tokenizer.unknown_id is not None:
            self.meta["unknown_tokens"] += int(np.count_nonzero(tokens == self.tokenizer.unknown_id))
        return Table(
            tokens=tokens,
            supervised=np.repeat(flags, np.array(list(chain.from_iterable(sizes)), dtype=np.int64)),
            offsets=np.cumsum([0, *map(sum, sizes)], dtype=np.int64),
            answer_start=np.array([sum(size[:-1]) for size in sizes], dtype=np.int64),
            meta=dict(self.meta),
        )

    def _samples(self, records: Sequence[Located]) -> list[Runs]:
        """Runs of each usable record."""
        parsed: list[tuple[str, Turns | Ids, list[Piece]]] = []
        for where, record in records:
            try:
                form = parse_record(record, self.chat)
                parsed.append((where, form, self._pieces(form)))
            except UserError as error:
                self._skip(where, error)
        # All at once, so that the tokenizer's threads, one for each core, have enough to do.
        encoded = iter(self._encode([piece for *_, pieces in parsed for piece in pieces]))
        samples: list[Runs] = []
        for where, form, pieces in parsed:
            ids = [next(encoded) for _ in pieces]  # also of a record that is skipped
            try:
                samples.append(self._runs(form, pieces, ids))
            except UserError as error:
                self._skip(where, error)
        return samples

    def _through_template(self, form: Turns) -> bool:
        return form.chat and self.tokenizer.chat_template is not None

    def _pieces(self, form: Turns | Ids) -> list[Piece]:
        """Texts of a record that have to be encoded."""
        if isinstance(form, Ids):
            return []
        messages = [{**message, "content": self._clip(message["content"])} for message in form.messages]
        if self._through_template(form):
            return self.tokenizer.chat_pieces(messages, self.refuse_special)
        return [Piece(message["content"], message["role"] == "assistant", self.refuse_special) for message in messages]

    def _clip(self, text: str) -> str:
        """A beginning of a text that is certainly longer than the longest row, or the whole text."""
        size = BATCH // 2
        while self.longest and size < len(text):
            beginning = text[:size].rpartition(" ")[0] or text[:size]
            # What follows a beginning changes the last few of its tokens, and never half of them.
            if len(self.tokenizer.encode_batch([beginning])[0]) > 2 * self.longest:
                return beginning
            size *= 2
        return text

    def _encode(self, pieces: list[Piece]) -> list[list[int]]:
        """Token ids of each piece; texts are encoded some `BATCH` characters at a time, and longer ones in parts."""
        ids: list[list[int]] = [[] for _ in pieces]
        for special_tokens in (False, True):
            parts = [
                (number, piece.text[start : start + 4 * BATCH])
                for number, piece in enumerate(pieces)
                if piece.special_tokens is special_tokens
                for start in range(0, len(piece.text), 4 * BATCH)
            ]
            ends = accumulate(len(text) for _, text in parts)
            for _, batch in groupby(zip(parts, ends, strict=True), key=lambda part: part[1] // BATCH):
                numbers, texts = zip(*(part for part, _ in batch), strict=True)
                for number, found in zip(numbers, self.tokenizer.encode_batch(texts, special_tokens), strict=True):
                    ids[number] += found
        return ids

    def _runs(self, form: Turns | Ids, pieces: list[Piece], encoded: list[list[int]]) -> Runs:
        """Token ids of a record, and of its pieces, as runs; the last of them is an answer that ends."""
        runs = self._runs_of_ids(form) if isinstance(form, Ids) else self._runs_of_turns(form, pieces, encoded)
        if any(self.tokenizer.mask_id in ids for ids, _ in runs):
            raise UserError(f"contains the mask token {self.tokenizer.id_to_token(self.tokenizer.mask_id)}")
        return runs

    def _runs_of_ids(self, form: Ids) -> Runs:
        vocab_size = self.tokenizer.vocab_size
        wrong = next((index for index in form.ids if not 0 <= index < vocab_size), None)
        if wrong is not None:
            raise UserError(f"has token id {wrong}, outside the vocabulary of {vocab_size}")
        answer = form.ids[form.prompt_length :]
        end = [] if answer[-1] in self.tokenizer.terminator_ids else [self.tokenizer.terminator_id]
        return [(form.ids[: form.prompt_length], False), (answer + end, True)]

    def _runs_of_turns(self, form: Turns, pieces: list[Piece], encoded: list[list[int]]) -> Runs:
        templated = self._through_template(form)
        runs = []
        for piece, ids in zip(pieces, encoded, strict=True):
            if not (templated and piece.special_tokens):
                self.tokenizer.check_plain(ids)
                if piece.supervised and not set(self.tokenizer.terminator_ids).isdisjoint(ids):
                    raise UserError("has an answer that spells a terminator: it would end there")
            if piece.supervised and not templated:  # the template writes terminators itself
                if not ids:
                    raise UserError("has an answer of no tokens")
                ids = [*ids, self.tokenizer.terminator_id]
            if ids:
                runs.append((ids, piece.supervised))
        neighbours = groupby(runs, key=itemgetter(1))
        return [(list(chain.from_iterable(ids for ids, _ in group)), flag) for flag, group in neighbours]

    def _skip(self, where: str, error: UserError) -> None:
        reason = f"{where} {error}"
        if not self.skip_bad:
            raise bad_record(reason)
        self.meta["skipped"] += 1
        self.meta["reasons"] = [*self.meta["reasons"], reason][:REASONS_KEPT]


def bad_record(reason: str) -> UserError:
    """The error for a record that cannot be used, given its place and what is wrong with it."""
    return UserError(f"{reason} (data.on_bad_record=skip leaves out and counts such records)")


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


def load_table(source: Source, split: str, encoder: RecordEncoder, cache: Path, verify: bool = True) -> Table:
    """Opens the tokenized table of a split, and builds it first, with a new encoder, if the cache does not have it.

    Several processes may do so at once: each writes a folder of its own, and the first to finish gives it its name.
    `verify` compares the checksums of all data in the table.

    Raises:
        UserError: When a record cannot be used, with its place; when the cache cannot be written, or is damaged.
    """
    settings = {"version": VERSION, "source": source.fingerprint(), **encoder.settings}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"{key}-{split}"
    if not folder.is_dir():
        try:
            _remove_abandoned(cache)
            with write_atomically(folder, shared=True) as partial:
                partial.mkdir()
                _write(source, split, encoder, partial)
        except OSError as error:
            raise UserError(f"cannot keep tokenized data in {cache}: {one_line(error)}; set data.cache_dir") from None
    table = Table.open(folder, verify)
    if table.meta["skipped"] and not encoder.skip_bad:  # built by a run that skipped them
        raise bad_record(table.meta["reasons"][0])
    return table


def _remove_abandoned(cache: Path) -> None:
    """Removes unfinished folders of processes that were killed; without locks, which not every file system has."""
    for folder in cache.glob(f"*{PARTIAL}"):
        with suppress(OSError):  # its owner has just finished
            written = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
            if time.time() - written > ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _write(source: Source, split: str, encoder: RecordEncoder, folder: Path) -> None:
    """Writes the files of a table, chunk by chunk."""
    records = source.located_records(split)
    samples = tokens = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in COLUMNS}
        progress = stack.enter_context(
            tqdm(desc=f"tokenizing {split}", unit=" records", delay=PROGRESS_AFTER, leave=False)
        )
        first = np.zeros(1, np.int64)
        first.tofile(files["offsets"])
        crc32 = {name: zlib.crc32(first.data) if name == "offsets" else 0 for name in COLUMNS}
        while chunk := _next_chunk(records, source, split):
            table = encoder.encode(chunk)
            columns = {name: getattr(table, name) for name in COLUMNS}
            columns["offsets"] = table.offsets[1:] + tokens
            for name, column in columns.items():
                column.tofile(files[name])
                crc32[name] = zlib.crc32(column.data, crc32[name])
            samples, tokens = samples + len(table), tokens + len(table.tokens)
            progress.update(len(chunk))
    meta = {**encoder.meta, "samples": samples, "tokens": tokens, "crc32": crc32}
    (folder / "meta.json").write_text(seal(meta), encoding="utf-8")


def _next_chunk(records: Iterator[Located], source: Source, split: str) -> list[Located]:
    try:
        return list(islice(records, CHUNK))
    except OSError as error:  # not to be taken for an error of the cache
        raise UserError(f"the {split} split of {type(source).__name__} cannot be read: {one_line(error)}") from error
