"""The five record formats, and what is wrong with a record that fits none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = {
    "messages": ("messages",),
    "input_ids": ("input_ids",),
    "prompt": ("prompt", "response"),
    "response": ("prompt", "response"),
    "instruction": ("instruction", "output"),
    "output": ("instruction", "output"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant", "tool")


class RecordError(Exception):
    """What is wrong with one record; becomes an error with its place, or a count, as ``on_bad_record`` says."""


@dataclass(frozen=True)
class Turns:
    """A record as a conversation: texts, and which of them the model learns to write.

    Args:
        texts: the pieces in order.
        supervised: whether each piece is an answer.
    """

    texts: tuple[str, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True)
class Chat:
    """A record that goes through the tokenizer's chat template."""

    messages: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Ids:
    """A record that comes tokenized.

    Args:
        ids: prompt and answer.
        prompt_length: how many of them are the prompt.
    """

    ids: Sequence[int]
    prompt_length: int


def parse_record(record: Any, chat: bool) -> Turns | Chat | Ids:
    """Recognises the format of a record by its fields and checks them.

    Args:
        record: a dict with the fields of one of the five formats; other fields are ignored.
        chat: whether prompts and answers go through the chat template as well.

    Raises:
        RecordError: no such format, a missing or empty field, or one of the wrong type.
    """
    if not isinstance(record, dict):
        raise RecordError(f"is {_type_name(record)}, not an object with fields")
    found = next((fields for key, fields in FORMATS.items() if record.get(key) is not None), None)
    if found is None:
        names = ", ".join(map(str, record)) or "none"
        raise RecordError(
            f"has none of the fields messages, input_ids, prompt, instruction, text (its fields: {names}); rename them with columns"
        )
    for name in found:
        if record.get(name) is None:
            raise RecordError(f"lacks the field {name!r}")
    if found == ("messages",):
        return _parse_messages(record["messages"], chat)
    if found == ("input_ids",):
        return _parse_ids(record)
    if found == ("text",):
        return Turns((_text(record, "text", empty=False),), (True,))
    prompt = _text(record, found[0])
    if found[0] == "instruction" and record.get("input"):
        prompt = f"{prompt}\n\n{_text(record, 'input')}"
    answer = _text(record, found[1], empty=False)
    if chat:
        return Chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    return Turns((prompt, answer), (False, True))


def _parse_messages(messages: Any, chat: bool) -> Turns | Chat:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RecordError(f"field 'messages' is {_type_name(messages)}, not a list of turns")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RecordError(f"messages[{number}] is {_type_name(message)}, not an object with role and content")
        if message.get("role") not in ROLES:
            raise RecordError(f"messages[{number}] has role {message.get('role')!r}; roles are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RecordError(f"messages[{number}] has {_type_name(message.get('content'))} as content, not text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise RecordError(f"messages[{number}], a turn of the assistant, is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError("field 'messages' has no turn of the assistant")
    while messages[-1]["role"] != "assistant":  # nothing is learned from what follows the last answer
        messages = messages[:-1]
    if chat:
        return Chat(messages)
    return Turns(
        tuple(message["content"] for message in messages), tuple(message["role"] == "assistant" for message in messages)
    )


def _parse_ids(record: dict[str, Any]) -> Ids:
    ids = record["input_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # numpy and Arrow give arrays
    if not isinstance(ids, list) or not all(type(index) is int for index in ids):
        raise RecordError("field 'input_ids' is not a list of integers")
    length = record.get("prompt_length")
    length = 0 if length is None else length
    if type(length) is not int:
        raise RecordError(f"field 'prompt_length' is {_type_name(length)}, not an integer")
    if not 0 <= length < len(ids):
        raise RecordError(f"prompt_length {length} leaves no answer in {len(ids)} input_ids")
    return Ids(ids, length)


def _text(record: dict[str, Any], name: str, empty: bool = True) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise RecordError(f"field {name!r} is {_type_name(value)}, not text")
    if not empty and not value.strip():
        raise RecordError(f"field {name!r} is empty")
    return value


def _type_name(value: Any) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"
