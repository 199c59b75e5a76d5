"""Special tokens that people spell in a message, kept apart from those that a chat template writes.

A template puts messages and its own markers into one text. `mark` breaks up what people spelled, so that only the
template's markers are read as special tokens; `split` takes the rendered text apart again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dllm_var.errors import UserError

ROLES = ("system", "user", "assistant", "tool")  # that a message may have
MARK = "\ufdd0"  # never a character: Unicode keeps it for internal use

Spans = list[tuple[int, int, int]]  # token ids, each with where it begins and ends in its text


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


class SpecialText:
    """Finds, marks and refuses special tokens in text.

    Args:
        names: The special tokens by id.
        unknown_id: The token for what the vocabulary cannot spell, which any text may have.
        spans: Encodes a text in which special tokens are read.
        normalize: Changes a text before special tokens are looked for in it; None where nothing does.
    """

    def __init__(
        self,
        names: dict[int, str],
        unknown_id: int | None,
        spans: Callable[[str], Spans],
        normalize: Callable[[str], str] | None,
    ) -> None:
        self.names, self.unknown_id, self.spans, self.normalize = names, unknown_id, spans, normalize
        forms = [*names.values(), *(map(normalize, names.values()) if normalize else ())]
        self._pattern = re.compile("|".join(map(re.escape, forms)))

    def check(self, ids: Sequence[int]) -> None:
        """Refuses token ids of plain text that hold a special token.

        Raises:
            UserError: Names the special token.
        """
        if not self.names.keys().isdisjoint(ids):
            found = next((index for index in ids if index in self.names and index != self.unknown_id), None)
            if found is not None:
                raise UserError(f"spells the special token {self.names[found]}, which is kept for its own use")

    def mark(self, messages: Sequence[dict[str, Any]], refuse: bool = False) -> list[dict[str, Any]]:
        """Returns the messages with `MARK` behind each character of a special token that one of their texts spells.

        Raises:
            UserError: When a text has `MARK` itself, or spells a token that cannot be broken up; with `refuse` when it
                spells any.
        """
        marked = []
        for number, message in enumerate(messages):
            try:
                marked.append(self._marked(message, refuse))
            except UserError as error:
                raise UserError(f"messages[{number}] {error}") from None
        return marked

    def split(self, text: str, supervised: bool) -> list[Piece]:
        """Takes a text rendered from marked messages apart at the template's special tokens; removes the marks."""
        if MARK not in text:
            return [Piece(text, supervised, True)]
        pieces, done = [], 0
        for index, start, stop in self.spans(text):
            if index in self.names and MARK not in text[start:stop]:
                pieces.append(Piece(text[done:start].replace(MARK, ""), supervised, False))
                pieces.append(Piece(text[start:stop], supervised, True))
                done = stop
        pieces.append(Piece(text[done:].replace(MARK, ""), supervised, False))
        return [piece for piece in pieces if piece.text]

    def _marked(self, value: Any, refuse: bool) -> Any:
        """Marks all strings of a nested value."""
        if isinstance(value, dict):
            return {self._marked(key, refuse): self._marked(entry, refuse) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(entry, refuse) for entry in value]
        if not isinstance(value, str):
            return value
        if MARK in value:
            raise UserError(f"contains U+{ord(MARK):04X}, which is no character")
        forms = (value, self.normalize(value)) if self.normalize else (value,)
        if not any(map(self._pattern.search, forms)):  # quick: most texts end here
            return value
        marked, done = [], 0
        for index, start, stop in self.spans(value):
            if index in self.names and stop > done:
                if refuse:
                    self.check([index])
                start = max(start, done)  # bytes of one unknown character share its place
                marked += [value[done:start], *(letter + MARK for letter in value[start:stop])]
                done = stop
        text = "".join([*marked, value[done:]])
        self.check([index for index, _, _ in self.spans(text)])
        return text
