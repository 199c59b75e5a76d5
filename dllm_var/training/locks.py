"""Locks on folders that one run at a time may write to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dllm_var.errors import UserError


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Locks a folder; the system ends the lock with this process, however that ends, and on NFS as well.

    A file system without locks is used without one. The lock is the process's own (`fcntl.lockf`), so that forked data
    loading processes that outlive it for a moment do not keep it.

    Raises:
        UserError: When another process holds it, or no lock can be written.
    """
    try:
        place = folder.resolve()  # the same for all links to it
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder: Lightning takes a folder with any file in it for that of an earlier run.
        beside = os.access(place.parent, os.W_OK)
        path = place.parent / f".{place.name}.lock" if beside else place / ".lock"
        opened = _locked(path, folder)
    except OSError as error:
        raise UserError(f"cannot lock the folder {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(opened)


def _locked(path: Path, folder: Path) -> int:
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _try_to_lock(opened, path, folder):
                return opened
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)


def _try_to_lock(opened: int, path: Path, folder: Path) -> bool:
    """Locks an open file and says in it by whom; false when it is no longer the one at the path."""
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return True  # no locks on this file system
        holder = _read(opened)
        if _is_my_predecessor(holder):
            path.unlink(missing_ok=True)
            return False
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise UserError(
            f"{folder} is in use by {who}: wait for it or stop it, or start a new run without --resume"
        ) from None
    try:
        if not os.path.samestat(os.fstat(opened), path.stat()):
            return False
    except FileNotFoundError:  # its holder has just ended and removed it
        return False
    os.ftruncate(opened, 0)
    os.pwrite(opened, json.dumps(_myself()).encode(), 0)
    return True


def _myself() -> dict[str, Any]:
    starts = {"job": os.environ.get("SLURM_JOB_ID"), "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}
    return {"pid": os.getpid(), "host": socket.gethostname(), **starts}


def _read(opened: int) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(os.pread(opened, 10_000, 0))
        if isinstance(found, dict) and found.keys() == _myself().keys():
            return found
    return {}


def _is_my_predecessor(holder: dict[str, Any]) -> bool:
    """Whether it is an earlier start of this SLURM job: it is over, although a node that is down has not said so."""
    me = _myself()
    return bool(holder) and me["job"] is not None and me["job"] == holder["job"] and holder["restarts"] < me["restarts"]
