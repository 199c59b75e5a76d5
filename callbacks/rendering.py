"""Generated answers as people read them: a table for the terminal and one in Markdown, wrong tokens marked."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from dllm_var.metrics import align

if TYPE_CHECKING:
    from dllm_var.text.tokenizer import Tokenizer

PLAIN_WIDTH = 120


class Piece(NamedTuple):
    """A run of tokens of an answer that are all right, all wrong, or missing from it, and the space before it."""

    gap: str
    text: str
    kind: Literal["right", "wrong", "missing"]


@dataclass(frozen=True)
class AnswerRow:
    """One line of a table of answers.

    Args:
        prompt: The prompt's text.
        pieces: The answer, marked.
        expected: The nearest reference's text if the answer differs from it.
        finish_reason: Why the answer ended.
        nfe: Forward passes it took.
    """

    prompt: str
    pieces: list[Piece]
    expected: str
    finish_reason: str
    nfe: int


def mark(tokenizer: Tokenizer, answer: Sequence[int], reference: Sequence[int] | None) -> list[Piece]:
    """Split an answer's text into right, wrong and missing runs along a shortest edit path to the reference.

    Args:
        tokenizer: Turns tokens into text.
        answer: Token ids.
        reference: Token ids it should have been; None if unknown, then nothing is marked.
    """
    pairs = [(i, i) for i in range(len(answer))] if reference is None else align(answer, reference)
    pieces: list[Piece] = []
    done, shown = 0, ""  # tokens and text so far: decoding prefixes keeps the spacing the tokenizer gives
    for kind, run in groupby(pairs, lambda pair: _kind(pair, answer, answer if reference is None else reference)):
        if kind == "missing":
            pieces.append(Piece(" " if pieces else "", "-", "missing"))
            continue
        start, done = done, done + len(list(run))
        before, shown = shown, tokenizer.decode(answer[:done])
        text = shown[len(before) :]
        if kind == "wrong" and not text.strip():  # special tokens have no text, but in an answer they are to be seen
            text = " " + " ".join(tokenizer.id_to_token(token) for token in answer[start:done])
        gap = text[: len(text) - len(text.lstrip())]
        after_missing = bool(pieces) and pieces[-1].kind == "missing"
        pieces.append(Piece(gap or " " * after_missing, text[len(gap) :], kind))
    return pieces


def _kind(
    pair: tuple[int | None, int | None], answer: Sequence[int], reference: Sequence[int]
) -> Literal["right", "wrong", "missing"]:
    i, j = pair
    if i is None:
        return "missing"
    return "right" if j is not None and answer[i] == reference[j] else "wrong"


def plain_text(pieces: Sequence[Piece]) -> str:
    """Give a marked answer without colour: `K IY [P] AO [-] D`, where [-] stands for missing tokens."""
    return "".join(p.gap + (p.text if p.kind == "right" else f"[{p.text}]") for p in pieces).strip()


def rich_text(pieces: Sequence[Piece]) -> Text:
    """Give a marked answer in colour: wrong and missing tokens red and underlined."""
    text = Text()
    for piece in pieces:
        text.append(piece.gap if text else "")
        text.append(piece.text, style="" if piece.kind == "right" else "bold underline red")
    return text


def answer_table(rows: Sequence[AnswerRow]) -> str:
    """Draw answers as a table for where stdout goes: in colour on a terminal, with bracketed marks elsewhere."""
    colour = sys.stdout.isatty()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("prompt", "answer", "expected", "end", "forwards"):
        table.add_column(name, overflow="fold", justify="right" if name == "forwards" else "left", header_style="dim")
    for row in rows:
        answer = rich_text(row.pieces) if colour else Text(plain_text(row.pieces))
        table.add_row(Text(row.prompt), answer, Text(row.expected, "dim"), Text(row.finish_reason), str(row.nfe))
    return draw(table)


def draw(renderable: RenderableType) -> str:
    """Render something rich can draw to a string as wide as the terminal, coloured only if stdout is one."""
    colour = sys.stdout.isatty()
    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if colour else PLAIN_WIDTH
    console = Console(file=io.StringIO(), force_terminal=colour, width=width, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def markdown_table(rows: Sequence[AnswerRow]) -> str:
    """Write answers as a Markdown table, as TensorBoard's text tab shows it."""
    lines = ["| prompt | answer | expected | end | forwards |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row.prompt, plain_text(row.pieces), row.expected, row.finish_reason, str(row.nfe)]
        lines.append("| " + " | ".join(map(_markdown_cell, cells)) + " |")
    return "\n".join(lines)


def _markdown_cell(text: str) -> str:
    for character in "\\`*_{}<>#|~":
        text = text.replace(character, "\\" + character)
    return text.replace("\r", "").replace("\n", "<br>")
