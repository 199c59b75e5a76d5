"""Samplers and policies as settings: what a config may name, and what a checkpoint remembers of its sampler."""

import inspect
import math
import sys
from dataclasses import fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from dllm_var.errors import UserError
from dllm_var.files import fits

_PACKAGE = "dllm_var.sampling."
_PLAIN = str | int | float | bool | None
_OWN: "dict[str, type[Configurable]]" = {}  # this package's samplers and policies: all that a checkpoint may name


class Configurable:
    """A sampler or policy: configs name it by `class_path`, and it keeps its arguments as attributes."""

    owner = ""  # of a setting, in messages; the class's name when empty

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.is_own() and not cls.__name__.startswith("_"):
            _OWN[cls.__name__] = cls

    @classmethod
    def is_own(cls) -> bool:
        """Whether the class is this package's."""
        return cls.__module__.startswith(_PACKAGE)

    def check_range(self, low: float, high: float, *names: str) -> None:
        """Raises UserError for a setting outside [low, high]; None passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                self.refuse(name, f"at least {low}" if high == math.inf else f"in [{low}, {high}]")

    def check_words(self) -> None:
        """Raises UserError for a setting that is none of the words in its `Literal` annotation."""
        for one in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if get_origin(one.type) is Literal and not fits(getattr(self, one.name), one.type):
                self.refuse(one.name, " or ".join(get_args(one.type)))

    def refuse(self, name: str, allowed: str) -> NoReturn:
        raise UserError(f"{self.owner or type(self).__name__}.{name} must be {allowed}, got {getattr(self, name)}")


def sampler_to_config(sampler: Any) -> dict[str, Any] | None:
    """Returns `{"class_path": ..., "init_args": {...}}` of a sampler or policy, None for what cannot be described.

    The class must keep its arguments as attributes of the same name, as dataclasses do: plain values, lists of them,
    policies. The path is the shortest that names the class, so that a checkpoint outlives a move of its file.
    """
    kind = type(sampler)
    if not issubclass(kind, Configurable):
        return None
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(sampler, name):
            return None
        value = getattr(sampler, name)
        value = list(value) if isinstance(value, tuple) else value
        described = sampler_to_config(value) if isinstance(value, Configurable) else None
        if described is None and not fits(value, _PLAIN | list[_PLAIN]):
            return None
        arguments[name] = described or value
    parts = kind.__module__.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    exporting = (p for p in packages if getattr(sys.modules.get(p), kind.__qualname__, None) is kind)
    return {"class_path": f"{next(exporting, kind.__module__)}.{kind.__qualname__}", "init_args": arguments}


def build(config: Any, expected: type[Any]) -> Any:
    described = isinstance(config, dict) and "class_path" in config and set(config) <= {"class_path", "init_args"}
    if not described or not isinstance(config.get("init_args"), dict | None):
        raise UserError("the checkpoint's sampler is not described by class_path and init_args: pass --sampler")
    path = str(config["class_path"])
    kind = _OWN.get(path.rpartition(".")[2])
    if kind is None or inspect.isabstract(kind) or not path.startswith(_PACKAGE):
        raise UserError(f"the checkpoint asks for {path}, not a part of dllm_var: if you trust it, pass --sampler")
    if not issubclass(kind, expected):
        raise UserError(f"the checkpoint's sampler is damaged: {path} is no {expected.__name__}; pass --sampler")
    given, types = config.get("init_args") or {}, get_type_hints(kind)
    arguments = {name: _argument(kind.__name__, name, value, types.get(name)) for name, value in given.items()}
    try:
        return kind(**arguments)
    except TypeError as error:  # a setting is missing, or may not be given
        raise UserError(f"cannot build the checkpoint's sampler {path}: {error}") from error


def _argument(owner: str, name: str, value: Any, annotation: Any) -> Any:
    alternatives = get_args(annotation) or (annotation,)
    kinds = [one for one in alternatives if isinstance(one, type) and issubclass(one, Configurable)]
    if isinstance(value, dict) and kinds:
        return build(value, kinds[0])
    if isinstance(value, str) and str in alternatives:
        raise UserError(
            f"the checkpoint's sampler {owner} names {name} {value!r}, and a checkpoint may not name other files: name "
            f"it yourself, with --sampler {_PACKAGE}{owner} --sampler.{name} PATH and the sampler's other settings"
        )
    if not fits(value, annotation):
        raise UserError(f"the checkpoint's sampler is damaged: {owner} cannot have {name}={value!r}")
    return value
