"""Conversations as text: chat templates are Jinja sources that come with a tokenizer.

They are rendered as transformers renders them (same environment, same globals), without importing it. A template is a
program of whoever wrote the checkpoint: it runs in Jinja's sandbox, and not for long.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from dllm_var.errors import UserError, one_line

Message = dict[str, Any]
Span = tuple[int, int]

SECONDS = 2.0  # of processor time that rendering a conversation may take; real templates take less than a thousandth
LARGEST = 10**7  # characters, items or bits that an operation of a template may give


class ChatTemplate:
    """Turns messages, which have ``role`` and ``content``, into text.

    Raises:
        UserError: When the source is no valid template.
    """

    def __init__(self, source: str, named_tokens: dict[str, str]) -> None:
        self.named_tokens = named_tokens
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Run, loopcontrols])
        self._run: _Run = environment.extensions[_Run.identifier]  # type: ignore[assignment]
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(_Bounded(self._run).visit(environment.parse(source)))
        except Exception as error:  # also what Python says of Jinja's code, as when loops are nested too deep
            raise UserError(f"the chat template is not valid: {_one_line(error)}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Returns the text of a conversation and the spans that the template marks as generated.

        With `add_generation_prompt` the text ends with what introduces the assistant's next turn.

        Raises:
            UserError: When the template refuses the messages, fails on them or does not come to an end.
        """
        values = {"messages": list(messages), "tools": None, "documents": None, **self.named_tokens}
        blocks = self._run.begin()
        try:
            for block in self._template.generate(add_generation_prompt=add_generation_prompt, **values):
                blocks.append(block)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the messages: {_one_line(error)}") from None
        except Exception as error:  # whatever an operation of Python raises
            raise UserError(f"the chat template fails: {type(error).__name__}: {_one_line(error)}") from error
        return "".join(blocks), self._run.marked

    def render_answers(self, messages: Sequence[Message], terminators: Sequence[str]) -> tuple[str, list[Span]]:
        """Returns the text of a conversation and where in it the assistant's turns stand, terminators included.

        A turn begins where the template's own generation prompt ends, so that training sees the start of generation.

        Raises:
            UserError: When an answer has a terminator inside or none at its end, when what precedes an answer is
                rendered differently once it follows, or when ``{% generation %}`` marks say otherwise.
        """
        text, marked = self.render(messages)
        starts = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            spelled = next((end for end in terminators if end in message["content"]), None)
            if spelled is not None:
                raise UserError(f"messages[{number}] contains the terminator {spelled}: an answer would end there")
            prompt = self.render(messages[:number], add_generation_prompt=True)[0]
            if not text.startswith(prompt):
                raise UserError(f"the chat template renders messages[:{number}] differently once an answer follows")
            starts.append(len(prompt))
        spans = [_answer(text, start, limit, terminators, marked) for start, limit in pairwise([*starts, len(text)])]
        return text, spans


def _answer(text: str, start: int, limit: int, terminators: Sequence[str], marked: Sequence[Span]) -> Span:
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
    return start, stop


class _Run(Extension):
    """One rendering: what the ``{% generation %}`` tag marks as the assistant's, and the time that is left."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def begin(self) -> list[str]:
        """Starts the clock and returns the list that the caller puts rendered blocks into."""
        self.blocks: list[str] = []
        self.marked: list[Span] = []
        self.deadline = time.thread_time() + SECONDS
        return self.blocks

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        text = caller()
        start = len("".join(self.blocks))
        self.marked.append((start, start + len(text)))
        return text

    def _check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise jinja2.TemplateRuntimeError(f"it is not done after {SECONDS:g} seconds")

    def _concat(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
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
            _check_size(sizes[0].bit_length() * sizes[1])
        elif operator == "*" and sizes != [left, right]:
            _check_size(sizes[0] * sizes[1])
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(sizes[0] + sizes[1])
        return super().call_binop(context, operator, left, right)


def _check_size(size: float) -> None:
    if size > LARGEST:
        raise jinja2.TemplateRuntimeError(f"it makes a value larger than {LARGEST:,}")


# The arguments that transformers' filter has and no more: json would call what others name, past the sandbox.
def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    return one_line(error)[:300]
