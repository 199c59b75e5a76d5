"""Two options of `generate`: the gaps of a text (--infill), and the forward pass of each token (--replay)."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len  # Chinese characters are two columns wide

from dllm_var.errors import UserError

if TYPE_CHECKING:
    from dllm_var.sampling import Generation
    from dllm_var.text.tokenizer import Tokenizer

PLAIN_WIDTH = 100  # columns of a replay that is not shown in a terminal
LEFT_IN_VIEW = 6  # tokens left of the first new one, in a line that does not hold all
COLOURS = (226, 220, 214, 208, 203, 199, 164, 129, 99, 69, 39, 44)  # of a terminal, from early to late


def split_gaps(text: str) -> list[str | int]:
    """Returns the parts of a text with gaps, `<gap:N>`: texts, and lengths of gaps.

    Blanks left of a gap belong to it: most tokenizers write the blank between words into the second word's token.
    """
    parts = re.split(r"<gap:0*([1-9]\d{0,5})>", text)  # text, length, text, length, text
    if len(parts) == 1 or any("<gap" in part for part in parts[::2]):
        raise UserError(f"'{text}' must have gaps, each with a length: write <gap:3> where three tokens are missing")
    texts = [*(part.rstrip(" ") for part in parts[:-1:2]), parts[-1]]
    lengths = [*map(int, parts[1::2]), 0]
    return [part for pair in zip(texts, lengths, strict=True) for part in pair if part and not str(part).isspace()]


def replay(answer: Generation, tokenizer: Tokenizer, width: int, colour: bool = False) -> str:
    """Returns the answer's tokens with the forward passes that committed them, then the answer after each of these.

    Given tokens (of a text with gaps) have no number. `_` is a token that is still to come. A line has at most `width`
    columns.
    """
    if answer.commit_steps is None:
        return "  the sampler does not record when tokens are committed"
    steps, cells = answer.commit_steps, [tokenizer.shown(token).strip(" ") for token in answer.tokens]
    forwards = sorted(set(steps) - {0})
    label = len(f"  forward {max(steps, default=0)}: ")

    def paint(text: str, step: int) -> str:
        if not colour or step == 0:
            return text
        place = round(forwards.index(step) * (len(COLOURS) - 1) / max(len(forwards) - 1, 1))
        return f"\033[38;5;{COLOURS[place]}m{text}\033[0m"

    numbers = [str(step) if step else "" for step in steps]
    widths = [max(cell_len(cell), len(number)) for cell, number in zip(cells, numbers, strict=True)]
    parts: list[list[int]] = [[]]  # the tokens of each line
    for index, size in enumerate(widths):
        if parts[-1] and sum(widths[i] + 1 for i in parts[-1]) + size > width - label:
            parts.append([])
        parts[-1].append(index)
    lines = []
    for part in parts:
        for head, words in (("token", cells), ("forward", numbers)):
            text = " ".join(paint(words[i], steps[i]) + " " * (widths[i] - cell_len(words[i])) for i in part)
            lines.append(f"  {head:<{label - 2}}{text}".rstrip())
    for step in forwards:
        row = [cell if when <= step else "_" for cell, when in zip(cells, steps, strict=True)]
        first, last = _in_view(row, steps.index(step), width - label)
        shown = [paint(row[i], steps[i]) if steps[i] <= step else "_" for i in range(first, last)]
        text = " ".join(["…"] * (first > 0) + shown + ["…"] * (last < len(row)))
        lines.append(f"  forward {step}: ".ljust(label) + text)
    return "\n".join(lines)


def width_and_colour(out: TextIO) -> tuple[int, bool]:
    """Returns how `replay` is shown: as wide as a terminal, in colour unless its user wants none (no-color.org)."""
    if not out.isatty():
        return PLAIN_WIDTH, False
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns, "NO_COLOR" not in os.environ


def _in_view(row: list[str], new: int, width: int) -> tuple[int, int]:
    """Returns the first and the last cell, exclusive, of those around the new one that fit on a line."""
    if cell_len(" ".join(row)) <= width:
        return 0, len(row)
    room = width - len("… ") - len(" …")
    first, last = max(0, new - LEFT_IN_VIEW), min(len(row), new + width)
    while first < new and cell_len(" ".join(row[first : new + 1])) > room:
        first += 1
    while last > new + 1 and cell_len(" ".join(row[first:last])) > room:
        last -= 1
    return first, last
