"""Builds the objects that settings describe by `class_path` and `init_args`."""

from __future__ import annotations

from typing import Any

from dllm_var.errors import UserError
from dllm_var.settings import SettingsParser


def build(kind: type, name: str, described: str | dict[str, Any], where: str) -> Any:
    """Builds an object of a class or of one of its subclasses.

    Args:
        kind: The class.
        name: Name of the setting in messages, such as `sampler`.
        described: A class path, or a dictionary with `class_path` and `init_args`.
        where: The part of the settings it stands in, for messages.

    Raises:
        UserError: When there is no such class, or it does not take these arguments.
    """
    parser = SettingsParser()
    parser.add_subclass_arguments(kind, name, as_group=False, required=True)
    try:
        return parser.instantiate(parser.parse_object({name: described}))[name]
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise UserError(f"{where}: {cause}") from error
