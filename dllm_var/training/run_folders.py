"""Folders of runs, runs/NAME/version_N below trainer.default_root_dir: found, reserved and locked."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dllm_var.checkpoints.archive import is_sharded
from dllm_var.checkpoints.run_checkpoint import check_or_offer, newest_checkpoint
from dllm_var.errors import UserError
from dllm_var.files import put_back

RUNS = "runs"  # the default logger's save_dir
_VERSIONED_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # both keep a run in save_dir/name/version_N


class NothingToResume(UserError):
    """There is no checkpoint to continue from."""


# -- a new run ---------------------------------------------------------------------------------------------------------


def place_runs(trainer_settings: Any) -> None:
    """Puts the folder of the default logger into `trainer.default_root_dir`.

    Args:
        trainer_settings: The `trainer` section; changed in place.

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
    """Makes the folder of a new run, which no other run then takes, and points the loggers at it.

    Args:
        trainer_settings: The `trainer` section; the versions of its loggers are set in place.
        held: Removes the folder again when it ends and nothing is in there.

    Raises:
        UserError: When no folder can be made.
    """
    new = [logger for logger in _versioned(trainer_settings) if logger.version is None]
    roots = {Path(logger.save_dir) / (logger.name or "") for logger in new}
    number = 1 + max((found for root in roots for found in _numbered(root)), default=-1)
    while roots and not _make({root / version_name(number) for root in roots}, held):
        number += 1
    for logger in new:
        logger.version = number


def _make(folders: set[Path], held: ExitStack) -> bool:
    """Makes all of the folders, or none when one of them is there already."""
    with ExitStack() as made:
        for folder in folders:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
            except FileExistsError:
                return False
            except OSError as error:
                reason = f"cannot make the run folder {folder}: {error.strerror}"
                raise UserError(f"{reason}; trainer.default_root_dir puts runs elsewhere") from error
            made.callback(_remove_empty, folder)
        held.push(made.pop_all())
    return True


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def default_logger(name: str) -> dict[str, Any]:
    """Returns the settings of the logger that makes the run folder runs/NAME/version_N in trainer.default_root_dir."""
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": RUNS, "name": name, "version": None, "default_hp_metric": False},
    }


# -- one run at a time -------------------------------------------------------------------------------------------------


def lock(trainer_settings: Any, held: ExitStack) -> None:
    """Locks the folders that `fit` writes to, and puts back checkpoints that a killed run had set aside.

    Args:
        trainer_settings: The `trainer` section, with versions.
        held: Ends the locks.

    Raises:
        UserError: When another run writes to one of them.
    """
    checkpoints = [Path(folder) for folder in _dirpaths(trainer_settings)]
    versioned = _versioned(trainer_settings)
    runs = [Path(one.save_dir) / (one.name or "") / version_name(one.version) for one in versioned]
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
        opened = None
        while opened is None:
            opened = _try_to_lock(path, folder)
    except OSError as error:
        raise UserError(f"cannot lock the folder {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(opened)


def _try_to_lock(path: Path, folder: Path) -> int | None:
    """Locks a file and writes into it by whom; None when its holder has just ended and removed it."""
    with ExitStack() as undo:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        undo.callback(os.close, opened)
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(opened), path.stat()):
                return None
            os.ftruncate(opened, 0)
            os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(opened, 500, 0).decode(errors="replace") or "another process"
                raise UserError(
                    f"{folder} is in use by {holder}: wait for it or stop it, or start a new run without --resume"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # no locks on this file system
                raise
        undo.pop_all()
        return opened


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
    """Returns the checkpoint at a path, or the newest one of the run folder it is.

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
    """Finds the newest run with a checkpoint under the settings' folder and points the loggers at that run.

    Args:
        trainer_settings: The `trainer` section; its loggers' versions are set in place.

    Returns:
        The checkpoint to continue from.

    Raises:
        UserError: When there is no checkpoint; names the folder.
    """
    versioned = _versioned(trainer_settings)
    searched = _runs_folder(trainer_settings, versioned)
    run = searched
    if versioned:
        version = versioned[0].version
        run = searched / version_name(version) if version is not None else _newest_version(searched)
    folders = [Path(folder) for folder in _dirpaths(trainer_settings)]
    for folder in [*folders, run / "checkpoints"]:
        checkpoint = newest_checkpoint(folder)
        if checkpoint is not None:
            if run != searched:
                _go_on_in(run, versioned)
            return checkpoint
    where = ", ".join(str(folder) for folder in [*folders, run / "checkpoints" if run != searched else searched])
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
    versioned = _versioned(trainer_settings)
    run = checkpoint.absolute().parent.parent
    if versioned and run.parent == _runs_folder(trainer_settings, versioned).absolute():
        _go_on_in(run, versioned)
    return checkpoint


def _go_on_in(run: Path, versioned: list[Any]) -> None:
    number = run.name.removeprefix("version_")
    for init_args in versioned:
        if init_args.version is None:
            init_args.version = int(number) if number.isdigit() else run.name


def _runs_folder(trainer_settings: Any, versioned: list[Any]) -> Path:
    """Returns the folder that holds the numbered runs, or the one run when there is no logger to number them."""
    default_root = trainer_settings.get("default_root_dir") or "."
    if not versioned:
        return Path(default_root)
    return Path(versioned[0].save_dir or default_root) / (versioned[0].name or "")


def _newest_version(root: Path) -> Path:
    """Returns the newest run folder under `root` that holds a checkpoint; `root` itself when there is none."""
    newest_first = (path for _, path in sorted(_numbered(root).items(), reverse=True))
    return next((path for path in newest_first if newest_checkpoint(path / "checkpoints") is not None), root)


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
