"""Conversations as token ids: chat templates are Jinja sources that come with a tokenizer.

Rendered as transformers renders them (same environment, same globals), without importing it. A template is a program of
whoever wrote the checkpoint: it runs in Jinja's sandbox, and not for long.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from dllm_var.errors import UserError
from dllm_var.text.special_text import Piece, mark_messages, split_marked

if TYPE_CHECKING:
    from dllm_var.text.tokenizer import Tokenizer

Message = dict[str, Any]
Span = tuple[int, int]

SECONDS = 2.0  # of processor time that rendering a conversation may take; real templates take less than a thousandth
LARGEST = 10**7  # characters, items or bits that an operation of a template may give


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and which of them are supervised: the assistant's turns with their terminators.

    Each turn is encoded from where the template's generation prompt ends, so that training sees the ids that generation
    starts from. What follows the last answer's terminator is left out. A special token that a message spells is text
    like any other; only the template writes special tokens.

    Args:
        tokenizer: With a chat template; without one turns simply follow each other, answers ended by the terminator.
        messages: Turns with ``role`` and ``content``, the last one the assistant's.

    Raises:
        UserError: When the template refuses the messages, ends an answer with something that is no terminator, or marks
            other text as generated than what follows its own generation prompt; when an answer spells a terminator that
            is no special token.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    for piece in chat_pieces(tokenizer, messages):
        piece_ids = tokenizer.encode(piece.text, piece.special_tokens)
        if piece.supervised and tokenizer.chat_template is None:
            piece_ids = [*piece_ids, tokenizer.terminator_id]
        ids += piece_ids
        supervised += [piece.supervised] * len(piece_ids)
    return ids, supervised


def chat_pieces(tokenizer: Tokenizer, messages: Sequence[Message], refuse: bool = False) -> list[Piece]:
    """Texts that a conversation is encoded from, one by one.

    Args:
        tokenizer: With a chat template, answers have their terminators; without one, turns are as they are.
        messages: As for `encode_chat`, and what is raised, too.
        refuse: Raises an error for a message that spells a special token.
    """
    if tokenizer.chat_template is None:
        return [Piece(message["content"], message["role"] == "assistant", refuse) for message in messages]
    messages = mark_messages(tokenizer, messages, refuse)
    text, generated = render(tokenizer, messages)
    pieces: list[Piece] = []
    done = 0
    for start, stop in _answers(tokenizer, messages, text, generated):
        pieces += split_marked(tokenizer, text[done:start], supervised=False)
        pieces += split_marked(tokenizer, text[start:stop], supervised=True)
        done = stop
    return pieces


def encode_chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next turn begins.

    Args:
        tokenizer: With a chat template; without one turns simply follow each other.
        messages: Turns with ``role`` and ``content``; a special token that they spell is text like any other.
    """
    if tokenizer.chat_template is None:
        return encode_chat(tokenizer, messages)[0]
    text = render(tokenizer, mark_messages(tokenizer, messages), add_generation_prompt=True)[0]
    return encode_rendered(tokenizer, text)


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text.

    Args:
        tokenizer: Whose template it was rendered with.
        text: Rendered from messages of `dllm_var.text.special_text.mark_messages`.
    """
    pieces = split_marked(tokenizer, text, supervised=False)
    return list(chain.from_iterable(tokenizer.encode(piece.text, piece.special_tokens) for piece in pieces))


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    """Text of a conversation and the spans its template marks as generated.

    Args:
        tokenizer: With a chat template.
        messages: Turns with ``role`` and ``content``.
        add_generation_prompt: Ends with what introduces the assistant's next turn.

    Raises:
        UserError: When the template cannot be read, refuses the messages or fails on them, or does not come to an end.
    """
    assert tokenizer.chat_template is not None
    template, run = _compile(tokenizer.chat_template)
    values = {"messages": list(messages), "tools": None, "documents": None, **tokenizer.named_tokens}
    try:
        with run.recording() as (blocks, marked):
            for block in template.generate(add_generation_prompt=add_generation_prompt, **values):
                blocks.append(block)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the messages: {_one_line(error)}") from None
    except Exception as error:  # whatever an operation of Python raises
        raise UserError(f"the chat template fails: {type(error).__name__}: {_one_line(error)}") from error
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


class _Run(Extension):
    """One rendering: what the ``{% generation %}`` tag marks as the assistant's, and the time that is left."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)
    blocks: list[str] | None = None
    marked: list[Span]
    deadline: float

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        text = caller()
        if self.blocks is not None:
            start = len("".join(self.blocks))
            self.marked.append((start, start + len(text)))
        return text

    @contextmanager
    def recording(self) -> Iterator[tuple[list[str], list[Span]]]:
        """Lists the rendered blocks, which the caller fills, and the spans that were marked."""
        self.blocks, self.marked, self.deadline = [], [], time.thread_time() + SECONDS
        try:
            yield self.blocks, self.marked
        finally:
            self.blocks = None

    def _check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise jinja2.TemplateRuntimeError(f"it is not done after {SECONDS:g} seconds")

    def _concat(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)


class _Bounded(NodeTransformer):
    """Makes every loop and macro of a template look at the time, and every `~` at the length of its result."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def visit_For(self, node: Any) -> Any:
        node.body.insert(0, nodes.ExprStmt(self.run.call_method("_check_time")))
        return self.generic_visit(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return self.run.call_method("_concat", node.nodes, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no sum, product or power is larger than `LARGEST`."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
        if operator == "**" and all(isinstance(size, int) for size in sizes):
            check_size(sizes[0].bit_length() * sizes[1])
        elif operator == "*" and sizes != [left, right]:
            check_size(sizes[0] * sizes[1])
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            check_size(sizes[0] + sizes[1])
        return super().call_binop(context, operator, left, right)


def check_size(size: float) -> None:
    """Raises jinja2.TemplateRuntimeError for a value that is too large for a conversation."""
    if size > LARGEST:
        raise jinja2.TemplateRuntimeError(f"it makes a value larger than {LARGEST:,}")


@lru_cache
def _compile(source: str) -> tuple[jinja2.Template, _Run]:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Run, loopcontrols])
    run: _Run = environment.extensions[_Run.identifier]  # type: ignore[assignment]

    # The arguments that transformers' has and no more: json would call what others name, past the sandbox.
    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(_Bounded(run).visit(environment.parse(source))), run
    except Exception as error:  # also what Python says of the code that Jinja makes, as when loops are nested too deep
        raise UserError(f"the chat template is not valid: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
