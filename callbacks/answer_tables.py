"""Tables of generated answers, wrong tokens marked: for the terminal and in Markdown."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dllm_var.text.tokenizer import Tokenizer

PLAIN_WIDTH = 120
COLUMNS = ("prompt", "answer", "expected", "end", "forwards")


class Piece(NamedTuple):
    """A run of tokens of an answer that are all right or all wrong (`-` for missing ones), and the space before it."""

    gap: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class AnswerRow:
    """One line of a table of answers; `expected` is empty if the answer is right or nothing is known."""

    prompt: str
    answer: list[Piece]
    expected: str
    finish_reason: str
    nfe: int


def mark(tokenizer: Tokenizer, answer: Sequence[int], reference: Sequence[int] | None) -> list[Piece]:
    """Splits an answer's text into right, wrong and missing runs, by a shortest path of edits to the reference.

    Args:
        tokenizer: Turns tokens into text.
        answer: Token ids.
        reference: Token ids it should have been; None if unknown, then nothing is marked.
    """
    pieces: list[Piece] = []
    shown, after_missing = "", False  # decoding prefixes keeps the spacing that the tokenizer gives
    for code in Levenshtein.opcodes(answer, answer if reference is None else reference):
        kind, start, end = code.tag, code.src_start, code.src_end
        if kind == "insert":
            pieces.append(Piece(" " if pieces else "", "-", False))
        elif end > start:
            before, shown = shown, tokenizer.decode(answer[:end])
            text = shown[len(before) :]
            if kind != "equal" and not text.strip():  # special tokens have no text, but in an answer they must be seen
                text = " " + " ".join(tokenizer.id_to_token(token) for token in answer[start:end])
            gap = text[: len(text) - len(text.lstrip())] or " " * after_missing
            pieces.append(Piece(gap, text.lstrip(), kind == "equal"))
        after_missing = kind == "insert"
    return pieces


def plain_text(pieces: Sequence[Piece]) -> str:
    """Returns a marked answer without colour: `K IY [P] AO [-] D`, where [-] stands for missing tokens."""
    return "".join(p.gap + (p.text if p.is_right else f"[{p.text}]") for p in pieces).strip()


def answer_table(rows: Sequence[AnswerRow]) -> str:
    """Draws answers for where stdout goes: in colour, wrong tokens red, on a terminal; with brackets elsewhere."""
    colour = sys.stdout.isatty()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, overflow="fold", justify="right" if name == "forwards" else "left", header_style="dim")
    for row in rows:
        answer = Text("" if colour else plain_text(row.answer))
        for number, piece in enumerate(row.answer if colour else ()):
            answer.append(piece.gap if number else "")
            answer.append(piece.text, style="" if piece.is_right else "bold underline red")
        table.add_row(Text(row.prompt), answer, Text(row.expected, "dim"), Text(row.finish_reason), str(row.nfe))
    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if colour else PLAIN_WIDTH
    text = io.StringIO()
    Console(file=text, force_terminal=colour, width=width, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().split("\n"))


def markdown_table(rows: Sequence[AnswerRow]) -> str:
    """Writes answers as a Markdown table, as TensorBoard's text tab shows it."""
    lines = [" | ".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
    for row in rows:
        cells = [row.prompt, plain_text(row.answer), row.expected, row.finish_reason, str(row.nfe)]
        lines.append(" | ".join(map(_markdown_cell, cells)))
    return "\n".join(f"| {line} |" for line in lines)


def _markdown_cell(text: str) -> str:
    for character in "\\`*_{}<>#|~":
        text = text.replace(character, "\\" + character)
    return text.replace("\r", "").replace("\n", "<br>")
