"""Mistakes that a user can mend, and files that cannot be used, told in one line."""

import errno
import os
import sys


class UserError(ValueError):
    """A mistake in settings, data or a checkpoint, told in one line that names it and the remedy."""


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or write to another disk"),
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write to another disk",
    errno.EROFS: "write to another place",
}


def one_line(error: BaseException) -> str:
    """Returns the message of an exception without line breaks, or its type when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def in_one_line(error: BaseException | None) -> str | None:
    """Returns the line that tells a user's mistake, or a file or disk that cannot be used; None for a bug."""
    notes = getattr(error, "__notes__", [])  # how to go on after a failure, from the Trainer
    while error is not None:
        if isinstance(error, UserError):
            line = str(error).strip()
            if "Traceback (most recent call last)" in line:  # from a loader's worker process
                line = line.splitlines()[-1].split("UserError: ", 1)[-1]
            return line
        if isinstance(error, ModuleNotFoundError):
            hint = "" if "pip install" in str(error) else ": install the package that has it, or correct the name"
            return one_line(error) + hint
        if isinstance(error, OSError) and (failed := _file_error(error)):
            return "; ".join([failed, *notes])
        error = error.__cause__  # the settings parser wraps what a constructor raises
    return None


def _file_error(error: OSError) -> str | None:
    if isinstance(error, ConnectionError):
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    if error.errno in _REMEDIES:
        return f"cannot write {name or 'a file'}: {error.strerror}; {_REMEDIES[error.errno]}"
    if error.errno is not None and name is not None:
        return f"cannot use '{name}': {error.strerror}"
    return f"cannot read or write a file: {error.strerror}" if error.errno == errno.EIO else None


def warn(message: str) -> None:
    """Prints what is probably a mistake to standard error; in a terminal in red."""
    red, plain = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}warning: {message}{plain}", file=sys.stderr)
