"""Folders of runs: which checkpoint a run goes on from, and a folder that no other run writes to."""

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from dllm_var.checkpoints.archive import is_shard_folder
from dllm_var.checkpoints.run_checkpoint import check_or_offer, clear_leftovers, newest_checkpoint
from dllm_var.errors import UserError
from dllm_var.files import discard
from dllm_var.training.ranks import is_first, is_launched_child

RUNS = "runs"  # the default logger's save_dir
_VERSIONED_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # both keep a run in save_dir/name/version_N
_RESUMED = "DLLM_VAR_RESUMED"  # the checkpoint that the first process goes on from, for those it starts


def default_logger(name: str) -> dict[str, Any]:
    """Returns the settings of the logger that makes the run folder runs/NAME/version_N in trainer.default_root_dir."""
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": RUNS, "name": name, "version": None, "default_hp_metric": False},
    }


def checkpoint_at(path: str, setting: str) -> Path:
    """Returns the checkpoint at a path, or the newest one of the run folder there; raises UserError without one."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"{setting}: there is no file or folder '{path}'")
    found = newest_checkpoint(place / "checkpoints") or place
    if found.is_dir() and not is_shard_folder(found):
        raise UserError(f"{setting}: no checkpoint in '{path}': give a .ckpt file or a run folder that has one")
    return found


class RunFolders:
    """The folders to which the `trainer` settings send a run: runs/NAME/version_N, and others for checkpoints.

    The settings are completed in place: the loggers get the folder of the runs, and later the number of the run. Those
    of a `command` that does not train go to runs/NAME/COMMAND/version_N, and training keeps its numbers.
    """

    def __init__(self, trainer: Any, command: str = "fit") -> None:
        self.begun = False  # whether the folder is to stay: all checks have passed
        root = os.path.expanduser(trainer.get("default_root_dir") or "")
        loggers = listed(trainer.get("logger"))
        versioned = [one for one in loggers if str(one.get("class_path")).rpartition(".")[2] in _VERSIONED_LOGGERS]
        self.loggers = [logger.init_args for logger in versioned]
        for logger in self.loggers:
            parent = root if logger.save_dir == RUNS else ""
            logger.save_dir = os.path.join(parent, os.path.expanduser(os.path.expandvars(logger.save_dir)))
            if command != "fit" and logger.version is None:
                logger.name = os.path.join(logger.name or "", command)
        self.runs = [Path(logger.save_dir, logger.name or "") for logger in self.loggers]  # one for each logger
        callbacks = [callback.get("init_args") or {} for callback in listed(trainer.get("callbacks"))]
        self.checkpoints = [Path(os.path.expanduser(one["dirpath"])) for one in callbacks if one.get("dirpath")]
        self.keeps_nothing = bool(trainer.get("fast_dev_run"))
        if not loggers and trainer.get("enable_checkpointing") is not False:
            self.checkpoints.append(Path(root, "checkpoints"))
        for place in [root, *(logger.save_dir for logger in self.loggers), *(c.get("dirpath") for c in callbacks)]:
            if "://" in str(place):  # nothing there can be locked or renamed
                raise UserError(f"trainer: '{place}' is no folder of this machine: give one, or mount it")

    def enter(self, resume: str | None, held: ExitStack, trains: bool) -> Path | None:
        """Reserves the folder of a new run, or finds that of the run to go on with, and locks it until `held` ends.

        `resume` is what `--resume` says: `newest`, `auto` or a path; None for a new run. Returns the checkpoint to go
        on from. A run that does not train takes no lock.
        """
        if is_launched_child():
            resume = os.environ[_RESUMED] or None
        checkpoint = self.to_resume(resume)
        if is_first() and not self.keeps_nothing:
            self.reserve(held)
            if trains:
                self.lock(held)
                checkpoint = self.to_resume(resume)  # another run may have written there until now
            if checkpoint is not None:
                check_or_offer(checkpoint, "--resume=")
        os.environ[_RESUMED] = str(checkpoint or "")
        if checkpoint is not None:
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        return checkpoint

    def to_resume(self, resume: str | None) -> Path | None:
        """Returns the checkpoint that `--resume` means; the loggers go on in its run if it is one of theirs."""
        if resume is None:
            return None
        named = resume not in ("newest", "auto")
        checkpoint = checkpoint_at(resume, "--resume") if named else self.newest(required=resume == "newest")
        if checkpoint is not None and self.runs:
            run = checkpoint.absolute().parent.parent
            if run.parent == self.runs[0].absolute():
                self._set_version(run.name)
        return checkpoint

    def newest(self, required: bool = True) -> Path | None:
        """Returns the newest checkpoint of the newest run that has one; None, or UserError if `required`, without."""
        runs: list[Path] = []
        if self.loggers and self.loggers[0].version is None:
            runs = [path for _, path in sorted(_numbered(self.runs[0]).items(), reverse=True)]
        elif self.loggers:
            runs = [self.runs[0] / version_name(self.loggers[0].version)]
        folders = [*self.checkpoints, *(run / "checkpoints" for run in runs)]
        found = next(filter(None, map(newest_checkpoint, folders)), None)
        if found or not required:
            return found
        searched = ", ".join(map(str, [*self.checkpoints, *self.runs[:1]])) or "any folder that the settings name"
        raise UserError(
            f"--resume found no checkpoint in {searched}: start the run without --resume, or give --resume=auto, which "
            "starts one when there is nothing to resume"
        )

    def reserve(self, held: ExitStack) -> None:
        """Makes a new run's folder, which `held` removes if nothing begins, and gives its number to the loggers."""
        new = [runs for logger, runs in zip(self.loggers, self.runs, strict=True) if logger.version is None]
        number = 1 + max((found for runs in new for found in _numbered(runs)), default=-1)
        if new:
            while not _make(folder := new[0] / version_name(number)):
                number += 1
            held.callback(self._remove_unused, folder)
            self._set_version(number)

    def _remove_unused(self, folder: Path) -> None:
        if not self.begun:  # the run failed before its first step, but loggers have made files
            discard(folder)

    def _set_version(self, version: int | str) -> None:
        for logger in self.loggers:
            if logger.version is None:
                logger.version = version

    def lock(self, held: ExitStack) -> None:
        """Locks the folders until `held` ends, and clears what a killed run has left there."""
        runs = [run / version_name(logger.version) for run, logger in zip(self.runs, self.loggers, strict=True)]
        for folder in dict.fromkeys([*runs, *self.checkpoints]):
            held.enter_context(hold(folder))
        for folder in [*self.checkpoints, *(run / "checkpoints" for run in runs)]:
            clear_leftovers(folder)


def _make(folder: Path) -> bool:
    """Makes a folder; returns False when it is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        reason = f"cannot make the run folder {folder}: {error.strerror}"
        raise UserError(f"{reason}; trainer.default_root_dir puts runs elsewhere") from error
    return True


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Locks a folder; the system ends the lock with this process, however that ends, and on NFS as well.

    The lock is the process's own (`fcntl.lockf`; `flock`, which filelock uses, is inherited): forked data loading
    processes that outlive it for a moment do not keep it.
    """
    place = folder.resolve()  # the same for all links to it
    if place.exists() and not place.is_dir():
        raise UserError(f"{folder} is a file, and checkpoints go into a folder: name another one")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder if possible: Lightning takes a folder with any file in it for that of an earlier run.
        beside = os.access(place.parent, os.W_OK)
        path = place.parent / f".{place.name}.lock" if beside else place / ".lock"
        file = _locked(path, folder)
    except OSError as error:
        raise UserError(f"cannot lock the folder {folder}: {error.strerror or error}") from error
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _locked(path: Path, folder: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read(500) or "another process"
            raise UserError(
                f"{folder} is in use by {holder}: wait for it or stop it, or start a new run without --resume"
            ) from None
        except OSError:  # a file system without locks is used without one
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its holder has just ended and removed it


def _numbered(root: Path) -> dict[int, Path]:
    """Returns the run folders version_N under `root`, by N."""
    named = ((path.name.removeprefix("version_"), path) for path in root.glob("version_*") if path.is_dir())
    return {int(number): path for number, path in named if number.isdecimal()}


def version_name(version: int | str) -> str:
    """Returns the name of a run's folder, as Lightning's loggers form it."""
    return version if isinstance(version, str) else f"version_{version}"


def listed(value: Any) -> list[Any]:
    """Returns a setting that may be a list, one value or nothing as a list."""
    return value if isinstance(value, list) else [value] if value else []
