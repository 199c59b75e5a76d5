"""Prompts and conversations of users, as the token ids that a model reads before it answers."""

import json
from collections.abc import Sequence
from typing import Any

from dllm_var.errors import UserError
from dllm_var.text.tokenizer import ROLES, Tokenizer


def encode_prompt(text: Any, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a text; raises UserError when it is empty or the vocabulary cannot spell it."""
    if not isinstance(text, str):
        raise UserError(f"it must be text, got {json.dumps(text)}")
    if not text.strip():
        raise UserError("it is empty: give at least one token")
    try:
        spans = tokenizer.spans(text)
    except (TypeError, UnicodeEncodeError) as error:  # half a character, from a terminal that is not set to UTF-8
        raise UserError(f"it is not valid Unicode: {text!r}") from error
    unknown = next((text[start:stop] for index, start, stop in spans if index == tokenizer.unknown_id), None)
    if unknown is not None:
        raise UserError(f"'{text[:80]}': the checkpoint's vocabulary has nothing for '{unknown[:80]}'")
    ids = [index for index, _, _ in spans]
    tokenizer.check_plain(ids)
    return ids


def encode_conversation(turns: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a conversation up to where the answer begins; raises UserError as `encode_prompt`."""
    if not turns or not all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in turns):
        roles = ", ".join(ROLES)
        raise UserError(f'"messages" must be a list of turns to answer, with content and role, one of {roles}')
    for turn in turns:
        encode_prompt(turn.get("content"), tokenizer)
    return tokenizer.encode_chat_prompt(turns)
