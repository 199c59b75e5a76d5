"""Prompts of `generate`, from the command line, files and standard input, as token ids; its answers, as text."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jsonargparse import Namespace
from tqdm import tqdm

from dllm_var.errors import UserError
from dllm_var.files import parse_json
from dllm_var.text.tokenizer import ROLES

if TYPE_CHECKING:
    from dllm_var.sampling import Generation
    from dllm_var.text.tokenizer import Tokenizer

_GAP = re.compile(r"<gap:0*([1-9]\d{0,5})>")
PLAIN_WIDTH = 100  # columns of a replay that is not shown in a terminal


@dataclass(frozen=True)
class Prompt:
    """One thing to decode."""

    text: str  # as it is shown: what the user wrote, or said last
    ids: list[int]  # what the model reads before the answer
    infill: str | None = None  # the answer with gaps, as it was written
    infill_ids: list[int] | None = None  # its token ids, the mask id wherever a token is wanted


def read_prompts(options: Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """Returns the prompts of the options, in order; raises UserError, which names the place of a prompt it refuses."""
    if options.chat and tokenizer.chat_template is None:
        raise UserError("--chat: the checkpoint's tokenizer has no chat template; leave out --chat")
    prompts = []
    for place, record in _records(options):
        try:
            prompts.append(_encode(record, tokenizer, options.chat, options.system))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not prompts:
        raise UserError("no prompts: give --prompt TEXT, --prompts-file FILE or lines on standard input")
    if len({prompt.infill is None for prompt in prompts}) > 1:
        raise UserError("some prompts have an infill text and some have none: decode them in two runs")
    return prompts


def _records(options: Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of each prompt, for messages, and the prompt as a line of a .jsonl file has it."""
    given, infills = options.prompt or [], options.infill or []
    if infills and given and len(given) != len(infills):
        raise UserError(
            f"{len(given)} --prompt and {len(infills)} --infill: give a prompt for each infill text, or none"
        )
    for prompt, infill in zip_longest(given, infills):
        yield "--prompt" if infill is None else "--infill", {"prompt": prompt, "infill": infill}
    if infills:
        return
    name = options.prompts_file
    try:
        if name not in (None, "-"):
            yield from _lines(Path(name).read_text(encoding="utf-8-sig"), name, Path(name).suffix == ".jsonl")
        elif name == "-" or (not given and not sys.stdin.isatty()):
            yield from _lines(sys.stdin.read(), "standard input", is_json=False)
    except (OSError, UnicodeDecodeError) as error:
        place = f"--prompts-file: cannot read '{name}'" if name not in (None, "-") else "cannot read standard input"
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{place}: {reason}") from error


def _lines(text: str, name: str, is_json: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        place = f"{name}, line {number}"
        if not is_json:
            yield place, {"prompt": line.strip()}
        elif line.strip():
            yield place, _from_json(line, place)


def _from_json(line: str, place: str) -> dict[str, Any]:
    record = parse_json(line, place)
    if not isinstance(record, dict) or not record.keys() & {"prompt", "messages", "infill"}:
        raise UserError(f'{place}: expected an object with "prompt", "messages" or "infill"')
    for name in ("prompt", "infill"):
        if not isinstance(record.get(name, ""), str):
            raise UserError(f'{place}: "{name}" must be text, got {json.dumps(record[name])}')
    messages = record.get("messages")
    if messages is None:
        return record
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        roles = ", ".join(ROLES)
        raise UserError(f'{place}: "messages" must be a list of objects with content and role, one of {roles}')
    if messages and messages[-1]["role"] == "assistant":  # a record of training data: that turn is asked for
        messages = messages[:-1]
    if not messages:
        raise UserError(f'{place}: "messages" has no turn to answer')
    return {**record, "messages": messages}


def _encode(record: dict[str, Any], tokenizer: Tokenizer, chat: bool, system: str | None) -> Prompt:
    messages, text, infill = (record.get(name) for name in ("messages", "prompt", "infill"))
    ids: list[int] = []
    if chat and messages is None and text is not None:
        messages = [{"role": "user", "content": text}]
    if messages is not None:
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        for turn in messages:
            _check(turn["content"], tokenizer)
        text, ids = messages[-1]["content"], tokenizer.encode_chat_prompt(messages)
    elif text is not None:
        _check(text, tokenizer)
        ids = tokenizer.encode(text)
    return Prompt(text or "", ids, infill, None if infill is None else encode_gaps(infill, tokenizer))


def encode_gaps(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns a text's token ids with one mask id for each token of a gap, `<gap:N>`.

    Blanks left of a gap belong to it: most tokenizers write the blank between words into the second word's token.
    Raises UserError when there is no gap, or one without a length.
    """
    pieces = _GAP.split(text)  # text, length, text, length, text
    malformed = next((found[0] for piece in pieces[::2] if (found := re.search(r"<gap[^>]*>?", piece))), None)
    if malformed is not None:
        raise UserError(
            f"the gap {malformed} has no length to be filled; write <gap:3> for three tokens "
            "(gaps of unknown length are not supported)"
        )
    if len(pieces) == 1:
        raise UserError(f"'{text}' has no gap; write <gap:3> where three tokens are missing")
    ids: list[int] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            ids += [tokenizer.mask_id] * int(piece)
            continue
        piece = piece.rstrip(" ") if index + 1 < len(pieces) else piece
        if piece.strip():
            _check(piece, tokenizer)
            ids += tokenizer.encode(piece)
    return ids


def _check(text: str, tokenizer: Tokenizer) -> None:
    """Raises UserError for text that is empty or that the vocabulary cannot spell."""
    if not text.strip():
        raise UserError("it is empty: give at least one token")
    try:
        spans = tokenizer.spans(text)
    except (TypeError, UnicodeEncodeError) as error:  # half a character, from a terminal that is not set to UTF-8
        raise UserError(f"it is not valid Unicode: {text!r}") from error
    unknown = next((text[start:stop] for index, start, stop in spans if index == tokenizer.unknown_id), None)
    if unknown is not None:
        raise UserError(f"'{text[:80]}': the checkpoint's vocabulary has nothing for '{unknown[:80]}'")


def token_ids(names: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of tokens given by text, name in the vocabulary, or `id:N`; a text must be one token."""
    ids = []
    for name in names:
        number = name.removeprefix("id:")
        index = int(number) if number != name and number.isdecimal() else tokenizer.backend.token_to_id(name)
        if index is None:
            encoded = tokenizer.encode(name)
            if len(encoded) != 1 or encoded[0] == tokenizer.unknown_id:
                pieces = " ".join(repr(tokenizer.id_to_token(index)) for index in encoded)
                known = f"it is {len(encoded)} tokens, {pieces}" if len(encoded) > 1 else "the vocabulary has none"
                raise UserError(f"--suppress: '{name}' is not one token: {known}; give a token's text, or id:N")
            index = encoded[0]
        ids.append(index)
    return ids


# -- answers -----------------------------------------------------------------------------------------------------------


class AnswerPrinter:
    """Prints answers in the order of their prompts; the answer of a single prompt may be streamed block by block.

    `options` are those of `generate`: `json`, `replay`, `answers_only`, `stream`, `no_stream` and `stop`.
    """

    def __init__(self, out: TextIO, prompts: Sequence[Prompt], tokenizer: Tokenizer, options: Namespace) -> None:
        self.out, self.prompts, self.tokenizer, self.options = out, prompts, tokenizer, options
        whole = options.no_stream or options.json or options.replay or prompts[0].infill is not None
        self.streams = options.stream or (out.isatty() and len(prompts) == 1 and not whole)
        self.streamed: str | None = None  # what a stream has shown of the answer
        self.next = 0  # the prompt whose answer is printed next
        self.waiting: dict[int, Generation] = {}
        self.done: list[Generation] = []
        hidden = len(prompts) == 1 or out.isatty() or not sys.stderr.isatty()
        self.progress = tqdm(total=len(prompts), unit=" answers", leave=False, disable=hidden)

    def on_block(self, index: int, tokens: list[int]) -> None:
        """Shows what is new in the only answer, but for what later tokens may change."""
        text = self.tokenizer.decode(tokens).rstrip("\ufffd")  # half a character
        if self.options.stop:
            from dllm_var.sampling.stopping import StopStrings

            text = StopStrings(self.options.stop, self.tokenizer).settled(text)
        if self.streamed is None:
            self._write(self._prefix(self.prompts[index]))
            self.streamed = ""
        if text.startswith(self.streamed):
            self._write(text[len(self.streamed) :])
            self.streamed = text

    def on_answer(self, index: int, answer: Generation) -> None:
        """Prints an answer, or keeps it until those before it are there."""
        self.waiting[index] = answer
        self.done.append(answer)
        self.progress.update()
        while self.next in self.waiting:
            self._print(self.next, self.waiting.pop(self.next))
            self.next += 1

    def interrupt(self) -> None:
        """Prints the answers that wait for one that will not come."""
        self.progress.close()
        if self.streamed is not None:
            self._write("\n")
        for index in sorted(self.waiting):
            self._print(index, self.waiting.pop(index))

    def _print(self, index: int, answer: Generation) -> None:
        if self.streamed is None:
            self._write(self._shown(self.prompts[index], answer) + "\n")
            return
        text, shown = answer.text or "", self.streamed
        self._write((text[len(shown) :] if text.startswith(shown) else f"\n{text}") + "\n")
        self.streamed = None

    def _prefix(self, prompt: Prompt) -> str:
        return "" if self.options.answers_only else f"{prompt.text or prompt.infill} -> "

    def _shown(self, prompt: Prompt, answer: Generation) -> str:
        if self.options.json:
            return answer.as_json(prompt.text, **({} if prompt.infill is None else {"infill": prompt.infill}))
        text = f"{self._prefix(prompt)}{answer.text}"
        if not self.options.replay:
            return text
        from dllm_var.cli.replay import replay

        width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if self.out.isatty() else PLAIN_WIDTH
        return f"{text}\n{replay(answer, self.tokenizer, width, is_coloured(self.out))}"

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


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
