"""The archives that `torch.save` writes: written whole, checked to the last byte, read without running code."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from dllm_var.errors import UserError
from dllm_var.files import write_atomically

_FIRST_BYTES = b"PK\x03\x04"
_SEAL = b"dllm-var sha256="  # begins the archive's comment; the checksum of all that stands before the comment follows
_SEAL_BYTES = len(_SEAL) + 64
_CHUNK = 2**22


class CannotSave(UserError):
    """A checkpoint could not be written; the one that was there before is untouched."""


class UnusableCheckpoint(UserError):
    """A checkpoint is damaged, of another format, or no checkpoint at all; the message says which."""


def write_archive(checkpoint: Any, path: Path) -> None:
    """Writes a checkpoint as one file: the zip archive of `torch.save`, with a checksum of it in the archive's comment.

    torch notes a checksum of every tensor, but not of the list that says where each of them begins.

    Raises:
        OSError: When it cannot be written, as on a full disk; what was at `path` before is still there.
    """
    with write_atomically(path) as partial, open(partial, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(checkpoint, cast(IO[bytes], hashed))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch raises an error of its own on top of it
                raise error.__context__ from None
            raise
        file.seek(-2, os.SEEK_END)  # an archive without a comment ends with the comment's length, 0
        file.write(_SEAL_BYTES.to_bytes(2, "little") + _SEAL + hashed.digest.hexdigest().encode())


class _HashedFile:
    """Passes on what `torch.save` writes, and computes its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def check_archive(file: IO[bytes], path: Path) -> None:
    """Reads an archive to its end and compares its checksum; those of its tensors if another program wrote it.

    Args:
        file: Of the archive, open at its beginning.
        path: Of the checkpoint, for the message.

    Raises:
        UnusableCheckpoint: When it is damaged or no archive.
    """
    first = file.read(len(_FIRST_BYTES))
    if not first:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it is empty")
    if first != _FIRST_BYTES:
        raise UnusableCheckpoint(f"{path} is not a checkpoint")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _SEAL_BYTES, 0))
    seal = file.read()
    if seal.startswith(_SEAL):
        file.seek(0)
        digest, left = hashlib.sha256(), size - _SEAL_BYTES - 2
        while part := file.read(min(left, _CHUNK)):
            digest.update(part)
            left -= len(part)
        length = file.read(2)
        digest.update(bytes(2))
        if length != _SEAL_BYTES.to_bytes(2, "little") or digest.hexdigest().encode() != seal[len(_SEAL) :]:
            raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it does not match its checksum")
        return
    try:
        with zipfile.ZipFile(file) as archive:
            comment, damaged = archive.comment, archive.testzip()
            # torch sets none of these, and does not read an entry whose attributes make a folder of it.
            listed = all(not entry.external_attr and not entry.compress_type for entry in archive.infolist())
    except Exception as error:  # zipfile raises many kinds
        raise UnusableCheckpoint(
            f"the checkpoint {path} is damaged: it is cut short or was overwritten ({error})"
        ) from error
    if comment.startswith(_SEAL) or (_SEAL.startswith(comment) and seal[-2:] != bytes(2)):  # a part of the seal is left
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it is cut short")
    if damaged is not None:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: {damaged} does not match its checksum")
    if not listed:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: its list of contents was overwritten")


def load_archive(file: Path | IO[bytes], path: Path, **options: Any) -> Any:
    """Loads an archive: tensors and plain values, never code.

    Args:
        file: Of the archive.
        path: Of the checkpoint, for the message.
        **options: Of `torch.load`; tensors go to the CPU when these do not say otherwise.

    Raises:
        UnusableCheckpoint: When it cannot be read, or holds anything else.
    """
    try:
        return torch.load(file, weights_only=True, **{"map_location": "cpu", **options})
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UnusableCheckpoint:
    """Makes one line of what torch or pickle say about a checkpoint they cannot load."""
    text = str(error)
    if "weights_only" in text.lower() or "weights only" in text.lower():
        refused = re.search(r"(?:Unsupported (?:global|class|operand)|GLOBAL) ([\w.]+)", text)
        what = f" ({refused[1]})" if refused else ""
        return UnusableCheckpoint(
            f"the checkpoint {path} holds Python objects{what} beyond tensors and plain values: it is not loaded, "
            "because that could run code hidden in it"
        )
    lines = text.strip().splitlines() or [type(error).__name__]
    return UnusableCheckpoint(f"the checkpoint {path} cannot be read: {lines[0][:200]}")
