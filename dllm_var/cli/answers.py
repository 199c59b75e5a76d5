"""Answers as `generate` prints them: in order, each as soon as it is there, streamed or with a replay when asked to."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from jsonargparse import Namespace

from dllm_var.cli.prompts import Prompt

if TYPE_CHECKING:
    from dllm_var.sampling import Generation
    from dllm_var.sampling.stopping import StopStrings
    from dllm_var.text.tokenizer import Tokenizer

PLAIN_WIDTH = 100  # columns of a replay that is not shown in a terminal
LEFT_IN_VIEW = 6  # tokens left of the first new one, in a line that does not hold all
COLOURS = (226, 220, 214, 208, 203, 199, 164, 129, 99, 69, 39, 44)  # of a terminal, from early to late


class AnswerPrinter:
    """Prints answers in the order of their prompts.

    Args:
        out: Where to.
        prompts: The prompts.
        tokenizer: Decodes tokens.
        options: `json`, `replay`, `answers_only`, `stream`, `no_stream` and `stop`, as `generate` has them.
    """

    def __init__(self, out: TextIO, prompts: Sequence[Prompt], tokenizer: Tokenizer, options: Namespace) -> None:
        self.out, self.prompts, self.tokenizer, self.options = out, prompts, tokenizer, options
        whole = options.no_stream or options.json or options.replay or prompts[0].infill is not None
        self.streams = options.stream or (out.isatty() and len(prompts) == 1 and not whole)
        self.next = 0  # the prompt whose answer is printed next
        self.waiting: dict[int, Generation] = {}
        self.latest: dict[int, list[int]] = {}
        self.current: TextStream | None = None
        self.done: list[Generation] = []
        self.progress: Any = None
        if len(prompts) > 1 and sys.stderr.isatty() and not self.streams:
            from tqdm import tqdm

            self.progress = tqdm(total=len(prompts), unit=" answers", file=sys.stderr, dynamic_ncols=True, leave=False)

    def on_block(self, index: int, tokens: list[int]) -> None:
        """Streams the prompt whose turn it is and remembers the others'."""
        if index == self.next:
            self._stream(tokens)
        else:
            self.latest[index] = tokens

    def on_answer(self, index: int, answer: Generation) -> None:
        """Prints an answer, or keeps it until those before it are there."""
        self.waiting[index] = answer
        self.done.append(answer)
        if self.progress is not None:
            self.progress.update()
        while self.next in self.waiting:
            self._print(self.next, self.waiting.pop(self.next))
            self.latest.pop(self.next, None)
            self.next += 1
        if self.next in self.latest:
            self._stream(self.latest.pop(self.next))

    def interrupt(self) -> None:
        """Prints the answers that wait for one that will not come."""
        self.close()
        if self.current is not None:
            self.current = None
            self._write("\n")
        for index in sorted(self.waiting):
            self._print(index, self.waiting.pop(index))

    def close(self) -> None:
        """Takes the progress bar away."""
        if self.progress is not None:
            self.progress.close()
            self.progress = None

    def _stream(self, tokens: list[int]) -> None:
        if not self.streams:
            return
        if self.current is None:
            from dllm_var.sampling.stopping import StopStrings

            stop = StopStrings(self.options.stop, self.tokenizer) if self.options.stop else None
            self.current = TextStream(self.tokenizer, stop)
            self._write(self._prefix(self.prompts[self.next]))
        self._write(self.current.feed(tokens))

    def _print(self, index: int, answer: Generation) -> None:
        if self.current is not None:
            self._write(self.current.end(answer.text or "") + "\n")
            self.current = None
        else:
            self._write(self._shown(self.prompts[index], answer) + "\n")

    def _prefix(self, prompt: Prompt) -> str:
        return "" if self.options.answers_only else f"{prompt.text or prompt.infill} -> "

    def _shown(self, prompt: Prompt, answer: Generation) -> str:
        if self.options.json:
            return answer.as_json(prompt.text, **({} if prompt.infill is None else {"infill": prompt.infill}))
        text = f"{self._prefix(prompt)}{answer.text}"
        if not self.options.replay:
            return text
        width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if self.out.isatty() else PLAIN_WIDTH
        return f"{text}\n{replay(answer, self.tokenizer, width, is_coloured(self.out))}"

    def _write(self, text: str) -> None:
        if self.progress is not None:
            self.progress.clear()
        self.out.write(text)
        self.out.flush()
        if self.progress is not None:
            self.progress.refresh()


class TextStream:
    """The text of an answer that grows, piece by piece: only what no later token can change is given out.

    Args:
        tokenizer: Decodes the answer.
        stop: The stop strings, whose beginnings are held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings | None = None) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = self.shown = ""
        self.start = self.read = 0  # text up to token `read` is known; decoding goes on from `start`, for its context

    def feed(self, tokens: list[int]) -> str:
        """Returns what is new, given all tokens so far."""
        before = self.tokenizer.decode(tokens[self.start : self.read])
        now = self.tokenizer.decode(tokens[self.start :])
        if len(now) == len(before) or not now.startswith(before) or now.endswith("\ufffd"):  # half a character
            return ""
        self.text += now[len(before) :]
        self.start, self.read = self.read, len(tokens)
        settled = self.text if self.stop is None else self.stop.settled(self.text)
        new = settled[len(self.shown) :]
        self.shown += new
        return new

    def end(self, text: str) -> str:
        """Returns what is missing to the whole text; all of it, on a line of its own, if what was shown was wrong."""
        return text[len(self.shown) :] if text.startswith(self.shown) else "\n" + text


def summary(answers: Sequence[Generation], seconds: float) -> str:
    """Returns one line: what it took."""
    tokens, forwards = sum(answer.new_tokens for answer in answers), sum(answer.nfe for answer in answers)
    line = (
        f"{count(len(answers), 'answer')}, {count(tokens, 'token')} in {count(forwards, 'forward')} "
        f"({tokens / max(forwards, 1):.2f} tokens/forward), {seconds:.2f} s "
        f"({tokens / max(seconds, 1e-9):.0f} tokens/s)"
    )
    cut = sum(answer.finish_reason == "length" for answer in answers)
    return f"{line}; {cut} reached the length limit" if cut else line


def count(number: int, noun: str) -> str:
    """Returns `1 token`, `2 tokens`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def is_coloured(stream: TextIO) -> bool:
    """Says whether a stream is a terminal whose user has not asked for plain text (no-color.org)."""
    return stream.isatty() and "NO_COLOR" not in os.environ


# -- replay ------------------------------------------------------------------------------------------------------------


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
    cells = [_token(token, tokenizer) for token in answer.tokens]
    forwards = sorted(set(steps) - {0})
    label = max(len(f"  forward {step}: ") for step in [*forwards, 1])

    def paint(text: str, step: int) -> str:
        if not colour or step == 0:
            return text
        place = round(forwards.index(step) * (len(COLOURS) - 1) / max(len(forwards) - 1, 1))
        return f"\033[38;5;{COLOURS[place]}m{text}\033[0m"

    lines = []
    if colour:
        legend = " ".join(paint(str(step), step) for step in forwards)
        lines += [f"  {'forward':<{label - 2}}{legend}"] if forwards else []
        for part in _wrapped([len(cell) for cell in cells], width - label):
            lines.append(" " * label + " ".join(paint(cells[i], steps[i]) for i in part))
    else:
        numbers = ["" if step == 0 else str(step) for step in steps]
        widths = [max(len(cell), len(number)) for cell, number in zip(cells, numbers, strict=True)]
        for part in _wrapped(widths, width - label):
            for name, row in (("token", cells), ("forward", numbers)):
                text = " ".join(row[i].ljust(widths[i]) for i in part)
                lines.append(f"  {name:<{label - 2}}{text}".rstrip())
    for step in forwards:
        lines.append(f"  forward {step}: ".ljust(label) + _state(cells, steps, step, width - label, paint))
    return "\n".join(lines)


def _token(token: int, tokenizer: Tokenizer) -> str:
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


def _state(cells: list[str], steps: list[int], step: int, width: int, paint: Callable[[str, int], str]) -> str:
    """Returns the answer after one forward on one line; what is far from its new tokens is left out."""
    row = [cell if when <= step else "_" for cell, when in zip(cells, steps, strict=True)]
    first, last = 0, len(row)
    if sum(map(len, row)) + len(row) - 1 > width:
        room = width - len("… ") - len(" …")
        new = steps.index(step)
        first = max(0, new - LEFT_IN_VIEW)
        while first < new and sum(map(len, row[first : new + 1])) + new - first > room:
            first += 1
        last = first + 1
        while last < len(row) and sum(map(len, row[first : last + 1])) + last - first <= room:
            last += 1
    pieces = [paint(row[i], steps[i]) if steps[i] <= step else row[i] for i in range(first, last)]
    return " ".join(["…"] * (first > 0) + pieces + ["…"] * (last < len(row)))
