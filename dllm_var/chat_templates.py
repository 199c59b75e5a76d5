"""Conversations as token ids: chat templates are Jinja sources that come with a tokenizer.

Rendered as transformers renders them (same environment, same globals), without importing it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dllm_var.errors import UserError

if TYPE_CHECKING:
    from dllm_var.tokenization import Tokenizer

Message = dict[str, Any]
Span = tuple[int, int]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and which of them are supervised: the assistant's turns with their terminators.

    Each turn is encoded from where the template's generation prompt ends, so that training sees the ids that generation
    starts from. What follows the last answer's terminator is left out.

    Args:
        tokenizer: With a chat template; without one turns simply follow each other, answers ended by the terminator.
        messages: Turns with ``role`` and ``content``, the last one the assistant's.

    Raises:
        UserError: When the template refuses the messages, ends an answer with something that is no terminator, or marks
            other text as generated than what follows its own generation prompt; when an answer spells a terminator.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    for piece, is_answer in chat_pieces(tokenizer, messages):
        piece_ids = tokenizer.encode(piece)
        if is_answer and tokenizer.chat_template is None:
            piece_ids = [*piece_ids, tokenizer.terminator_id]
        ids += piece_ids
        supervised += [is_answer] * len(piece_ids)
    return ids, supervised


def chat_pieces(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Texts that a conversation is encoded from, one by one, and which of them are answers.

    Args:
        tokenizer: With a chat template, answers have their terminators; without one, turns are as they are.
        messages: As for `encode_chat`, and what is raised, too.
    """
    if tokenizer.chat_template is None:
        return [(message["content"], message["role"] == "assistant") for message in messages]
    text, marked = render(tokenizer, messages)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for start, stop in _answers(tokenizer, messages, text, marked):
        pieces += [(text[done:start], False), (text[start:stop], True)]
        done = stop
    return pieces


def encode_chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins.

    Args:
        tokenizer: With a chat template; without one turns simply follow each other.
        messages: Turns with ``role`` and ``content``.
    """
    if tokenizer.chat_template is None:
        return encode_chat(tokenizer, messages)[0]
    return tokenizer.encode(render(tokenizer, messages, add_generation_prompt=True)[0])


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    """Text of a conversation and the spans its template marks as generated.

    Args:
        tokenizer: With a chat template.
        messages: Turns with ``role`` and ``content``.
        add_generation_prompt: Ends with what introduces the assistant's next turn.

    Raises:
        UserError: When the template cannot be read or refuses the messages.
    """
    assert tokenizer.chat_template is not None
    template, tracker = _compile(tokenizer.chat_template)
    values = {"messages": list(messages), "tools": None, "documents": None, **tokenizer.named_tokens}
    try:
        with tracker.recording() as (blocks, marked):
            for block in template.generate(add_generation_prompt=add_generation_prompt, **values):
                blocks.append(block)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the messages: {error}") from None
    return "".join(blocks), marked


def _answers(tokenizer: Tokenizer, messages: Sequence[Message], text: str, marked: list[Span]) -> Iterator[Span]:
    """Where in the text each answer stands, its terminator included."""
    terminators = [tokenizer.id_to_token(index) for index in tokenizer.terminator_ids]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    starts = []
    for number in turns:
        spelled = next((end for end in terminators if end in messages[number]["content"]), None)
        if spelled is not None:
            raise UserError(f"messages[{number}] contains the terminator {spelled}: an answer would end there")
        prompt = render(tokenizer, messages[:number], add_generation_prompt=True)[0]
        if not text.startswith(prompt):
            raise UserError(f"the chat template renders messages[:{number}] differently once an answer follows")
        starts.append(len(prompt))
    for start, limit in pairwise([*starts, len(text)]):
        found = [(at, at + len(end)) for end in terminators if (at := text.find(end, start, limit)) >= 0]
        if not found:
            raise UserError(
                f"the chat template ends an answer with {text[start:limit][-20:]!r}, which holds no terminator "
                f"({', '.join(terminators)}); set data.terminators to the token that ends a turn"
            )
        content_end, stop = min(found)
        inside = [span for span in marked if start <= span[0] < limit]
        # Marks may leave out the terminator or take in the line break after it, but must hold the answer and no more.
        if marked and (not inside or text[start : inside[0][0]].strip() or text[inside[-1][1] : content_end].strip()):
            raise UserError("the chat template's {% generation %} marks disagree with its own generation prompt")
        yield start, stop


class _Generation(Extension):
    """The ``{% generation %}`` tag, which some templates put around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)
    blocks: list[str] | None = None
    marked: list[Span]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        text = caller()
        if self.blocks is not None:
            start = len("".join(self.blocks))
            self.marked.append((start, start + len(text)))
        return text

    @contextmanager
    def recording(self) -> Iterator[tuple[list[str], list[Span]]]:
        """Lists the rendered blocks, which the caller fills, and the spans that were marked."""
        self.blocks, self.marked = [], []
        try:
            yield self.blocks, self.marked
        finally:
            self.blocks = None


@lru_cache
def _compile(source: str) -> tuple[jinja2.Template, _Generation]:
    # Templates come with downloaded tokenizers: they run in the sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def to_json(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is not valid: {error}") from None
    return template, environment.extensions[_Generation.identifier]  # type: ignore[return-value]
