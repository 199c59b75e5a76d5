"""Output files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, TextIO

from dllm_var.errors import UserError


class WholeFile:
    """A text file that gets its name when it is complete; a device or pipe is written directly.

    Args:
        path: The file; its folder must exist.

    Raises:
        OSError: When it cannot be written; names the file.
    """

    def __init__(self, path: str | Path) -> None:
        target = Path(os.path.realpath(Path(path).expanduser()))  # what a link points to is replaced, not the link
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        self.target = target
        self.partial = target if _is_device(target) else target.with_name(f"{target.name}.partial")
        self.stream: TextIO = self.partial.open("w", encoding="utf-8")

    def __enter__(self) -> TextIO:
        return self.stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.complete()
            return
        if isinstance(error, OSError):
            error.filename = error.filename or str(self.target)
        self.abandon(keep=False)

    def complete(self) -> None:
        """Waits until the content is on the disk, and gives the file its name."""
        try:
            self.stream.flush()
            if self.partial != self.target:
                os.fsync(self.stream.fileno())
            self.stream.close()
            if self.partial != self.target:
                os.replace(self.partial, self.target)
        except OSError as error:
            error.filename = str(self.target)
            self.abandon(keep=False)
            raise

    def abandon(self, keep: bool = True) -> Path | None:
        """Leaves what has been written under the name of a partial file, and returns that; nothing leaves no file."""
        try:
            self.stream.close()
        except OSError:  # what is still buffered finds no room either; the exception that led here says so
            keep = False
        if self.partial == self.target or not self.partial.exists():
            return None
        if keep and self.partial.stat().st_size:
            return self.partial
        self.partial.unlink()
        return None


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all.

    Raises:
        OSError: When it cannot be written; names the file.
    """
    with WholeFile(path) as stream:
        stream.write(text)


def open_output(option: str, name: str) -> WholeFile:
    """Opens the file that an option names, before the work that fills it.

    Raises:
        UserError: When it cannot be written; names the option.
    """
    try:
        return WholeFile(name)
    except OSError as error:
        raise UserError(f"{option}: cannot write '{name}': {error.strerror}") from error
