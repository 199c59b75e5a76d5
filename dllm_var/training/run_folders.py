"""Folders of runs, runs/NAME/version_N below trainer.default_root_dir: found, reserved and locked."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from dllm_var.checkpoints.archive import is_sharded
from dllm_var.checkpoints.run_checkpoint import check_or_offer, newest_checkpoint
from dllm_var.errors import UserError
from dllm_var.files import put_back

RUNS = "runs"  # the default logger's save_dir
_VERSIONED_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # both keep a run in save_dir/name/version_N
_LOCKED = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # on this file system


class NothingToResume(UserError):
    """There is no checkpoint to continue from."""


# -- a new run ---------------------------------------------------------------------------------------------------------


def default_logger(name: str) -> dict[str, Any]:
    """Returns the settings of the logger that makes the run folder runs/NAME/version_N in trainer.default_root_dir."""
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": RUNS, "name": name, "version": None, "default_hp_metric": False},
    }


def place_runs(trainer_settings: Any) -> None:
    """Puts the folder of the default logger into `trainer.default_root_dir`; changes the `trainer` section in place.

    Raises:
        UserError: When runs or checkpoints would be on another machine, which nothing here can lock or rename on.
    """
    root = trainer_settings.get("default_root_dir")
    if root:
        root = trainer_settings.default_root_dir = os.path.expanduser(root)
    named = [("default_root_dir", root), *(("callbacks.dirpath", folder) for folder in _dirpaths(trainer_settings))]
    for logger in _versioned(trainer_settings):
        if logger.save_dir == RUNS and root:
            logger.save_dir = os.path.join(root, RUNS)
        logger.save_dir = os.path.expanduser(os.path.expandvars(logger.save_dir))
        named.append(("logger.save_dir", logger.save_dir))
    for setting, place in named:
        if "://" in str(place):
            raise UserError(f"trainer.{setting}: '{place}' is no folder of this machine: give one, or mount it")


def reserve(trainer_settings: Any, held: ExitStack) -> None:
    """Makes the folder of a new run, which no other run then takes, and gives its number to the loggers in place.

    When `held` ends, the folder is removed again if nothing is in there.

    Raises:
        UserError: When no folder can be made.
    """
    new = [logger for logger in _versioned(trainer_settings) if logger.version is None]
    roots = [_root(logger) for logger in new]
    number = 1 + max((found for root in roots for found in _numbered(root)), default=-1)
    while roots and not _make(roots[0] / version_name(number), held):
        number += 1
    for logger in new:
        logger.version = number


def _make(folder: Path, held: ExitStack) -> bool:
    """Makes a folder; False when it is there already."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        reason = f"cannot make the run folder {folder}: {error.strerror}"
        raise UserError(f"{reason}; trainer.default_root_dir puts runs elsewhere") from error
    held.callback(_remove_empty, folder)
    return True


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


# -- one run at a time -------------------------------------------------------------------------------------------------


def lock(trainer_settings: Any, held: ExitStack) -> None:
    """Locks the folders that `fit` writes to until `held` ends, and puts back checkpoints that a killed run set aside.

    Raises:
        UserError: When another run writes to one of them.
    """
    runs = [_root(logger) / version_name(logger.version) for logger in _versioned(trainer_settings)]
    checkpoints = [Path(folder) for folder in _dirpaths(trainer_settings)]
    if not trainer_settings.get("logger") and trainer_settings.get("enable_checkpointing") is not False:
        checkpoints.append(Path(trainer_settings.get("default_root_dir") or ".") / "checkpoints")
    for folder in {folder.absolute(): folder for folder in [*runs, *checkpoints]}.values():
        held.enter_context(hold(folder))
    for folder in [*checkpoints, *(run / "checkpoints" for run in runs)]:
        put_back(folder)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Locks a folder; the system ends the lock with this process, however that ends, and on NFS as well.

    A file system without locks is used without one. The lock is the process's own (`fcntl.lockf`; `flock`, which
    filelock uses, is inherited): forked data loading processes that outlive it for a moment do not keep it.

    Raises:
        UserError: When another process holds it, or no lock can be written.
    """
    try:
        place = folder.resolve()  # the same for all links to it
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder: Lightning takes a folder with any file in it for that of an earlier run.
        beside = os.access(place.parent, os.W_OK)
        path = place.parent / f".{place.name}.lock" if beside else place / ".lock"
        file = _locked(path, folder)
    except OSError as error:
        raise UserError(f"cannot lock the folder {folder}: {error.strerror or error}") from error
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _locked(path: Path, folder: Path) -> TextIO:
    """Returns a file that is locked, and says by whom."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - to be closed by the caller
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
            file.close()  # its holder has just ended and removed it
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return file
            file.seek(0)
            holder = file.read(500) or "another process"
            file.close()
            if error.errno not in _LOCKED:
                raise
            raise UserError(
                f"{folder} is in use by {holder}: wait for it or stop it, or start a new run without --resume"
            ) from None


# -- going on ----------------------------------------------------------------------------------------------------------


def checkpoint_at(path: str) -> Path:
    """Returns the checkpoint that `--ckpt_path` means: a file, a folder of shards, or the newest one of a run folder.

    Raises:
        UserError: When nothing is there, a folder without a checkpoint, or one that cannot be used.
    """
    found = find_checkpoint(path, "ckpt_path")
    check_or_offer(found, "--ckpt_path=")
    return found


def find_checkpoint(path: str, setting: str) -> Path:
    """Returns the checkpoint at a path, or the newest one of the run folder there.

    Raises:
        UserError: When there is none; names the setting.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{setting}: there is no file or folder '{path}'")
    found = newest_checkpoint(place / "checkpoints") or place
    if found.is_dir() and not is_sharded(found):
        raise UserError(
            f"{setting}: there is no checkpoint in '{path}': give a .ckpt file or a run folder that has one"
        )
    return found


def continue_newest(trainer_settings: Any) -> Path:
    """Returns the newest checkpoint of the newest run that has one, and points the loggers in the settings at that run.

    Raises:
        NothingToResume: When there is no checkpoint; names the folder.
    """
    versioned = _versioned(trainer_settings)
    root = _runs_folder(trainer_settings)
    if not versioned:
        runs = [root]
    elif versioned[0].version is not None:
        runs = [root / version_name(versioned[0].version)]
    else:
        runs = [path for _, path in sorted(_numbered(root).items(), reverse=True)]
    own = [Path(folder) for folder in _dirpaths(trainer_settings)]
    for folder in [*own, *(run / "checkpoints" for run in runs)]:
        checkpoint = newest_checkpoint(folder)
        if checkpoint is not None:
            if folder.parent in runs:
                _go_on_in(folder.parent, versioned)
            return checkpoint
    where = ", ".join(map(str, [*own, runs[0] / "checkpoints" if len(runs) == 1 else root]))
    raise NothingToResume(
        f"--resume found no checkpoint in {where}: start the run without --resume, or give --resume=auto, which starts "
        "one when there is nothing to resume"
    )


def continue_from(path: str, trainer_settings: Any) -> Path:
    """Finds a checkpoint that `--resume=PATH` names and points the loggers at its run, when it is one of theirs.

    Raises:
        UserError: When there is no checkpoint.
    """
    checkpoint = find_checkpoint(path, "--resume")
    run = checkpoint.absolute().parent.parent
    if run.parent == _runs_folder(trainer_settings).absolute():
        _go_on_in(run, _versioned(trainer_settings))
    return checkpoint


def _go_on_in(run: Path, versioned: list[Any]) -> None:
    number = run.name.removeprefix("version_")
    for logger in versioned:
        if logger.version is None:
            logger.version = int(number) if number.isdigit() else run.name


def _runs_folder(trainer_settings: Any) -> Path:
    """Returns the folder that holds the numbered runs, or the one run when there is no logger to number them."""
    versioned = _versioned(trainer_settings)
    return _root(versioned[0]) if versioned else Path(trainer_settings.get("default_root_dir") or ".")


def _root(logger: Any) -> Path:
    return Path(logger.save_dir) / (logger.name or "")


def _numbered(root: Path) -> dict[int, Path]:
    """Returns the run folders version_N under `root`, by N."""
    named = ((path.name.removeprefix("version_"), path) for path in root.glob("version_*") if path.is_dir())
    return {int(number): path for number, path in named if number.isdecimal()}


def version_name(version: int | str) -> str:
    """Returns the name of a run's folder, as Lightning's loggers form it."""
    return version if isinstance(version, str) else f"version_{version}"


def _versioned(trainer_settings: Any) -> list[Any]:
    """Returns the settings of the loggers that number their runs."""
    return [
        logger.init_args
        for logger in listed(trainer_settings.get("logger"))
        if str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1] in _VERSIONED_LOGGERS
    ]


def _dirpaths(trainer_settings: Any) -> list[str]:
    """Returns the folders that callbacks are told to keep checkpoints in."""
    callbacks = listed(trainer_settings.get("callbacks"))
    return [str(c.init_args.dirpath) for c in callbacks if "init_args" in c and c.init_args.get("dirpath")]


def listed(value: Any) -> list[Any]:
    """Returns a setting that may be a list, one value or nothing as a list."""
    return value if isinstance(value, list) else [value] if value else []
