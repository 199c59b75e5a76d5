"""The tokenized table: records become samples, ended by a terminator, and those of a split flat arrays in a cache."""

import gc
import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dllm_var.datamodules.records import Ids, Turns, parse_record
from dllm_var.datamodules.sources import Located, Source
from dllm_var.errors import UserError, one_line
from dllm_var.files import PARTIAL, discard, write_atomically
from dllm_var.text.tokenizer import Piece, Tokenizer

VERSION = 5  # of a table's files and what they mean; part of the cache key
CHUNK = 4_096  # records tokenized at a time
ABANDONED_AFTER = 86_400  # seconds without a write after which an unfinished table is removed
BATCH = 2**20  # characters encoded at a time, for each of which the tokenizer takes up to 200 bytes

Parts = list[tuple[list[int], bool]]  # token ids, and whether they carry loss; the last part is an answer that ends
# Files of a table and the types in them; the tokens' own is in ``meta.json``.
COLUMNS = {"tokens": None, "supervised": "bool", "offsets": "int64", "answer_start": "int64"}
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
    def open(cls, folder: Path, verify: bool = True) -> "Table":
        """Maps the files of a table into memory; `verify` compares their checksums, at some gigabyte per second."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            columns = {name: _map(folder / f"{name}.bin", dtype or meta["dtype"]) for name, dtype in COLUMNS.items()}
            for name, column in columns.items():
                if verify and zlib.crc32(column.data) != meta["crc32"][name]:
                    raise ValueError(f"{name}.bin is not as it was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"tokenized data is damaged ({one_line(error)}): delete {folder} to make it anew") from None
        return cls(**columns, meta=meta, folder=folder)

    def __len__(self) -> int:
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


@dataclass
class RecordEncoder:
    """Tokenizes records, and counts in `meta` what it has seen."""

    tokenizer: Tokenizer
    chat: bool = False  # whether prompt and answer go through the tokenizer's chat template
    skip_bad: bool = False  # whether records that cannot be used are counted; otherwise the first one is an error
    refuse_special: bool = False  # whether a text that spells a special token cannot be used

    def __post_init__(self) -> None:
        dtype = "uint16" if self.tokenizer.vocab_size <= 2**16 else "int32"
        self.meta: dict[str, Any] = {"records": 0, "skipped": 0, "reasons": [], "unknown_tokens": 0, "dtype": dtype}

    def encode(self, records: Sequence[Located]) -> Table:
        """Tokenizes a number of records at once; raises UserError, which names its place, for a bad one."""
        was_enabled = gc.isenabled()
        gc.disable()  # the collector would walk over millions of short-lived lists for 40 % of the time
        try:
            samples = self._samples(records)
        finally:
            if was_enabled:
                gc.enable()
        sizes = [[len(ids) for ids, _ in parts] for parts in samples]
        ids = chain.from_iterable(ids for parts in samples for ids, _ in parts)
        tokens = np.fromiter(ids, dtype=self.meta["dtype"])
        flags = np.array([flag for parts in samples for _, flag in parts], dtype=np.bool_)
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

    def _samples(self, records: Sequence[Located]) -> list[Parts]:
        parsed: list[tuple[str, Turns | Ids, list[Piece]]] = []
        for where, record in records:
            with self._counting_bad(where):
                form = parse_record(record, self.chat)
                parsed.append((where, form, self._pieces(form)))
        # All at once, so that the tokenizer's threads, one for each core, have enough to do.
        texts: dict[bool, list[str]] = {False: [], True: []}
        for piece in chain.from_iterable(pieces for *_, pieces in parsed):
            texts[piece.special_tokens].append(piece.text)
        encoded = {special: iter(self._encode(texts[special], special)) for special in texts}
        samples: list[Parts] = []
        for where, form, pieces in parsed:
            ids = [next(encoded[piece.special_tokens]) for piece in pieces]  # also of a record that is skipped
            with self._counting_bad(where):
                parts = self._parts_of_ids(form) if isinstance(form, Ids) else self._parts_of_turns(form, pieces, ids)
                if any(self.tokenizer.mask_id in ids for ids, _ in parts):
                    raise UserError(f"contains the mask token {self.tokenizer.id_to_token(self.tokenizer.mask_id)}")
                samples.append(parts)
        return samples

    def _encode(self, texts: list[str], special_tokens: bool) -> list[list[int]]:
        """Token ids of each text, of some `BATCH` characters at a time; a longer text goes alone."""
        if len(texts) > 1 and sum(map(len, texts)) > BATCH:
            half = len(texts) // 2
            return self._encode(texts[:half], special_tokens) + self._encode(texts[half:], special_tokens)
        return self.tokenizer.encode_batch(texts, special_tokens)

    def _pieces(self, form: Turns | Ids) -> list[Piece]:
        """Texts of a record that have to be encoded."""
        if isinstance(form, Ids):
            return []
        if form.chat:
            return self.tokenizer.chat_pieces(form.messages, self.refuse_special)
        return [Piece(turn["content"], turn["role"] == "assistant", self.refuse_special) for turn in form.messages]

    def _parts_of_ids(self, form: Ids) -> Parts:
        vocab_size = self.tokenizer.vocab_size
        wrong = next((index for index in chain(*form) if not 0 <= index < vocab_size), None)
        if wrong is not None:
            raise UserError(f"has token id {wrong}, outside the vocabulary of {vocab_size}")
        end = [] if form.answer[-1] in self.tokenizer.terminator_ids else [self.tokenizer.terminator_id]
        return [(form.prompt, False), (form.answer + end, True)]

    def _parts_of_turns(self, turns: Turns, pieces: list[Piece], encoded: list[list[int]]) -> Parts:
        templated = turns.chat and self.tokenizer.chat_template is not None
        parts = []
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
                parts.append((ids, piece.supervised))
        neighbours = groupby(parts, key=itemgetter(1))
        return [(list(chain.from_iterable(ids for ids, _ in group)), flag) for flag, group in neighbours]

    @contextmanager
    def _counting_bad(self, where: str) -> Iterator[None]:
        """Counts a record that cannot be used, or raises what is wrong with it behind its place."""
        try:
            yield
        except UserError as error:
            reason = f"{where} {error}"
            if not self.skip_bad:
                raise bad_record(reason) from None
            self.meta["skipped"] += 1
            self.meta["reasons"] = [*self.meta["reasons"], reason][:5]


def bad_record(reason: str) -> UserError:
    return UserError(f"{reason} (data.on_bad_record=skip leaves out and counts such records)")


def load_table(source: Source, split: str, encoder: RecordEncoder, cache: Path, verify: bool = True) -> Table:
    """Opens the tokenized table of a split, and builds it first, with a new encoder, if the cache does not have it.

    Several processes may do so at once: each writes a folder of its own, and the first to finish gives it its name.
    """
    settings = {"version": VERSION, "source": source.fingerprint(), "tokenizer": encoder.tokenizer.fingerprint}
    settings |= {"chat": encoder.chat, "refuse_special": encoder.refuse_special}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"{key}-{split}"
    if not folder.is_dir():
        for left in cache.glob(f"*{PARTIAL}"):  # by processes that were killed; not every file system has locks
            with suppress(OSError):
                if time.time() - (left / "tokens.bin").stat().st_mtime > ABANDONED_AFTER:
                    discard(left)
        try:
            with write_atomically(folder, shared=True) as partial:
                partial.mkdir()
                _write(source, split, encoder, partial)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise UserError(f"cannot keep tokenized data in {cache}: {reason}; set data.cache_dir") from None
    table = Table.open(folder, verify)
    if table.meta["skipped"] and not encoder.skip_bad:  # built by a run that skipped them
        raise bad_record(table.meta["reasons"][0])
    return table


def _chunks(source: Source, split: str) -> Iterator[list[Located]]:
    records = source.located_records(split)
    try:
        while chunk := list(islice(records, CHUNK)):
            yield chunk
    except OSError as error:  # not to be taken for one of the cache
        raise UserError(f"the {split} split of {type(source).__name__} cannot be read: {one_line(error)}") from error


def _write(source: Source, split: str, encoder: RecordEncoder, folder: Path) -> None:
    """Writes the files of a table, chunk by chunk."""
    crc32 = dict.fromkeys(COLUMNS, 0)
    tokens = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in COLUMNS}
        progress = stack.enter_context(tqdm(desc=f"tokenizing {split}", unit=" records", delay=5, leave=False))
        # The first chunk is empty: from it `offsets` has the 0 with which it begins.
        for chunk in chain([[]], _chunks(source, split)):
            table = encoder.encode(chunk)
            columns = {name: getattr(table, name) for name in COLUMNS}
            columns["offsets"] = tokens + (table.offsets[1:] if chunk else table.offsets)
            for name, column in columns.items():
                column.tofile(files[name])
                crc32[name] = zlib.crc32(column.data, crc32[name])
            tokens += len(table.tokens)
            progress.update(len(chunk))
    (folder / "meta.json").write_text(json.dumps({**encoder.meta, "crc32": crc32}, indent=1), encoding="utf-8")


def _map(path: Path, dtype: str) -> NDArray[Any]:
    """A plain array over the pages of a file, which is indexed faster than a memmap; an empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
