"""Stop strings: where in its text an answer ends, besides at a terminator."""

from bisect import bisect_left
from collections.abc import Sequence

from dllm_var.errors import UserError
from dllm_var.text.tokenizer import Tokenizer

_SLACK = 8  # characters: a text decoded from its middle may begin differently


def settled_text(tokens: Sequence[int], tokenizer: Tokenizer, stop: "StopStrings | None") -> str:
    """Returns the part of an unfinished answer's text that no later token can change."""
    text = tokenizer.decode(tokens).rstrip("\ufffd")  # half a character
    return text if stop is None else stop.settled(text)


class StopStrings:
    """Finds the first of the strings in answers that grow; raises UserError when one is empty."""

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer) -> None:
        if not all(strings):
            raise UserError("a stop string is empty: give at least one character")
        self.strings, self.tokenizer = list(strings), tokenizer
        # Tokens before the new ones in which a stop string may begin: a character may have four.
        self._reach = 4 * (max(map(len, strings)) + _SLACK)
        self._checked: dict[int, int] = {}  # answer: tokens known to hold no stop string

    def find(self, index: int, tokens: list[int]) -> tuple[int, str] | None:
        """Returns what `cut` does for the `index`-th answer's tokens so far, but reads only its end anew."""
        start = max(0, self._checked.get(index, 0) - self._reach)
        cut = None if self._first(self.tokenizer.decode(tokens[start:])) is None else self.cut(tokens)
        if cut is None:
            self._checked[index] = len(tokens)
        return cut

    def cut(self, tokens: list[int]) -> tuple[int, str] | None:
        """Returns how many tokens of an answer stay and its text up to the first stop string; None when none is in it.

        A token that holds both the end of the text and the beginning of the stop string stays. Blanks that the stop
        string's first token brings along do not.
        """
        text = self.tokenizer.decode(tokens)
        at = self._first(text)
        if at is None:
            return None
        # The most tokens that lie before the stop string; lengths may waver within a character of several tokens.
        kept = bisect_left(range(1, len(tokens) + 1), True, key=lambda n: len(self.tokenizer.decode(tokens[:n])) > at)
        while not text.startswith(before := self.tokenizer.decode(tokens[:kept])):
            kept -= 1
        if not text[len(before) : at].strip():
            return kept, before
        while not self.tokenizer.decode(tokens[:kept]).startswith(text[:at]):
            kept += 1
        return kept, text[:at]

    def settled(self, text: str) -> str:
        """Returns the part of an unfinished text that no stop string can take back any more."""
        at = self._first(text)
        if at is not None:
            return text[:at].rstrip()
        held = max((n for s in self.strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - held].rstrip()

    def _first(self, text: str) -> int | None:
        return min((at for string in self.strings if (at := text.find(string)) >= 0), default=None)
