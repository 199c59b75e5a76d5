"""Errors that come from outside of the code, as one line: a full disk, a process that is gone, a foreign checkpoint."""

from __future__ import annotations

import errno
import os
import traceback


def from_checkpoint(error: Exception) -> str | None:
    """Returns a line for what is wrong with a checkpoint whose state could not be taken up; None for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any("checkpoint_connector" in frame.filename and "restore" in frame.name for frame in frames):
        return None
    reason = " ".join(str(error).split())[:300]
    return (
        f"the checkpoint does not fit ({type(error).__name__}: {reason}): it is of another version or other settings; "
        "model.init_from takes its weights alone"
    )


_CANNOT_WRITE = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write to another disk",
    errno.EROFS: "write to another place",
}


def from_files(error: BaseException | None) -> str | None:
    """Returns a line for an exception that comes from a file or a stream that cannot be used; None for any other."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__  # the settings parser wraps what a constructor raises
    if error is None or error.errno is None:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    if error.errno in _CANNOT_WRITE:
        return f"cannot write {name or 'a file'}: {error.strerror}; {_CANNOT_WRITE[error.errno]}"
    if name is not None:
        return f"cannot use '{name}': {error.strerror}"
    return f"cannot read or write a file: {error.strerror}" if error.errno == errno.EIO else None


def from_outside(error: Exception) -> str | None:
    """Returns a line for what befell the run and is no bug of it: a full disk, a process that is gone; else None."""
    if is_lost_contact(error):
        return "lost contact with another process of this run"
    worker = killed_worker(error)
    return f"{worker}; too little memory is the usual cause: lower data.num_workers" if worker else from_files(error)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception only says that another process is gone."""
    import torch

    text = str(error).lower()
    return isinstance(error, getattr(torch.distributed, "DistError", ())) or (
        isinstance(error, RuntimeError)
        and any(name in text for name in ("gloo", "nccl", "processgroup"))
        and any(word in text for word in ("connection", "closed", "reset", "peer", "timed out", "abort"))
    )


def killed_worker(error: BaseException) -> str | None:
    """Returns what torch says about a data loading process that is gone; None for any other error."""
    text = str(error)
    return text.rstrip(". ") if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid") else None
