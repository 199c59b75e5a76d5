"""A checkpoint as one file: the zip archive of torch.save, whose comment holds a checksum of everything before it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any, cast

import torch

from dllm_var.errors import UserError

FORMAT = 2  # of what a checkpoint holds and how it is sealed
# .last.ckpt.new is a file that is being written or a folder that is being removed, .last.ckpt.saving what a strategy
# writes, .last.ckpt.previous a folder that is being replaced
UNFINISHED, SAVING, ASIDE = ".new", ".saving", ".previous"
_ARCHIVE = b"PK\x03\x04"
_END = b"PK\x05\x06"
_END_BYTES = 22  # end-of-archive record; its last two bytes are the length of the comment that follows
_SEAL = "dllm-var-checkpoint v{:03d} sha256="
_SEAL_PATTERN = re.compile(rb"dllm-var-checkpoint v(\d{3}) sha256=([0-9a-f]{64})")
_SEAL_BYTES = len(_SEAL.format(FORMAT)) + 64
_CHUNK = 2**22


class CannotSave(UserError):
    """A checkpoint could not be written; the one that was there before is untouched."""


class UnusableCheckpoint(UserError):
    """A checkpoint is damaged, of another format, or no checkpoint at all; the message says which."""


def write_file(checkpoint: Any, path: Path) -> None:
    """Writes a checkpoint so that `path` holds either what it held before or all of the new one, whatever happens.

    Args:
        checkpoint: Anything `torch.save` takes.
        path: The checkpoint.

    Raises:
        OSError: When it cannot be written, as on a full disk; names the checkpoint, and nothing is left behind.
    """
    unfinished = hidden(path, UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            _write_sealed(checkpoint, file)
        publish(unfinished, path)
    except BaseException as error:
        discard(unfinished)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def _write_sealed(checkpoint: Any, file: IO[bytes]) -> None:
    hashed = _HashedFile(file)
    try:
        torch.save(checkpoint, cast(IO[bytes], hashed))
    except Exception:
        if hashed.error is not None:  # torch wraps it beyond recognition
            raise hashed.error from None
        raise
    seal = _SEAL.format(FORMAT).encode()
    hashed.digest.update(seal)
    seal += hashed.digest.hexdigest().encode()
    file.seek(-2, os.SEEK_END)
    file.write(len(seal).to_bytes(2, "little") + seal)
    file.flush()
    os.fsync(file.fileno())


class _HashedFile:
    """Passes on what torch.save writes, and notes its checksum and the first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def hidden(path: Path, suffix: str) -> Path:
    """Returns the name beside `path` under which it is written or set aside; no search for *.ckpt finds it."""
    return path.with_name(f".{path.name}{suffix}")


def shown(path: Path) -> Path:
    """Returns the checkpoint that a strategy writes under a hidden name; any other path as it is."""
    if path.name.startswith(".") and path.suffix == SAVING:
        return path.with_name(path.name[1 : -len(SAVING)])
    return path


def publish(unfinished: Path, path: Path) -> None:
    """Gives a finished file or folder its name, in place of what had it before, and waits until the disk knows.

    A folder cannot take the place of another in one step: the old one is set aside first, and `recover` puts it back
    when the second step never came.
    """
    if unfinished.is_dir() or (path.is_dir() and not path.is_symlink()):
        aside = hidden(path, ASIDE)
        discard(aside)
        if os.path.lexists(path):
            os.rename(path, aside)
        os.rename(unfinished, path)
        sync_folder(path.parent)
        discard(aside)
    else:
        os.replace(unfinished, path)
    sync_folder(path.parent)


def flush_and_publish(unfinished: Path, path: Path) -> None:
    """As `publish`, for a file that another library has written and may not have flushed."""
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    publish(unfinished, path)


def sync_folder(folder: Path) -> None:
    """Waits until names in a folder are on the disk; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def discard(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove(path: Path) -> None:
    """Removes a checkpoint; a folder under another name first, so that half of one never passes for a checkpoint."""
    if path.is_dir() and not path.is_symlink():
        aside = hidden(path, UNFINISHED)
        discard(aside)
        os.rename(path, aside)
        path = aside
    discard(path)


def set_aside(folder: Path) -> dict[Path, Path]:
    """Returns what a process that was replacing a checkpoint set aside and did not replace, by the names it had."""
    found = {aside.with_name(aside.name[1 : -len(ASIDE)]): aside for aside in folder.glob(f".*.ckpt{ASIDE}")}
    return {path: aside for path, aside in found.items() if not os.path.lexists(path)}


def recover(folder: Path) -> None:
    """Puts back the checkpoints of a folder that a killed process had set aside; none may be writing now."""
    for path, aside in set_aside(folder).items():
        with contextlib.suppress(OSError):
            os.rename(aside, path)


def clear_leftovers(folder: Path) -> None:
    """Removes what processes that were killed while saving left in a folder of checkpoints; none may be writing."""
    recover(folder)
    for leftover in folder.glob(".*.ckpt.*"):  # also ..last.ckpt.new.new, as earlier versions named some
        if leftover.suffix in (UNFINISHED, SAVING, ASIDE):
            discard(leftover)


def check_file(path: Path) -> bool:
    """Reads a file to its end and compares its checksum; a file without one (plain torch.save) passes.

    Returns:
        Whether it has a checksum.

    Raises:
        UnusableCheckpoint: When it is damaged, of another format, or no checkpoint.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UnusableCheckpoint(f"{path} is not a checkpoint")
        with open(path, "rb") as file:
            return _check_open(file, path)
    except OSError as error:
        raise UnusableCheckpoint(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


def _check_open(file: IO[bytes], path: Path) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(len(_ARCHIVE))
    if size == 0:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it is empty")
    if start != _ARCHIVE and not any(a == b for a, b in zip(start, _ARCHIVE, strict=False)):
        raise UnusableCheckpoint(f"{path} is not a checkpoint")
    tail_bytes = _END_BYTES + _SEAL_BYTES
    file.seek(max(size - tail_bytes, 0))
    tail = file.read(tail_bytes)
    seal = _SEAL_PATTERN.fullmatch(tail[_END_BYTES:])
    if seal is None:
        if start == _ARCHIVE and tail[-_END_BYTES:].startswith(_END) and tail.endswith(b"\0\0"):
            return False  # an archive that ends as torch.save ends it
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it is cut short or its end was overwritten")
    digest = hashlib.sha256()
    file.seek(0)
    left = size - _SEAL_BYTES - 2
    while left > 0 and (data := file.read(min(_CHUNK, left))):
        digest.update(data)
        left -= len(data)
    digest.update(b"\0\0" + seal[0][:-64])
    length = tail[_END_BYTES - 2 : _END_BYTES]
    if digest.hexdigest().encode() != seal[2] or length != _SEAL_BYTES.to_bytes(2, "little"):
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: its content does not match its checksum")
    check_format(int(seal[1]), path)
    return True


def check_format(number: Any, path: Path | str) -> None:
    """Raises UnusableCheckpoint for a checkpoint of a format this version does not know."""
    if number != FORMAT:
        raise UnusableCheckpoint(
            f"the checkpoint {path} is of format {number}, this version of dllm-var reads format {FORMAT}: "
            "use the version that wrote it"
        )


def read_file(path: Path, map_location: Any = "cpu") -> Any:
    """Checks and loads a checkpoint file; only tensors and plain values, never code.

    Raises:
        UnusableCheckpoint: When it is damaged, of another format, no checkpoint, or holds anything but plain values.
    """
    check_file(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UnusableCheckpoint:
    """Makes one line of what torch says about a checkpoint it cannot load."""
    text = str(error)
    refused = re.search(r"(?:Unsupported (?:global|class|operand)|GLOBAL) ([\w.]+)", text)
    if "weights_only" in text.lower() or "weights only" in text.lower():
        what = f" ({refused[1]})" if refused else ""
        return UnusableCheckpoint(
            f"the checkpoint {path} holds Python objects{what} beyond tensors and plain values: it is not loaded, "
            "because that could run code hidden in it"
        )
    lines = text.strip().splitlines() or [type(error).__name__]
    return UnusableCheckpoint(f"the checkpoint {path} cannot be read: {lines[0][:200]}")
