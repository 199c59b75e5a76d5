"""Records to tokenized samples, many at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from dllm_var.datamodules.records import Chat, Ids, RecordError, Turns, parse_record
from dllm_var.datamodules.sources import BadRecord
from dllm_var.datamodules.table import Table
from dllm_var.errors import UserError
from dllm_var.text.special_text import Piece
from dllm_var.text.tokenizer import Tokenizer

REASONS_KEPT = 5
BATCH = 2**20  # characters encoded at a time, for each of which the tokenizer takes up to 200 bytes

Runs = list[tuple[list[int], bool]]  # token ids, and whether they carry loss


class RecordEncoder:
    """Tokenizes records and keeps count of what could not be used.

    Args:
        tokenizer: Makes token ids of text.
        chat: Whether prompt and answer go through the tokenizer's chat template.
        skip_bad: Whether records that cannot be used are counted instead of being an error.
        refuse_special: Whether a text that spells a special token cannot be used; otherwise it is text like any other.
        longest: Tokens of the longest row for which the samples are wanted: of a text that alone has more, only a
            beginning with more tokens than that is encoded. 0 encodes all of every text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: bool = False,
        skip_bad: bool = False,
        refuse_special: bool = False,
        longest: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.skip_bad = skip_bad
        self.refuse_special = refuse_special
        self.longest = longest
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
        self.records = self.skipped = self.unknown_tokens = 0
        self.reasons: list[str] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the token ids of a usable record, as plain values."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "chat": self.chat,
            "refuse_special": self.refuse_special,
            "longest": self.longest,
        }

    @property
    def meta(self) -> dict[str, Any]:
        """The counts so far."""
        return {
            "records": self.records,
            "skipped": self.skipped,
            "reasons": self.reasons,
            "unknown_tokens": self.unknown_tokens,
            "dtype": self.dtype.name,
        }

    def encode(self, records: Sequence[tuple[str, dict[str, Any] | BadRecord]], first: int) -> Table:
        """Tokenizes a number of records at once.

        Args:
            records: Each with the place it stands at.
            first: Number of the first of them in the source.

        Raises:
            UserError: When a record cannot be used and that is an error; names its place.
        """
        with _without_cycle_collection():
            samples = self._samples(records, first)
            sizes = [[len(ids) for ids, _ in runs] for runs in samples.values()]
            tokens = np.fromiter(chain.from_iterable(ids for runs in samples.values() for ids, _ in runs), self.dtype)
            flags = np.array([flag for runs in samples.values() for _, flag in runs], dtype=np.bool_)
        self.records += len(records)
        if self.tokenizer.unknown_id is not None:
            self.unknown_tokens += int(np.count_nonzero(tokens == self.tokenizer.unknown_id))
        return Table(
            tokens=tokens,
            supervised=np.repeat(flags, np.array(list(chain.from_iterable(sizes)), dtype=np.int64)),
            offsets=np.cumsum([0, *map(sum, sizes)], dtype=np.int64),
            answer_start=np.array([sum(size[:-1]) for size in sizes], dtype=np.int64),
            record=np.array(list(samples), dtype=np.int64),
            meta=self.meta,
        )

    def _samples(self, records: Sequence[tuple[str, dict[str, Any] | BadRecord]], first: int) -> dict[int, Runs]:
        """Runs of each usable record, by its number."""
        parsed: list[tuple[int, str, Turns | Chat | Ids, list[Piece]]] = []
        for number, (where, record) in enumerate(records, first):
            try:
                if isinstance(record, BadRecord):
                    raise RecordError(record.reason)
                form = self._clipped(parse_record(record, self.chat))
                parsed.append((number, where, form, self._pieces(form)))
            except (RecordError, UserError) as error:
                self._skip(where, error)
        # All at once, so that the tokenizer's threads, one for each core, have enough to share.
        encoded = iter(self._encode([piece for *_, pieces in parsed for piece in pieces]))
        samples: dict[int, Runs] = {}
        for number, where, form, pieces in parsed:
            ids = [next(encoded) for _ in pieces]  # also of a record that is skipped
            try:
                samples[number] = self._runs(form, pieces, ids)
            except (RecordError, UserError) as error:
                self._skip(where, error)
        return samples

    def _clipped(self, form: Turns | Chat | Ids) -> Turns | Chat | Ids:
        """The record with no more of each text than is needed to know that it is longer than the longest row."""
        if not self.longest or isinstance(form, Ids):
            return form
        if isinstance(form, Turns):
            return Turns(tuple(map(self._clip, form.texts)), form.supervised)
        return Chat([{**message, "content": self._clip(message["content"])} for message in form.messages])

    def _clip(self, text: str) -> str:
        size = BATCH // 2
        while size < len(text):
            beginning = text[:size].rpartition(" ")[0] or text[:size]
            # What follows a beginning changes the last few of its tokens, and never half of them.
            if len(self.tokenizer.encode_batch([beginning])[0]) > 2 * self.longest:
                return beginning
            size *= 2
        return text

    def _pieces(self, form: Turns | Chat | Ids) -> list[Piece]:
        """Texts of a record that have to be encoded."""
        if isinstance(form, Turns):
            pairs = zip(form.texts, form.supervised, strict=True)
            return [Piece(text, supervised, self.refuse_special) for text, supervised in pairs]
        if isinstance(form, Chat):
            return self.tokenizer.chat_pieces(form.messages, self.refuse_special)
        return []

    def _encode(self, pieces: list[Piece]) -> list[list[int]]:
        """Token ids of each piece; without a longest row, a text of many batches is encoded one batch after another."""
        ids: list[list[int]] = [[] for _ in pieces]
        for special_tokens in (False, True):
            batch: list[tuple[int, str]] = []
            characters = 0
            for number, piece in enumerate(pieces):
                if piece.special_tokens is not special_tokens:
                    continue
                step = max(len(piece.text), 1) if self.longest else 4 * BATCH
                for start in range(0, len(piece.text), step):
                    text = piece.text[start : start + step]
                    if batch and characters + len(text) > BATCH:
                        self._encode_batch(batch, special_tokens, ids)
                        batch, characters = [], 0
                    batch.append((number, text))
                    characters += len(text)
            self._encode_batch(batch, special_tokens, ids)
        return ids

    def _encode_batch(self, batch: list[tuple[int, str]], special_tokens: bool, ids: list[list[int]]) -> None:
        encoded = self.tokenizer.encode_batch([text for _, text in batch], special_tokens)
        for (number, _), found in zip(batch, encoded, strict=True):
            ids[number] = ids[number] + found if ids[number] else found

    def _runs(self, form: Turns | Chat | Ids, pieces: list[Piece], encoded: list[list[int]]) -> Runs:
        """Token ids of a record as runs, the last of them an answer that ends with a terminator.

        Args:
            form: What the record is.
            pieces: Its texts.
            encoded: Their token ids.
        """
        tokenizer = self.tokenizer
        end = [tokenizer.terminator_id]
        rendered = isinstance(form, Chat) and tokenizer.chat_template is not None
        for piece, ids in zip(pieces, encoded, strict=True):
            if not (rendered and piece.special_tokens):
                tokenizer.special_text.check(ids)
                if piece.supervised and not set(tokenizer.terminator_ids).isdisjoint(ids):
                    raise RecordError("has an answer that spells a terminator: it would end there")
        runs = [(ids, piece.supervised) for piece, ids in zip(pieces, encoded, strict=True)]
        if isinstance(form, Turns):
            if not all(ids for ids, flag in runs if flag):
                raise RecordError("has an answer of no tokens")
            runs = [(ids + end if flag else ids, flag) for ids, flag in runs]
        elif isinstance(form, Chat):
            if not rendered:
                runs = [(ids + end if flag else ids, flag) for ids, flag in runs]
            said = groupby((run for run in runs if run[0]), key=itemgetter(1))  # turns may follow their like
            runs = [(list(chain.from_iterable(ids for ids, _ in group)), flag) for flag, group in said]
        else:
            wrong = next((index for index in form.ids if not 0 <= index < tokenizer.vocab_size), None)
            if wrong is not None:
                raise RecordError(f"has token id {wrong}, outside the vocabulary of {tokenizer.vocab_size}")
            answer = form.ids[form.prompt_length :]
            end = [] if answer[-1] in tokenizer.terminator_ids else end
            runs = [(form.ids[: form.prompt_length], False), (answer + end, True)]
        if any(tokenizer.mask_id in ids for ids, _ in runs):
            raise RecordError(f"contains the mask token {tokenizer.id_to_token(tokenizer.mask_id)}")
        return runs

    def _skip(self, where: str, error: Exception) -> None:
        reason = f"{where} {error}"
        if not self.skip_bad:
            raise bad_record(reason)
        self.skipped += 1
        if len(self.reasons) < REASONS_KEPT:
            self.reasons.append(reason)


def bad_record(reason: str) -> UserError:
    """The error for a record that cannot be used.

    Args:
        reason: Where it stands and what is wrong with it.
    """
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
