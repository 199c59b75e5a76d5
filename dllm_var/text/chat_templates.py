"""Conversations as text: chat templates are Jinja sources that come with a tokenizer.

They are rendered as transformers renders them (same environment, same globals), without importing it. A template is a
program of whoever wrote the checkpoint, so it runs in Jinja's sandbox.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dllm_var.errors import UserError, one_line

Message = dict[str, Any]
Span = tuple[int, int]


class ChatTemplate:
    """Turns messages, which have ``role`` and ``content``, into text; raises UserError when its source is not valid."""

    def __init__(self, source: str, named_tokens: dict[str, str]) -> None:
        self.named_tokens = named_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # also what Python says of Jinja's code, as when loops are nested too deep
            raise UserError(f"the chat template is not valid: {one_line(error)[:300]}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the text of a conversation, with `add_generation_prompt` up to where the assistant answers.

        Raises UserError when the template refuses the messages or fails on them.
        """
        values = {"messages": list(messages), "tools": None, "documents": None, **self.named_tokens}
        try:
            return self._template.render(add_generation_prompt=add_generation_prompt, **values)
        except Exception as error:  # the template's own, or whatever an operation of Python raises
            raise UserError(f"the chat template cannot render the messages: {one_line(error)[:300]}") from error

    def render_answers(self, messages: Sequence[Message], terminators: Sequence[str]) -> tuple[str, list[Span]]:
        """Returns the text of a conversation and where in it the assistant's turns stand, terminators included.

        A turn begins where the template's own generation prompt ends, so that training sees the start of generation.
        Raises UserError when that cannot be told, or an answer has a terminator inside or none at its end.
        """
        text = self.render(messages)
        starts = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            spelled = next((end for end in terminators if end in message["content"]), None)
            if spelled is not None:
                raise UserError(f"messages[{number}] contains the terminator {spelled}: an answer would end there")
            prompt = self.render(messages[:number], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise UserError(f"the chat template renders messages[:{number}] differently once an answer follows")
            starts.append(len(prompt))
        spans = []
        for start, limit in pairwise([*starts, len(text)]):
            ends = [(at, at + len(end)) for end in terminators if (at := text.find(end, start, limit)) >= 0]
            if not ends:
                raise UserError(
                    f"the chat template ends an answer with {text[start:limit][-20:]!r}, which holds no terminator "
                    f"({', '.join(terminators)}); set data.terminators to the token that ends a turn"
                )
            spans.append((start, min(ends)[1]))
        return text, spans


class _Generation(Extension):
    """Reads the tag ``{% generation %}``, with which transformers marks answers; it leaves the text as it is."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# The arguments that transformers' filter has and no more: json would call what others name, past the sandbox.
def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
