"""Settings: YAML files, the parser of every command, and objects that settings describe by `class_path`."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from dllm_var.errors import UserError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is several times faster
LONGEST = 300  # characters of a reason that the parser gives


def load_yaml(text: str) -> Any:
    """Reads YAML; raises yaml.YAMLError for anything else."""
    return yaml.load(text, Loader=_LOADER)


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings; raises UserError, which names the file and the line, when it holds none."""
    if path.exists() and not path.is_file():
        raise UserError(f"'{path}' is no configuration file: it is a folder, a pipe or a device")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"cannot read the configuration file '{path}': {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings")
    return content


def merged(base: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries with changes put over them, value by value."""
    if isinstance(base, Namespace):
        base = base.as_dict()
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in changes.items():
        result[key] = merged(result.get(key), value) if isinstance(value, dict) else value
    return result


def given(arguments: Sequence[str], *options: str) -> list[str]:
    """Returns the values that options have among the arguments, as `--option=value` or in two words."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    split = [(*argument.partition("="), following) for argument, following in pairs]
    return [value if equals else after for option, equals, value, after in split if option in options]


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Returns the files that `--config` names among the arguments."""
    return [Path(value) for value in given(arguments, "--config", "-c")]


class SettingsParser(ArgumentParser):
    """Reads a command's settings; every mistake becomes a UserError that names the setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # or --trainer.max_step would pass for max_steps
        super().__init__(*args, **kwargs)
        self.names: Callable[[], list[str]] = lambda: list(self.get_defaults().keys())  # for suggestions

    @classmethod
    def of_command(cls, command: str, usage: str, description: str, examples: str = "") -> SettingsParser:
        """Returns the parser of a command without options; `usage` follows its name."""
        parser = cls(
            prog=f"python -m dllm_var {command}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.usage = f"{parser.prog} {usage}"
        return parser

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        for path in config_files(args or []):  # the parser would not name the file, and waits for ever on a pipe
            read_settings(path)
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside the parser: the outer one reports
            super().error(message, ex)
        raise UserError(_one_line(message, ex, self.names)) from ex


def _one_line(message: str, error: BaseException | None, names: Callable[[], list[str]]) -> str:
    """Returns the full name of the setting that jsonargparse complains about, and the reason.

    Its exceptions have no fields for these: the message quotes the parts of the name, the innermost one has the reason.
    """
    keys = list(dict.fromkeys(part.partition('"')[0] for part in message.split('Parser key "')[1:]))
    while error is not None and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    reason = " ".join(str(message if error is None else error).split())
    reason = reason.removeprefix(f'Parser key "{keys[-1]}": ' if keys else "")
    unknown = _unknown(reason)
    if unknown is None:
        return ": ".join([*([".".join(keys)] if keys else []), reason[:LONGEST]])
    name, prefix = ".".join([*keys, unknown]), ".".join(keys)
    kind = message.split("given class_path '")[-1].split("'")[0] if "given class_path '" in message else ""
    known = [key.replace("init_args.", "") for key in names()]
    if parameters := _parameters(kind):  # the names are those of the default class
        known = [key for key in known if key.rpartition(".")[0] != prefix] + [f"{prefix}.{one}" for one in parameters]
    beside = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
    owner = f" of {kind.rpartition('.')[2]}" if kind else ""
    return f"there is no setting '{name}'{owner}{suggestion(name, beside or known)}"


def _unknown(reason: str) -> str | None:
    """Returns the setting that jsonargparse does not know; None when it gives another reason."""
    if reason.startswith("unrecognized arguments: --"):
        return reason.split("--")[1].split("=")[0].split()[0]
    if reason.startswith("Group '"):  # 'a' does not accept option 'b'
        return ".".join(reason.split("'")[1:4:2])
    if reason.startswith(("Option '", "Subcommand '")):
        return reason.split("'")[-2]
    return None


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def suggestion(word: str, known: Sequence[str]) -> str:
    """Returns a question that gives the nearest of the known names; nothing when the last word of none is near."""
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(word.rpartition(".")[2], last, n=1)
    return f"; did you mean '{last[close[0]]}'?" if close else ""


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
