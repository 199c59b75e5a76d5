"""The archives that `torch.save` writes: written whole, checked to the last byte, read without running code."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from dllm_var.errors import UserError
from dllm_var.files import write_atomically

_FIRST_BYTES = b"PK\x03\x04"


class CannotSave(UserError):
    """A checkpoint could not be written; the one that was there before is untouched."""


class UnusableCheckpoint(UserError):
    """A checkpoint is damaged, of another format, or no checkpoint at all; the message says which."""


def write_archive(checkpoint: Any, path: Path) -> None:
    """Writes a checkpoint as one file: a zip archive, in which torch notes a checksum (CRC-32) of every tensor.

    Raises:
        OSError: When it cannot be written, as on a full disk; what was at `path` before is still there.
    """
    with write_atomically(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch raises an error of its own on top of it
                raise error.__context__ from None
            raise


def check_archive(file: IO[bytes], path: Path) -> None:
    """Reads an archive to its end and compares the checksums in it.

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
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many kinds
        raise UnusableCheckpoint(
            f"the checkpoint {path} is damaged: it is cut short or was overwritten ({error})"
        ) from error
    if damaged is not None:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: {damaged} does not match its checksum")


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
