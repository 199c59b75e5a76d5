"""Where `generate` puts its answers: in order, each as soon as it is there, block by block when asked to stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dllm_var.cli.generate_prompts import Prompt
from dllm_var.files import open_output

if TYPE_CHECKING:
    from dllm_var.sampling import Generation
    from dllm_var.sampling.stopping import StopStrings
    from dllm_var.text.tokenizer import Tokenizer


class Output:
    """Standard output, or a file that gets its name when it is complete.

    Args:
        path: The file; standard output when None or `-`.

    Raises:
        UserError: When the file cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self.file = None if path in (None, "-") else open_output("--output", str(path))
        self.stream: TextIO = sys.stdout if self.file is None else self.file.stream
        self.name = "standard output" if self.file is None else str(path)

    def complete(self) -> None:
        """Gives the file its name."""
        if self.file is None:
            self.stream.flush()
        else:
            self.file.complete()

    def abandon(self) -> Path | None:
        """Leaves what has been written under the name of a partial file, and returns it; nothing leaves no file."""
        return None if self.file is None else self.file.abandon()


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


class AnswerPrinter:
    """Prints answers in the order of their prompts.

    Args:
        out: Where to.
        prompts: The prompts.
        show: Makes an answer's lines.
        prefix: Makes what stands before an answer that is streamed.
        new_stream: Makes the stream of one answer; answers are printed whole when null.
        progress: A progress bar (tqdm) that steps aside and counts.
    """

    def __init__(
        self,
        out: TextIO,
        prompts: Sequence[Prompt],
        show: Callable[[Prompt, Generation], str],
        prefix: Callable[[Prompt], str],
        new_stream: Callable[[], TextStream] | None = None,
        progress: Any = None,
    ) -> None:
        self.out, self.prompts, self.show, self.prefix = out, prompts, show, prefix
        self.new_stream, self.progress = new_stream, progress
        self.next = 0  # the prompt whose answer is printed next
        self.waiting: dict[int, Generation] = {}
        self.latest: dict[int, list[int]] = {}
        self.current: TextStream | None = None
        self.done: list[Generation] = []

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
        if self.current is not None:
            self.current = None
            self._write("\n")
        for index in sorted(self.waiting):
            self._print(index, self.waiting.pop(index))

    def _stream(self, tokens: list[int]) -> None:
        if self.new_stream is None:
            return
        if self.current is None:
            self.current = self.new_stream()
            self._write(self.prefix(self.prompts[self.next]))
        self._write(self.current.feed(tokens))

    def _print(self, index: int, answer: Generation) -> None:
        if self.current is not None:
            self._write(self.current.end(answer.text or "") + "\n")
            self.current = None
        else:
            self._write(self.show(self.prompts[index], answer) + "\n")

    def _write(self, text: str) -> None:
        if self.progress is not None:
            self.progress.clear()
        self.out.write(text)
        self.out.flush()
        if self.progress is not None:
            self.progress.refresh()


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
