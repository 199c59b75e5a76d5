"""Samplers as plain data: what a checkpoint remembers of how it is meant to be decoded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from dllm_var import sampling
from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.sampling import BlockLengthPolicy, Sampler, UnmaskingPolicy, policies

_PLAIN = (str, int, float, bool, type(None))
_PACKAGE = "dllm_var.sampling"
_KINDS = (Sampler, UnmaskingPolicy, BlockLengthPolicy)
_PUBLIC: dict[str, type] = {  # all that a checkpoint may name
    name: kind
    for module in (sampling, policies)
    for name in module.__all__
    if isinstance(kind := getattr(module, name), type) and issubclass(kind, _KINDS) and not inspect.isabstract(kind)
}


def sampler_to_config(sampler: Any) -> dict[str, Any] | None:
    """Returns `{"class_path": ..., "init_args": {...}}` of a sampler or policy.

    Works for every class that keeps its arguments as attributes of the same name, as dataclasses do: plain values,
    lists of them, policies and samplers. None where one does not, or takes arguments without a name (`**kwargs`).
    """
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(sampler)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(sampler, name):
            return None
        value = getattr(sampler, name)
        if isinstance(value, list | tuple) and all(isinstance(item, _PLAIN) for item in value):
            value = list(value)
        elif isinstance(value, _KINDS):
            value = sampler_to_config(value)
            if value is None:
                return None
        elif not isinstance(value, _PLAIN):
            return None
        arguments[name] = value
    return {"class_path": public_path(type(sampler)), "init_args": arguments}


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


def sampler_from_config(config: Any) -> Sampler:
    """Builds the sampler that a checkpoint describes; a checkpoint chooses no code.

    Its classes are looked up by name among the public samplers and policies of this package, and nothing is imported.
    Their arguments are numbers, words that the class knows, lists of them, and descriptions of the same kind. A file
    or another checkpoint (a guide, a drafter, a corpus) is the user's to name.

    Args:
        config: What `sampler_to_config` wrote; any content of a checkpoint.

    Raises:
        UserError: When it describes anything else, or the class refuses the arguments.
    """
    sampler = _build(config)
    if not isinstance(sampler, Sampler):
        raise UserError(
            f"the checkpoint's {config['class_path']} is not a sampler: its config is damaged, or pass a sampler with "
            "--sampler"
        )
    return sampler


def _build(config: Any) -> Any:
    described = isinstance(config, dict) and "class_path" in config and set(config) <= {"class_path", "init_args"}
    if not described or not isinstance(config.get("init_args"), dict | None):
        raise UserError(
            "the checkpoint's sampler is not described by class_path and init_args: its config is damaged, or pass a "
            "sampler with --sampler"
        )
    package, _, name = str(config["class_path"]).rpartition(".")
    if name not in _PUBLIC or not f"{package}.".startswith(f"{_PACKAGE}."):
        raise UserError(
            f"the checkpoint asks for the sampler {config['class_path']}, which is not part of {_PACKAGE}: "
            "pass it with --sampler if you trust it"
        )
    kind = _PUBLIC[name]
    known, types = inspect.signature(kind).parameters, get_type_hints(kind)
    arguments = {}
    for key, value in (config.get("init_args") or {}).items():
        if key not in known:
            raise UserError(f"the checkpoint's sampler is damaged: {name} has no setting {key}")
        arguments[key] = _argument(name, key, value, types[key])
    try:
        return kind(**arguments)
    except TypeError as error:  # one is missing
        raise UserError(f"cannot build the checkpoint's sampler {config['class_path']}: {error}") from error


def _argument(owner: str, name: str, value: Any, kind: Any) -> Any:
    """Returns the argument that a checkpoint gives for a parameter of the annotated kind."""
    alternatives = get_args(kind) or (kind,)
    if isinstance(value, dict) and any(isinstance(one, type) and issubclass(one, _KINDS) for one in alternatives):
        value = _build(value)
        if isinstance(value, alternatives):
            return value
    elif isinstance(value, str) and str in alternatives:
        raise UserError(
            f"the checkpoint's sampler {owner} names {name} {value!r}, and a checkpoint may not name other files: name "
            f"it yourself, with --sampler {_PACKAGE}.{owner} --sampler.{name} PATH and the sampler's other settings"
        )
    elif fits(value, kind):
        return value
    raise UserError(f"the checkpoint's sampler is damaged: {owner} cannot have {name}={value!r}")
