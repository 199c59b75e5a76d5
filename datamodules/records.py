"""Records: the five formats a record may have, and the errors for a record that fits none of them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from dllm_var.errors import UserError
from dllm_var.text.tokenizer import ROLES

FIELDS = ("prompt", "response", "instruction", "input", "output", "messages", "input_ids", "prompt_length", "text")
# Fields that must be there, by format; a record with one of them is of the first such format.
FORMATS = [("messages",), ("input_ids",), ("prompt", "response"), ("instruction", "output"), ("text",)]
LONGEST_TEXT = 10_000_000  # characters, for each of which the tokenizer takes up to 200 bytes of memory


class Turns(NamedTuple):
    """A record as turns of ``role`` and ``content``, the last one the assistant's; the assistant's are learned."""

    messages: Sequence[dict[str, Any]]
    chat: bool  # whether they go through the tokenizer's chat template; otherwise one text follows the other


class Ids(NamedTuple):
    """A tokenized record: the ids of prompt and answer."""

    prompt: list[int]
    answer: list[int]


def parse_record(record: Any, chat: bool) -> Turns | Ids:
    """Recognises the format of a record by its fields and checks them; other fields are ignored.

    With `chat`, prompt and answer go through the chat template as messages do. Raises UserError, whose message follows
    the record's place, for a record that cannot be used.
    """
    if isinstance(record, UserError):  # the source could not read it
        raise record
    if not isinstance(record, dict):
        raise UserError(f"is {_type_name(record)}, not an object with fields")
    fields = next((fields for fields in FORMATS if any(record.get(name) is not None for name in fields)), None)
    if fields is None:
        names = ", ".join(map(str, record)) or "none"
        raise UserError(
            "has none of the fields messages, input_ids, prompt, instruction, text "
            f"(it has: {names}); columns can rename them"
        )
    for name in fields:
        if record.get(name) is None:
            raise UserError(f"lacks the field '{name}'")
    if fields == ("messages",):
        return _parse_messages(record["messages"])
    if fields == ("input_ids",):
        return _parse_ids(record)
    if fields == ("text",):
        _check_text(record["text"], "'text'")
        return Turns([{"role": "assistant", "content": record["text"]}], chat=False)
    prompt, answer = (record[name] for name in fields)
    _check_text(prompt, f"'{fields[0]}'", may_be_empty=True)
    if fields[0] == "instruction" and record.get("input"):
        _check_text(record["input"], "'input'")
        prompt = f"{prompt}\n\n{record['input']}"
    _check_text(answer, f"'{fields[1]}'")
    return Turns([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], chat)


def prompt_key(record: Any) -> int:
    """A fixed 64-bit hash of a record's prompt, or of all of a record without one; decides its split."""
    key: Any = record
    if isinstance(record, dict):
        if record.get("prompt") is not None:
            key = record["prompt"]
        elif record.get("instruction") is not None:
            key = [record["instruction"], record.get("input") or ""]
        elif isinstance(messages := record.get("messages"), (list, tuple)):
            # Conversations that begin alike are kept together: the key is of the turns before the first answer.
            roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
            key = list(messages[: roles.index("assistant")] if "assistant" in roles else messages)
        elif isinstance(record.get("input_ids"), list) and type(record.get("prompt_length")) is int:
            key = record["input_ids"][: record["prompt_length"]] or record["input_ids"]
    return int.from_bytes(hashlib.blake2b(json.dumps(key, default=str).encode(), digest_size=8).digest(), "big")


def _parse_messages(messages: Any) -> Turns:
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"has {_type_name(messages)} as 'messages', not a list of turns")
    last_answer = None
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"has {_type_name(message)} as messages[{number}], not an object with role and content")
        if message.get("role") not in ROLES:
            raise UserError(f"has role {message.get('role')!r} in messages[{number}]; roles are {', '.join(ROLES)}")
        _check_text(message.get("content"), f"'content' of messages[{number}]", message["role"] != "assistant")
        last_answer = number if message["role"] == "assistant" else last_answer
    if last_answer is None:
        raise UserError("has no turn of the assistant in 'messages'")
    return Turns(messages[: last_answer + 1], chat=True)  # nothing is learned from what follows the last answer


def _parse_ids(record: dict[str, Any]) -> Ids:
    ids, length = record["input_ids"], record.get("prompt_length")
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # an array
    if not isinstance(ids, list) or not all(type(index) is int for index in ids):
        raise UserError("has something else than a list of integers as 'input_ids'")
    length = 0 if length is None else length
    if type(length) is not int:
        raise UserError(f"has {_type_name(length)} as 'prompt_length', not an integer")
    if not 0 <= length < len(ids):
        raise UserError(f"leaves no answer: prompt_length is {length} of {len(ids)} input_ids")
    return Ids(ids[:length], ids[length:])


def _check_text(value: Any, name: str, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise UserError(f"has {_type_name(value)} as {name}, not text")
    if not may_be_empty and not value.strip():
        raise UserError(f"has an empty {name}")
    if len(value) > LONGEST_TEXT:
        raise UserError(f"has {len(value):,} characters in {name}: split it into records of at most {LONGEST_TEXT:,}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise UserError(f"has broken Unicode in {name}") from None


def _type_name(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
