"""Files: written whole or not at all, and read as plain values that are checked before they are used."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TextIO, Union, get_args, get_origin

from dllm_var.errors import UserError

PARTIAL, PREVIOUS = ".partial", ".previous"  # behind the name of what is being written, and of a folder being replaced


def cache_folder() -> Path:
    """Returns where things are kept that can be made again: ``$DLLM_VAR_CACHE``, or ``~/.cache/dllm_var``."""
    return Path(os.environ.get("DLLM_VAR_CACHE") or "~/.cache/dllm_var").expanduser()


def remember(cache: Path | None, key: Any, find_out: Callable[[], Any]) -> Any:
    """Returns what a cache folder has for a key, a plain value; it is found out, and kept, when the cache has none."""
    if cache is None:
        return find_out()
    path = cache / "findings" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):  # it is missing or damaged
        return json.loads(path.read_text(encoding="utf-8"))
    found = find_out()
    with contextlib.suppress(OSError), write_atomically(path, shared=True) as partial:
        partial.write_text(json.dumps(found), encoding="utf-8")
    return found


@contextlib.contextmanager
def write_atomically(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields where to write a file or a folder that becomes `path` when the block ends well, and is removed otherwise.

    With `shared`, several processes may write the same folder at once: the first to finish gives it its name. Raises
    OSError, which names `path`, when it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}") if shared else partial_path(path)
    with _whole_or_removed(partial, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        discard(partial)
        yield partial
        try:
            publish(partial, path, replace=not shared)
        except OSError:
            if not (shared and path.is_dir()):
                raise
            discard(partial)


@contextlib.contextmanager
def _whole_or_removed(partial: Path, path: Path) -> Iterator[None]:
    """Removes an unfinished file or folder when the block fails; an OSError then names `path`."""
    try:
        yield
    except BaseException as error:
        discard(partial)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    with write_atomically(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_path(path: Path) -> Path:
    """Returns the path at which `path` is written until it is complete."""
    return path.with_name(path.name + PARTIAL)


def publish(partial: Path, path: Path, replace: bool = True) -> None:
    """Waits until a finished file or folder is on the disk, and gives it its name.

    A folder that is replaced is set aside under NAME.previous first; `put_back` returns it after a kill in between.
    """
    for written in [*partial.rglob("*"), partial]:
        _sync(written)
    aside = path.with_name(path.name + PREVIOUS)
    set_aside = replace and os.path.lexists(path) and (partial.is_dir() or path.is_dir())
    if set_aside:
        discard(aside)
        os.rename(path, aside)
    os.rename(partial, path)
    _sync(path.parent)
    if set_aside:
        discard(aside)


def put_back(folder: Path) -> None:
    """Gives what a killed process had set aside its name again; no other process may be writing there."""
    for aside in folder.glob(f"*{PREVIOUS}"):
        if not os.path.lexists(aside.with_suffix("")):
            aside.rename(aside.with_suffix(""))


def discard(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError of the block that names no file the name of this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def open_output(name: str | Path) -> Iterator[TextIO]:
    """Yields a text file to write bit by bit: NAME.partial until the block ends well; a device is written directly.

    An exception leaves the partial file there, if anything was written. Raises OSError, which names the file.
    """
    path = Path(os.path.realpath(Path(name).expanduser()))
    try:
        is_device = path.exists() and not path.is_file()  # or a folder, which cannot be opened
        partial = path if is_device else partial_path(path)
        stream = partial.open("w", encoding="utf-8")
    except OSError as error:
        error.filename = str(name) or "."
        raise
    try:
        with naming(name):
            yield stream
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk; the exception that led here says so
            stream.close()
        if not is_device and partial.stat().st_size == 0:
            partial.unlink()
        raise
    with naming(name) if is_device else _whole_or_removed(partial, path):
        stream.close()
        if not is_device:
            publish(partial, path)


def read_text(path: Path) -> str:
    """Reads a text file; raises UserError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror or error
        raise UserError(f"cannot read {path}: {reason}") from error


def parse_json(text: str, place: str | Path) -> Any:
    """Returns the values of JSON text; raises UserError, which names the place, for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file of settings by name; raises UserError when it cannot be read or holds something else."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings by name, not {type(content).__name__}: the file is damaged")
    return content


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
