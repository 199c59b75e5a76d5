"""Plain values from files that others may have written: they are compared with what is expected before any is used."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from dllm_var.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file of settings by name.

    Raises:
        UserError: When it cannot be read, is not JSON, or holds something else.
    """
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings by name, not {type(content).__name__}: the file is damaged")
    return content


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        UserError: When it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text") from error


def parse_json(text: str, where: str | Path) -> Any:
    """Returns what JSON text says.

    Raises:
        UserError: When it is not valid JSON; names the place.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{where} is not valid JSON: {reason}") from error


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type of an annotation: bool, int, float, str, None, words, lists, dicts and unions.

    `True` is no number, and a float must be finite; a whole number may stand for a float.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in inner)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, inner[0]) and fits(value[key], inner[1]) for key in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is kind
