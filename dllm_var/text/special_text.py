"""Text that spells special tokens, kept apart from the special tokens that a chat template writes.

A template puts what people wrote and its own markers into one text. `mark_messages` breaks up what people spelled, so
that only the template's markers are read as special tokens; `split_marked` takes the result apart again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dllm_var.errors import UserError

if TYPE_CHECKING:
    from dllm_var.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")  # that a message may have
MARK = "\ufdd0"  # no character and never one: Unicode keeps it for internal use


class Piece(NamedTuple):
    """A text to be encoded by itself.

    Args:
        text: The text.
        supervised: Whether its tokens carry loss.
        special_tokens: Whether special tokens that it spells become those tokens.
    """

    text: str
    supervised: bool
    special_tokens: bool


def mark_messages(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], refuse: bool = False
) -> list[dict[str, Any]]:
    """Returns the messages with `MARK` behind each character of a special token that one of their texts spells.

    Args:
        tokenizer: Knows the special tokens.
        messages: Turns with ``role`` and ``content``, and whatever else the template reads.
        refuse: Raises an error for such a text.

    Raises:
        UserError: When a text has to be refused, has `MARK` itself, or spells a token that cannot be broken up.
    """
    marked = []
    for number, message in enumerate(messages):
        try:
            marked.append(_mark(tokenizer, message, refuse))
        except UserError as error:
            raise UserError(f"messages[{number}] {error}") from None
    return marked


def split_marked(tokenizer: Tokenizer, text: str, supervised: bool) -> list[Piece]:
    """Takes a rendered text apart at the template's special tokens, if people spelled any; removes the marks.

    Args:
        tokenizer: Knows the special tokens.
        text: Rendered from messages of `mark_messages`.
        supervised: Whether the tokens of the text carry loss.
    """
    if MARK not in text:
        return [Piece(text, supervised, True)]
    pieces, done = [], 0
    for index, start, stop in tokenizer.spans(text, special_tokens=True):
        if index in tokenizer.special_ids and MARK not in text[start:stop]:
            pieces.append(Piece(text[done:start].replace(MARK, ""), supervised, False))
            pieces.append(Piece(text[start:stop], supervised, True))
            done = stop
    pieces.append(Piece(text[done:].replace(MARK, ""), supervised, False))
    return [piece for piece in pieces if piece.text]


def _mark(tokenizer: Tokenizer, value: Any, refuse: bool) -> Any:
    """Marks all strings of a nested value."""
    if isinstance(value, dict):
        return {_mark(tokenizer, key, refuse): _mark(tokenizer, entry, refuse) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(tokenizer, entry, refuse) for entry in value]
    if not isinstance(value, str):
        return value
    if MARK in value:
        raise UserError(f"contains U+{ord(MARK):04X}, which is no character")
    if not _may_spell(tokenizer, value):
        return value
    marked, done = [], 0
    for index, start, stop in tokenizer.spans(value, special_tokens=True):
        if index in tokenizer.special_ids and stop > done:
            if refuse:
                tokenizer.check_text([index])
            start = max(start, done)  # bytes of one unknown character share its place
            marked += [value[done:start], *(letter + MARK for letter in value[start:stop])]
            done = stop
    text = "".join([*marked, value[done:]])
    tokenizer.check_text([index for index, _, _ in tokenizer.spans(text, special_tokens=True)])
    return text


def _may_spell(tokenizer: Tokenizer, text: str) -> bool:
    """Tells quickly whether a text has the letters of a special token."""
    pattern, normalize = _speller(tokenizer)
    return any(pattern.search(form) is not None for form in ((text, normalize(text)) if normalize else (text,)))


@lru_cache(maxsize=8)
def _speller(tokenizer: Tokenizer) -> tuple[re.Pattern[str], Callable[[str], str] | None]:
    """Pattern of all special tokens, and how a text is normalized if the tokenizer finds them in normalized text."""
    added = tokenizer.backend.get_added_tokens_decoder()
    names = [tokenizer.id_to_token(index) for index in tokenizer.special_ids]
    normalize = None
    if any(added[index].normalized for index in tokenizer.special_ids if index in added):
        normalize = getattr(tokenizer.backend.normalizer, "normalize_str", None)
    names += [normalize(name) for name in names] if normalize else []
    return re.compile("|".join(map(re.escape, names))), normalize
