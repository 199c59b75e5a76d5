"""How settings are read: interpolation that sees the whole configuration, and errors that name the setting."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_dumper

from dllm_var.errors import UserError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is several times faster
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
DEEPEST, LARGEST = 100, 100_000  # levels of nesting, and values, in a file of settings
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_.\[\]]*)\}")


def load_yaml(text: str) -> Any:
    """Reads YAML.

    Raises:
        yaml.YAMLError: When it is not YAML.
    """
    return yaml.load(text, Loader=_LOADER)


def check_size(text: str) -> None:
    """Raises yaml.YAMLError for YAML whose nesting would end the process, or whose aliases would fill the memory."""
    sizes: dict[str | None, int] = {}  # values that an anchor stands for
    stack: list[tuple[str | None, int]] = []  # the lists and mappings that are open: anchor, values so far
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, 1))
            if len(stack) > DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
            continue
        if not isinstance(event, yaml.AliasEvent | yaml.ScalarEvent | yaml.CollectionEndEvent):
            continue
        anchor, size = stack.pop() if isinstance(event, yaml.CollectionEndEvent) else (event.anchor, 1)
        size = sizes.get(anchor, 1) if isinstance(event, yaml.AliasEvent) else size
        sizes[anchor] = size
        if stack:
            stack[-1] = (stack[-1][0], stack[-1][1] + size)
        if size > LARGEST:
            raise yaml.YAMLError(f"it has more than {LARGEST:,} values")


def dump_yaml(content: Any) -> str:
    """Writes YAML, with the keys in the order they have."""
    return yaml.dump(content, Dumper=_DUMPER, default_flow_style=False, allow_unicode=True, sort_keys=False)


set_dumper("yaml", dump_yaml)  # the parser writes YAML, and reads it again, for each class of the settings


class PlainParser(argparse.ArgumentParser):
    """Reads the options of a command without settings; every mistake becomes a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class SettingsParser(ArgumentParser):
    """Reads a command's settings; every mistake becomes a UserError that names the setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # or --trainer.max_step would pass for max_steps
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        for path in config_files(args or []):  # the parser would not name the file, and waits for ever on a pipe
            read_settings(path)
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside the parser: the outer one reports
            super().error(message, ex)
        command = self._subcommands_action.choices.get(self.args[0]) if self._subcommands_action and self.args else self
        known = [action.dest for action in getattr(command, "_actions", [])]
        raise UserError(readable(message, known)) from ex


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Returns the files that `--config` names among the arguments."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    split = [(*argument.partition("="), following) for argument, following in pairs]
    return [Path(value if equals else after) for option, equals, value, after in split if option in ("--config", "-c")]


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings.

    Raises:
        UserError: When it is missing, is not YAML or holds no settings; names the file and the line.
    """
    try:
        if not path.exists():
            raise UserError(f"there is no configuration file '{path}'")
        if not path.is_file():
            raise UserError(f"'{path}' is no configuration file: it is a folder, a pipe or a device")
        text = path.read_text(encoding="utf-8")
        check_size(text)
        content = load_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"cannot read the configuration file '{path}': {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings")
    return content


def split_vars(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes `--vars.NAME=VALUE` out of the arguments, at any depth (`--vars.sampler.init_args.block_length=8`).

    The parser would replace a whole `vars.sampler` to set one value inside it.

    Returns:
        The other arguments, and the values as nested dictionaries.
    """
    others: list[str] = []
    values: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        option, equals, text = argument.partition("=")
        if not option.startswith("--vars."):
            others.append(argument)
            continue
        *path, name = option.removeprefix("--vars.").split(".")
        try:
            value = load_yaml(text if equals else next(rest, ""))
        except yaml.YAMLError:
            value = text
        nested = {name: value}
        for key in reversed(path):
            nested = {key: nested}
        values = merged(values, nested)
    return others, values


def merged(base: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries with changes put over them, value by value."""
    if isinstance(base, Namespace):
        base = base.as_dict()
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in changes.items():
        result[key] = merged(result.get(key), value) if isinstance(value, dict) else value
    return result


def qualify_references(config: Namespace, root: str) -> None:
    """Rewrites each `${a.b}` in the merged settings into the full path of the value it names, for OmegaConf to resolve.

    References are written as a user sees the settings, such as `${data.context_length}`; the value is kept under the
    command's name and, for a class, under its `init_args`.

    Args:
        config: Settings of one command; changed in place.
        root: Name of the command.

    Raises:
        UserError: When a reference names nothing.
    """

    def walk(node: Any, place: list[str]) -> Any:
        if isinstance(node, Namespace):
            for key, value in list(vars(node).items()):
                vars(node)[key] = walk(value, [*place, key])
        elif isinstance(node, dict):
            return {key: walk(value, [*place, str(key)]) for key, value in node.items()}
        elif isinstance(node, list):
            return [walk(value, [*place, str(index)]) for index, value in enumerate(node)]
        elif isinstance(node, str):
            return _REFERENCE.sub(lambda match: f"${{{root}.{_real_path(config, match[1], place)}}}", node)
        return node

    walk(config, [])


def _real_path(config: Namespace, reference: str, place: list[str]) -> str:
    path: list[str] = []
    node: Any = config
    for token in re.findall(r"[^.\[\]]+", reference):
        if "class_path" in _children(node) and token not in _children(node):
            node = _children(node).get("init_args")
            path.append("init_args")
        children = _children(node)
        if token not in children:
            where = ".".join(key for key in place if key != "init_args")
            raise UserError(f"{where}: ${{{reference}}} names no setting{_suggestion(token, children)}")
        node = children[token]
        path.append(token)
    return ".".join(path)


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, Namespace):
        return vars(node)
    if isinstance(node, list):
        return {str(index): value for index, value in enumerate(node)}
    return node if isinstance(node, dict) else {}


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


LONGEST = 400  # characters of a message

# Lines of the parser's messages that repeat the value or explain the machinery.
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>|Subclass types expect|"
    r"a class path \(str\)|a dict with|a dict without"
)


def readable(message: str, known: Iterable[str] = ()) -> str:
    """Turns the parser's nested message into one line: the setting's full name, then what is wrong with it.

    Args:
        message: What jsonargparse says, over several indented lines.
        known: Names of the settings outside classes, to suggest the nearest.
    """
    keys: list[str] = []
    class_path = ""
    rest: list[str] = []
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        key = re.match(r'Parser key "([^"]+)"(?: element (\d+))?:\s*(.*)', line)
        wrapper = re.match(r"Problem with given class_path '([^']+)':", line)
        if key:
            keys += [key[1], *([str(int(key[2]) - 1)] if key[2] else [])]
            line = key[3]
        elif wrapper:
            class_path = wrapper[1]
            continue
        if line and not _NOISE.match(line):
            rest.append(line)
    rest = [line for line in rest if not line.startswith("Not a valid subclass")] or rest[:1]
    text = "; ".join(dict.fromkeys(rest)) or " ".join(message.split())
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    unknown = re.search(r"(?:does not accept option|Option) '([\w.]+)'|unrecognized arguments: --([\w.]+)", text)
    if not unknown:
        text = _plain_types(text)
        value = re.search(r"Given value: ([^\s({]+)$", message, re.MULTILINE)
        if value and "got " not in text:
            text += f", got {value[1]}"
        return ": ".join([*([".".join(keys)] if keys else []), text])
    group = re.search(r"Group '([\w.]+)'", text)
    *groups, word = ".".join([*([group[1]] if group else []), unknown[1] or unknown[2]]).split(".")
    inner = re.search(r"Got value: Namespace\(class_path='([\w.]+)'", text)
    class_path = inner[1] if inner else class_path
    if not class_path:  # a setting of the command itself: known names are full ones
        *groups, word = [".".join([*groups, word])]
    suggestion = _suggestion(word, _arguments(class_path, groups) if class_path else known)
    shown = f" ({class_path})" if class_path and not groups else ""
    return f"there is no setting '{'.'.join([*keys, *groups, word])}'{shown}{suggestion}"


def _plain_types(text: str) -> str:
    text = re.sub(r"Expected (?:a )?<class '([\w.]+)'>", r"expected \1", text)
    text = re.sub(r"Expected (?:a )?typing\.Literal\[([^\]]*)\]", r"expected one of \1", text)
    return text.replace(". Got value:", ", got").replace("; expected", " or")


def _arguments(class_path: str, groups: list[str]) -> list[str]:
    """Returns the names a class takes, or those of the settings group that is its default for one argument."""
    try:
        module, name = class_path.rsplit(".", 1)
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
        for group in groups:
            parameters = inspect.signature(type(parameters[group].default)).parameters
        return list(parameters)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return []
