"""Settings: YAML files, the parser of every command, and objects that settings describe by `class_path`."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

import dllm_var
from dllm_var.errors import UserError, in_one_line, one_line

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is several times faster
LONGEST = 300  # characters of a reason that the parser gives
_PLAINER = {  # what the parser says before a name, and how it is said here
    "Expected a dot import path string:": "there is no known class '{}': give its whole path, package.module.Name",
    "Unexpected import path format:": "'{}' is no class: give its path, package.module.Name",
    "Expected an instantiatable class, but": "{}: name a class of that kind first, then its settings",
}
_TYPES = {"<class '": "", "typing.Literal[": "", "NoneType": "null", "'": "", ">": "", "[": " of ", "]": ""}
NO_SETTING = "there is no setting"


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
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in changes.items():
        result[key] = merged(result.get(key), value) if isinstance(value, dict) else value
    return result


def overlays() -> dict[str, Path]:
    """Returns the sampler overlays that ship, by name: those of configs/sampler/, which the wheel has, too."""
    folders = [Path(folder) / "configs" / "sampler" for folder in dllm_var.__path__]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def overlay(name: str, own: Any = None) -> dict[str, Any]:
    """Returns the sampler of an overlay that ships, with the block length and the longest answer of a model's `own`.

    Those that decode a canvas of fixed length keep theirs. Raises UserError, which lists the names, for another name.
    """
    known = overlays()
    if name not in known:
        raise UserError(f"--sampler: there is no '{name}'; there are {', '.join(known)}")
    sampler: dict[str, Any] = read_settings(known[name])["sampler"]
    limits = own.get("init_args") if isinstance(own, dict) else None
    if isinstance(limits, dict) and "canvas_length" not in sampler["init_args"]:
        for setting in ("block_length", "max_new_tokens"):
            if setting in sampler["init_args"] and type(limits.get(setting)) is int:  # a checkpoint may say anything
                sampler["init_args"][setting] = limits[setting]
    return sampler


def given(arguments: Sequence[str], *options: str) -> list[str]:
    """Returns the values that options have among the arguments, as `--option=value` or in two words."""
    pairs = zip(arguments, [*arguments, ""][1:], strict=True)
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
        self.names: Callable[[], list[str]] = self._own_names  # what suggestions are taken from
        self.meant: dict[str, str] = {}  # settings by the names that other programs have for them
        self.besides: dict[str, str] = {}  # what is often given to a setting, and where it belongs

    @classmethod
    def of_command(cls, command: str, usage: str, description: str, examples: str = "") -> "SettingsParser":
        """Returns the parser of a command without options; `usage` follows its name."""
        parser = cls(
            prog=f"python -m dllm_var {command}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.usage = f"{parser.prog} {usage}"
        parser.names = lambda: [name if "." in name else name.replace("_", "-") for name in parser._own_names()]
        return parser

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        for path in config_files(args or []):  # the parser would not name the file, and waits for ever on a pipe
            read_settings(path)
        return super().parse_args(args, *rest, **kwargs)

    def _own_names(self) -> list[str]:
        return [name.replace("init_args.", "") for name, _ in self.get_defaults().items()]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = _unknown(message)
        if unknown is not None:
            known = self.meant.get(unknown.rpartition(".")[2])
            known = known or (unknown.replace("_", "-") if unknown in self.names() else None)
            hint = f"; did you mean '{known}'?" if known else suggestion(unknown, self.names())
            message, ex = f"{NO_SETTING} '{unknown}'{hint}", None
        if message.startswith(stray := "unrecognized arguments: "):
            word = message.removeprefix(stray).split()[0]
            message = f"'{word}' belongs to no option: {_option_for(word)}"
        if message.startswith("argument --") and message.endswith("expected one argument"):
            option = message.split()[1].rstrip(":")
            message, ex = f"{option} needs a value; one that begins with - is written {option}=VALUE", None
        if not self.exit_on_error:  # a parser inside the parser: the outer one reports
            super().error(message, ex)
        keys = dict.fromkeys(part.partition('"')[0] for part in message.split('Parser key "')[1:])
        reason = _reason(ex or UserError(message))[:LONGEST]
        owner, _, problem = message.rpartition("given class_path '")[2].partition("':")
        if problem.strip().startswith(NO_SETTING):
            reason = reason.replace(NO_SETTING, f"{owner.rpartition('.')[2]} has no setting")
        else:
            reason += self.besides.get(".".join(keys), "")
        raise UserError(f"{'.'.join(keys)}: {reason}" if keys else reason) from ex


def _option_for(word: str) -> str:
    """Returns what was probably meant by a word that stands alone."""
    if "=" in word or word.endswith((".yaml", ".yml")):
        return f"did you mean --{'' if '=' in word else 'config '}{word}?"
    return "options are --NAME VALUE, and a value with blanks needs quotes"


def _unknown(message: str) -> str | None:
    """Returns the setting that jsonargparse does not know; its exceptions have no field for it."""
    if message.startswith("unrecognized arguments: --"):
        return message.split("--")[1].split()[0].partition("=")[0]
    quoted = message.split("'")[1::2]
    if message.startswith(("Option '", "Subcommand '")):
        return quoted[-1]
    return ".".join(quoted) if message.startswith("Group '") else None


def _reason(error: BaseException) -> str:
    """Returns what the exception says from which all others, up to this one, were raised; and all allowed types."""
    above: BaseException | None = None
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        above, error = error, cause
    reason = one_line(error)
    if isinstance(error, yaml.YAMLError):
        return f"it is read as settings, and is no YAML: {reason}"
    if isinstance(error, AttributeError) and error.obj is not None:
        classes = [name for name in dir(error.obj) if isinstance(getattr(error.obj, name, None), type)]
        return reason + suggestion(str(error.name), classes)
    if reason.startswith("Expected a ") and ". Got value:" in reason:
        problem = str(above).partition("Problem with given class_path '")[2].splitlines()
        if problem[1:]:  # another of the types that may be given is the one that was meant
            return problem[1].strip()
        wanted, _, got = reason.removeprefix("Expected a ").partition(". Got value:")
        union = [line for line in str(above).splitlines() if line.startswith("Subtypes: ")]
        wanted = union[-1].removeprefix("Subtypes: [").removesuffix("]") if union else wanted
        for theirs, plain in _TYPES.items():
            wanted = wanted.replace(theirs, plain)
        return f"expected {wanted}, got {got.strip() or 'nothing'}"
    for theirs, plain in _PLAINER.items():
        if reason.startswith(theirs):
            return plain.format(reason.removeprefix(theirs).strip())
    return reason


def suggestion(word: str, known: Sequence[str]) -> str:
    """Returns a question that gives the nearest of the known names; nothing when the last word of none is near."""
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(word.rpartition(".")[2], last, n=1)
    return f"; did you mean '{last[close[0]]}'?" if close else ""


def build(kind: type, name: str, described: str | dict[str, Any], where: str) -> Any:
    """Builds an object of a class or a subclass from its class path, or a dictionary with `class_path` and `init_args`.

    Raises UserError for a wrong class or argument of the setting `name` in the part `where`.
    """
    parser = SettingsParser()
    parser.add_subclass_arguments(kind, name, as_group=False, required=True)
    try:
        return parser.instantiate(parser.parse_object({name: described}))[name]
    except Exception as error:
        message = in_one_line(error)
        if message is None:
            raise
        raise UserError(f"{where}: {message}") from error
