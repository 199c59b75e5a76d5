"""Samplers as plain data: what a checkpoint remembers of how it is meant to be decoded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from dllm_var.errors import UserError
from dllm_var.sampling.base import Sampler

_PLAIN = (str, int, float, bool, type(None))


def sampler_to_config(sampler: Any) -> dict[str, Any] | None:
    """Returns `{"class_path": ..., "init_args": {...}}` of a sampler or policy.

    Works for every class that keeps its arguments as attributes of the same name: plain values, lists of them and
    objects of the same kind. Null where one does not, or takes arguments without a name (`**kwargs`).
    """
    kind = type(sampler)
    try:
        bare = kind.__init__ is object.__init__ and kind.__new__ is object.__new__
        parameters = {} if bare else dict(inspect.signature(kind).parameters)
    except ValueError:  # written in C
        return None
    arguments: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(sampler, name):
            return None
        value = getattr(sampler, name)
        if isinstance(value, list | tuple) and all(isinstance(item, _PLAIN) for item in value):
            value = list(value)
        elif not isinstance(value, _PLAIN):
            value = sampler_to_config(value)
            if value is None:
                return None
        arguments[name] = value
    return {"class_path": public_path(kind), "init_args": arguments}


def public_path(kind: type) -> str:
    """Returns the shortest path that names a class, so that a checkpoint outlives the files being rearranged."""
    parts = kind.__module__.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    exporting = (p for p in packages if getattr(sys.modules.get(p), kind.__qualname__, None) is kind)
    return f"{next(exporting, kind.__module__)}.{kind.__qualname__}"


def last_sampler(callbacks: Iterable[Any]) -> Sampler | None:
    """Returns the sampler of the last callback that has one: how the model in training is meant to be decoded."""
    samplers = [callback.sampler for callback in callbacks if hasattr(callback, "sampler")]
    return samplers[-1] if samplers else None


def remembered_sampler(callbacks: Iterable[Any]) -> dict[str, Any] | None:
    """Returns the description of `last_sampler`, for checkpoints."""
    sampler = last_sampler(callbacks)
    return None if sampler is None else sampler_to_config(sampler)


def sampler_from_config(config: dict[str, Any], **overrides: Any) -> Sampler:
    """Builds the sampler that `sampler_to_config` described.

    Only this package's own classes are imported: a checkpoint must not choose what code runs.

    Args:
        config: The description.
        overrides: Arguments of the sampler to replace.

    Raises:
        UserError: When the class is not this package's or does not take these arguments.
    """
    config = {**config, "init_args": {**config["init_args"], **overrides}}
    sampler = _build(config)
    if not isinstance(sampler, Sampler):
        raise UserError(f"{config['class_path']} is not a sampler: pass --sampler with one that is")
    return sampler


def check_own(config: Any) -> None:
    """Checks the description of a sampler that a checkpoint holds.

    Raises:
        UserError: When it is not one, or it, or one inside it, names a class that is not this package's own.
    """
    described = isinstance(config, dict) and "class_path" in config
    if not described or not isinstance(config.get("init_args"), dict | None):
        raise UserError(
            "the checkpoint's sampler is not described by class_path and init_args: its config is damaged, or pass a "
            "sampler with --sampler"
        )
    if not str(config["class_path"]).startswith("dllm_var.sampling."):
        raise UserError(
            f"the checkpoint asks for the sampler {config['class_path']}, which is not part of dllm_var.sampling: "
            "pass it with --sampler if you trust it"
        )
    for value in (config.get("init_args") or {}).values():
        if isinstance(value, dict) and "class_path" in value:
            check_own(value)


def _build(config: dict[str, Any]) -> Any:
    check_own(config)
    module_name, _, name = str(config["class_path"]).rpartition(".")
    try:
        kind = getattr(import_module(module_name), name)
        arguments = {
            key: _build(value) if isinstance(value, dict) and "class_path" in value else value
            for key, value in config["init_args"].items()
        }
        return kind(**arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"cannot build the sampler {config['class_path']}: {error}") from error
