"""The order in which an answer's tokens appeared, for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_var.sampling import Generation
    from dllm_var.text.tokenizer import Tokenizer

PLAIN_WIDTH = 100
LEFT_IN_VIEW = 6  # tokens left of the first new one, in a line that does not hold all
# Terminal colours from early to late.
COLOURS = (226, 220, 214, 208, 203, 199, 164, 129, 99, 69, 39, 44)


def replay(answer: Generation, tokenizer: Tokenizer, width: int = PLAIN_WIDTH, colour: bool = False) -> str:
    """Returns the answer's tokens with the forward passes that committed them, then the answer after each of these.

    In colour, a token's colour tells its forward; in plain text the number stands below it. Given tokens (of a text
    with gaps) have no number. `_` is a token that is still to come.

    Args:
        answer: With `commit_steps`; what a sampler did not record cannot be shown.
        tokenizer: Names the tokens.
        width: Columns of a line.
        colour: Whether the terminal has colours.
    """
    if answer.commit_steps is None:
        return "  the sampler does not record when tokens are committed"
    steps = answer.commit_steps
    cells = [shown(token, tokenizer) for token in answer.tokens]
    forwards = sorted(set(steps) - {0})
    paint = {step: _colour(rank, len(forwards)) if colour else "" for rank, step in enumerate(forwards)}
    label = max(len(f"  forward {step}: ") for step in [*forwards, 1])
    lines = [""] if not cells else []
    if colour:
        legend = " ".join(_painted(str(step), paint[step]) for step in forwards)
        lines += [f"  {'forward':<{label - 2}}{legend}"] if forwards else []
        for part in _wrapped([len(cell) for cell in cells], width - label):
            lines.append(" " * label + " ".join(_painted(cells[i], paint.get(steps[i], "")) for i in part))
    else:
        numbers = ["" if step == 0 else str(step) for step in steps]
        widths = [max(len(cell), len(number)) for cell, number in zip(cells, numbers, strict=True)]
        for part in _wrapped(widths, width - label):
            for name, row in (("token", cells), ("forward", numbers)):
                text = " ".join(row[i].ljust(widths[i]) for i in part)
                lines.append(f"  {name:<{label - 2}}{text}".rstrip())
    for step in forwards:
        lines.append(f"  forward {step}: ".ljust(label) + _state(cells, steps, step, width - label, paint))
    return "\n".join(line for line in lines if line)


def shown(token: int, tokenizer: Tokenizer) -> str:
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


def _state(cells: list[str], steps: list[int], step: int, width: int, paint: dict[int, str]) -> str:
    """Returns the answer after one forward on one line; what is far from its new tokens is left out."""
    row = [cell if when <= step else "_" for cell, when in zip(cells, steps, strict=True)]
    new = [index for index, when in enumerate(steps) if when == step]
    first, last = 0, len(row)
    if sum(map(len, row)) + len(row) - 1 > width:
        room = width - len("… ") - len(" …")
        first = max(0, new[0] - LEFT_IN_VIEW)
        while first < new[0] and sum(map(len, row[first : new[0] + 1])) + new[0] - first > room:
            first += 1
        last = first + 1
        while last < len(row) and sum(map(len, row[first : last + 1])) + last - first <= room:
            last += 1
    pieces = [_painted(row[i], paint.get(steps[i], "") if steps[i] <= step else "") for i in range(first, last)]
    return " ".join(["…"] * (first > 0) + pieces + ["…"] * (last < len(row)))


def _colour(rank: int, count: int) -> str:
    place = 0 if count < 2 else round(rank * (len(COLOURS) - 1) / (count - 1))
    return f"38;5;{COLOURS[place]}"


def _painted(text: str, colour: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if colour else text
