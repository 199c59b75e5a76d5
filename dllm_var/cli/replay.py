"""The replay of an answer: in which forward pass each of its tokens appeared."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_var.sampling import Generation
    from dllm_var.text.tokenizer import Tokenizer

LEFT_IN_VIEW = 6  # tokens left of the first new one, in a line that does not hold all
COLOURS = (226, 220, 214, 208, 203, 199, 164, 129, 99, 69, 39, 44)  # of a terminal, from early to late


def replay(answer: Generation, tokenizer: Tokenizer, width: int, colour: bool = False) -> str:
    """Returns the answer's tokens with the forward passes that committed them, then the answer after each of these.

    In colour, a token's colour tells its forward; in plain text the number stands below it. Given tokens (of a text
    with gaps) have no number. `_` is a token that is still to come. A line has at most `width` columns.
    """
    if answer.commit_steps is None:
        return "  the sampler does not record when tokens are committed"
    steps = answer.commit_steps
    cells = [_name(token, tokenizer) for token in answer.tokens]
    forwards = sorted(set(steps) - {0})
    label = max(len(f"  forward {step}: ") for step in [*forwards, 1])

    def paint(text: str, step: int) -> str:
        if not colour or step == 0:
            return text
        place = round(forwards.index(step) * (len(COLOURS) - 1) / max(len(forwards) - 1, 1))
        return f"\033[38;5;{COLOURS[place]}m{text}\033[0m"

    lines = []
    numbers = ["" if step == 0 or colour else str(step) for step in steps]
    widths = [max(len(cell), len(number)) for cell, number in zip(cells, numbers, strict=True)]
    if colour and forwards:
        lines.append(f"  {'forward':<{label - 2}}" + " ".join(paint(str(step), step) for step in forwards))
    for part in _wrapped(widths, width - label):
        text = " ".join(paint(cells[i], steps[i]) + " " * (widths[i] - len(cells[i])) for i in part)
        lines.append(f"  {'' if colour else 'token':<{label - 2}}{text}".rstrip())
        if not colour:
            text = " ".join(numbers[i].ljust(widths[i]) for i in part)
            lines.append(f"  {'forward':<{label - 2}}{text}".rstrip())
    for step in forwards:
        row = [cell if when <= step else "_" for cell, when in zip(cells, steps, strict=True)]
        first, last = _in_view(row, steps.index(step), width - label)
        shown = [paint(row[i], steps[i]) if steps[i] <= step else "_" for i in range(first, last)]
        text = " ".join(["…"] * (first > 0) + shown + ["…"] * (last < len(row)))
        lines.append(f"  forward {step}: ".ljust(label) + text)
    return "\n".join(lines)


def _name(token: int, tokenizer: Tokenizer) -> str:
    """Returns a token on one line, without blanks around it; the vocabulary's name for one that has no text."""
    text = tokenizer.decode([token])
    bare = text.strip(" ")
    if not bare:
        return "␣" * len(text) or tokenizer.id_to_token(token)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in bare)


def _wrapped(widths: list[int], width: int) -> list[list[int]]:
    """Returns the indices of the cells on each line."""
    parts: list[list[int]] = []
    used = 0
    for index, cell in enumerate(widths):
        if not parts or used + 1 + cell > width:
            parts.append([])
            used = -1
        parts[-1].append(index)
        used += 1 + cell
    return parts


def _in_view(row: list[str], new: int, width: int) -> tuple[int, int]:
    """Returns the first and the last cell, exclusive, of those around the new one that fit on a line."""

    def size(first: int, last: int) -> int:
        return sum(map(len, row[first:last])) + last - first - 1

    if size(0, len(row)) <= width:
        return 0, len(row)
    width -= len("… ") + len(" …")
    first = max(0, new - LEFT_IN_VIEW)
    while first < new and size(first, new + 1) > width:
        first += 1
    last = new + 1
    while last < len(row) and size(first, last + 1) <= width:
        last += 1
    return first, last
