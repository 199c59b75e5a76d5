"""Prompts of `generate`, from the command line, files and standard input, as token ids."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dllm_var.errors import UserError
from dllm_var.files import parse_json
from dllm_var.text.tokenizer import ROLES

if TYPE_CHECKING:
    from dllm_var.text.tokenizer import Tokenizer

_GAP = re.compile(r"<gap:0*([1-9]\d{0,5})>")


@dataclass(frozen=True)
class Prompt:
    """One thing to decode.

    Args:
        text: The prompt as it is shown: what the user wrote, or said last.
        ids: What the model reads before the answer.
        infill: The answer with gaps, as it was written.
        infill_ids: Its token ids, the mask id wherever a token is wanted.
    """

    text: str
    ids: list[int]
    infill: str | None = None
    infill_ids: list[int] | None = None


@dataclass(frozen=True)
class _Record:
    """A prompt as it was given, with a name of its place for error messages."""

    where: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    infill: str | None = None


def read_prompts(options: Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """Returns the prompts of the options, in order.

    Raises:
        UserError: When there is none, one is empty, malformed or has characters the vocabulary lacks, or --chat is
            given and the tokenizer has no chat template.
    """
    if options.chat and tokenizer.chat_template is None:
        raise UserError("--chat: the checkpoint's tokenizer has no chat template; leave out --chat")
    records = list(_records(options))
    if not records:
        raise UserError("no prompts: give --prompt TEXT, --prompts-file FILE or lines on standard input")
    prompts = []
    for record in records:
        try:
            prompts.append(_encode(record, tokenizer, options.chat, options.system))
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None
    if len({prompt.infill is None for prompt in prompts}) > 1:
        raise UserError("some prompts have an infill text and some have none: decode them in two runs")
    return prompts


def _records(options: Namespace) -> Iterator[_Record]:
    given, infills = options.prompt or [], options.infill or []
    if infills and given and len(given) != len(infills):
        raise UserError(
            f"{len(given)} --prompt and {len(infills)} --infill: give a prompt for each infill text, or none"
        )
    if infills:
        for prompt, infill in zip(given or [None] * len(infills), infills, strict=True):
            yield _Record("--infill", prompt, infill=infill)
        return
    for prompt in given:
        yield _Record("--prompt", prompt)
    name = options.prompts_file
    try:
        if name not in (None, "-"):
            yield from _lines(Path(name).read_text(encoding="utf-8-sig"), name, Path(name).suffix == ".jsonl")
        elif name == "-" or (not given and not sys.stdin.isatty()):
            yield from _lines(sys.stdin.read(), "standard input", is_json=False)
    except (OSError, UnicodeDecodeError) as error:
        where = f"--prompts-file: cannot read '{name}'" if name not in (None, "-") else "cannot read standard input"
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{where}: {reason}") from error


def _lines(text: str, name: str, is_json: bool) -> Iterator[_Record]:
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{name}, line {number}"
        if not is_json:
            yield _Record(where, line.strip())
        elif line.strip():
            yield _from_json(line, where)


def _from_json(line: str, where: str) -> _Record:
    record = parse_json(line, where)
    if not isinstance(record, dict) or not record.keys() & {"prompt", "messages", "infill"}:
        raise UserError(f'{where}: expected an object with "prompt", "messages" or "infill"')
    for name in ("prompt", "infill"):
        if not isinstance(record.get(name, ""), str):
            raise UserError(f'{where}: "{name}" must be text, got {json.dumps(record[name])}')
    messages = record.get("messages")
    if messages is None:
        return _Record(where, record.get("prompt"), infill=record.get("infill"))
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        roles = ", ".join(ROLES)
        raise UserError(f'{where}: "messages" must be a list of objects with content and role, one of {roles}')
    if messages and messages[-1]["role"] == "assistant":  # a record of training data: that turn is asked for
        messages = messages[:-1]
    if not messages:
        raise UserError(f'{where}: "messages" has no turn to answer')
    return _Record(where, None, messages, record.get("infill"))


def _encode(record: _Record, tokenizer: Tokenizer, chat: bool, system: str | None) -> Prompt:
    messages, text = record.messages, record.prompt
    ids: list[int] = []
    if chat and messages is None and text is not None:
        messages = [{"role": "user", "content": text}]
    if messages is not None:
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        for turn in messages:
            _check(turn["content"], tokenizer)
        text, ids = messages[-1]["content"], tokenizer.encode_chat_prompt(messages)
    elif text is not None:
        _check(text, tokenizer)
        ids = tokenizer.encode(text)
    if record.infill is None:
        return Prompt(text or "", ids)
    return Prompt(text or "", ids, record.infill, encode_gaps(record.infill, tokenizer))


def encode_gaps(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns a text's token ids with one mask id for each token of a gap, `<gap:N>`.

    Blanks left of a gap belong to it: most tokenizers write the blank between words into the second word's token.

    Raises:
        UserError: When there is no gap, or one without a length.
    """
    pieces = _GAP.split(text)  # text, length, text, length, text
    malformed = next((found[0] for piece in pieces[::2] if (found := re.search(r"<gap[^>]*>?", piece))), None)
    if malformed is not None:
        raise UserError(
            f"the gap {malformed} has no length to be filled; write <gap:3> for three tokens "
            "(gaps of unknown length are not supported)"
        )
    if len(pieces) == 1:
        raise UserError(f"'{text}' has no gap; write <gap:3> where three tokens are missing")
    ids: list[int] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            ids += [tokenizer.mask_id] * int(piece)
            continue
        piece = piece.rstrip(" ") if index + 1 < len(pieces) else piece
        if piece.strip():
            _check(piece, tokenizer)
            ids += tokenizer.encode(piece)
    return ids


def _check(text: str, tokenizer: Tokenizer) -> None:
    """Raises UserError for text that is empty or that the vocabulary cannot spell."""
    if not text.strip():
        raise UserError("it is empty: give at least one token")
    try:
        spans = tokenizer.spans(text)
    except (TypeError, UnicodeEncodeError) as error:  # half a character, from a terminal that is not set to UTF-8
        raise UserError(f"it is not valid Unicode: {text!r}") from error
    unknown = next((text[start:stop] for index, start, stop in spans if index == tokenizer.unknown_id), None)
    if unknown is not None:
        raise UserError(f"'{text[:80]}': the checkpoint's vocabulary has nothing for '{unknown[:80]}'")


def token_ids(names: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of tokens given by their text, their name in the vocabulary, or as `id:N`.

    Raises:
        UserError: When a text is not one token.
    """
    ids = []
    for name in names:
        number = name.removeprefix("id:")
        index = int(number) if number != name and number.isdecimal() else tokenizer.backend.token_to_id(name)
        if index is None:
            encoded = tokenizer.encode(name)
            if len(encoded) != 1 or encoded[0] == tokenizer.unknown_id:
                pieces = " ".join(repr(tokenizer.id_to_token(index)) for index in encoded)
                known = f"it is {len(encoded)} tokens, {pieces}" if len(encoded) > 1 else "the vocabulary has none"
                raise UserError(f"--suppress: '{name}' is not one token: {known}; give a token's text, or id:N")
            index = encoded[0]
        ids.append(index)
    return ids
