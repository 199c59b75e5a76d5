"""How settings are read: YAML files, the parser of every command, and references from one setting to another."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

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


def dump_yaml(content: Any) -> str:
    """Writes YAML, with the keys in the order they have."""
    return yaml.dump(content, Dumper=_DUMPER, default_flow_style=False, allow_unicode=True, sort_keys=False)


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


def given(arguments: Sequence[str], *options: str) -> list[str]:
    """Returns the values that options have among the arguments, as `--option=value` or in two words."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    split = [(*argument.partition("="), following) for argument, following in pairs]
    return [value if equals else after for option, equals, value, after in split if option in options]


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Returns the files that `--config` names among the arguments."""
    return [Path(value) for value in given(arguments, "--config", "-c")]


# -- the parser --------------------------------------------------------------------------------------------------------


class SettingsParser(ArgumentParser):
    """Reads a command's settings; every mistake becomes a UserError that names the setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # or --trainer.max_step would pass for max_steps
        super().__init__(*args, **kwargs)
        self.names = lambda: list(self.get_defaults().keys())  # of the settings, to suggest the nearest of them

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        for path in config_files(args or []):  # the parser would not name the file, and waits for ever on a pipe
            read_settings(path)
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside the parser: the outer one reports
            super().error(message, ex)
        raise UserError(one_line(message, self.names)) from ex


class ReferringParser(SettingsParser):
    """Reads the settings of one command in which `${data.context_length}` stands for another setting.

    Args:
        command: The command; also the name under which `parse_args` returns its settings.
        **kwargs: Of jsonargparse's parser.
    """

    def __init__(self, command: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.command = command

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        if not self.command:  # a parser inside this one, of one class's arguments
            return super().parse_args(args, *rest, **kwargs)
        others, values = split_vars(args)
        config = super().parse_args(others, *rest, **kwargs)
        if values:
            config.vars = merged(config.vars, values)
        qualify_references(config, self.command)  # all files and arguments are merged now, nothing is resolved yet
        return config

    def parse_resolved(self, arguments: list[str]) -> Namespace:
        """Returns the settings with all references resolved, once all files and arguments have been merged.

        Raises:
            UserError: For any mistake.
        """
        outer = SettingsParser(prog="python -m dllm_var", parser_mode="omegaconf+")
        outer.names = self.names
        outer.add_subcommands().add_subcommand(self.command, self)
        return outer.parse_args([self.command, *arguments])[self.command]


# Lines of jsonargparse's messages that list types and values, or that speak of the other types a setting may have.
_LISTS = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>", "Expected a path"),
    *("Not a valid subclass", "Subclass types expect", "a class path (str)", "a dict with"),
)
LONGEST = 400  # characters of a message


def one_line(message: str, known: Callable[[], list[str]]) -> str:
    """Returns jsonargparse's nested message as one line: the setting's full name, then what is wrong with it.

    Args:
        message: Several indented lines.
        known: Lists the command's settings.
    """
    keys: list[str] = []
    class_path = ""
    reasons: dict[str, str] = {}  # the line as it is, by the line as it is shown
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if 'Parser key "' in line:
            key, _, line = line.split('Parser key "')[1].partition('"')
            keys += [key] if key not in keys else []
            line = line.lstrip(": ")
        if line.startswith("Problem with given class_path"):
            if reasons:  # those of the next type that the setting may have
                break
            class_path = line.split("'")[1]
        elif line and not line.startswith(_LISTS):
            line = line.partition(". Got value: Namespace(")[0]
            reasons[line.replace("<class '", "").replace("'>", "")] = line
    name = next((found for line in reasons.values() if (found := _unknown(line))), None)
    if name is None:
        text = "; ".join(reasons) or " ".join(message.split())
        text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
        return ": ".join([*([".".join(keys)] if keys else []), text])
    name = ".".join([*keys, name])
    names = [key.replace("init_args.", "") for key in known()]
    names += [".".join([*keys, parameter]) for parameter in _parameters(class_path)]
    beside = [key for key in names if key.rpartition(".")[0] == name.rpartition(".")[0]]
    return f"there is no setting '{name}'{suggestion(name, beside or names)}"


def _unknown(line: str) -> str | None:
    """Returns the setting that a line of jsonargparse's calls unknown."""
    if line.startswith("unrecognized arguments: --"):
        return line.split("--")[1].split("=")[0].split()[0]
    if "does not accept option '" in line:
        group, word = line.split("'")[1:4:2]
        return f"{group}.{word}" if line.startswith("Group") else word
    return line.split("'")[1] if line.startswith("Option '") else None


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


# -- references --------------------------------------------------------------------------------------------------------


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
        text = text if equals else next(rest, "")
        try:
            value = load_yaml(text)
        except yaml.YAMLError:
            value = text
        for key in reversed(option.removeprefix("--vars.").split(".")):
            value = {key: value}
        values = merged(values, value)
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
        if isinstance(node, str):
            return _REFERENCE.sub(lambda match: f"${{{root}.{_full_path(config, match[1], place)}}}", node)
        for key, value in _children(node):
            changed = walk(value, [*place, str(key)])
            if changed is not value:
                node[key] = changed
        return node

    walk(config, [])


def _full_path(config: Namespace, reference: str, place: list[str]) -> str:
    path: list[str] = []
    node: Any = config
    for token in reference.replace("]", "").replace("[", ".").split("."):
        children = {str(key): value for key, value in _children(node)}
        if "class_path" in children and token not in children:
            path.append("init_args")
            children = {str(key): value for key, value in _children(children.get("init_args"))}
        if token not in children:
            where = ".".join(key for key in place if key != "init_args")
            raise UserError(f"{where}: ${{{reference}}} names no setting{suggestion(token, list(children))}")
        node = children[token]
        path.append(token)
    return ".".join(path)


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, Namespace):
        yield from list(vars(node).items())
    elif isinstance(node, dict):
        yield from list(node.items())
    elif isinstance(node, list):
        yield from enumerate(node)
