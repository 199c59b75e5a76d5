"""Lightning's Trainer and checkpoint plugin, with checkpoints that are whole or not there."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dllm_var.checkpoints.choose import newest_usable
from dllm_var.checkpoints.run_files import (
    SAVING,
    CannotSave,
    UnusableCheckpoint,
    discard,
    hidden,
    publish,
    read_file,
    remove,
    shown,
    write_file,
)
from dllm_var.checkpoints.shards import checksums, write_seal

_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckedFiles(TorchCheckpointIO):
    """Writes checkpoint files under a temporary name first, with a checksum, and reads them without running code.

    For any `lightning.Trainer`: `plugins=[CheckedFiles()]`. The command line always has it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(checkpoint, shown(Path(path)))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Loads a checkpoint, tensors and plain values only, whatever `weights_only` says.

        Raises:
            UnusableCheckpoint: When it is missing, damaged, of another format, or holds anything else.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        checkpoint = read_file(Path(path), map_location)
        if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
            raise UnusableCheckpoint(f"{path} is not a checkpoint of a training run")
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        if _is_remote(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


def _innermost(plugin: Any) -> Any:
    """Returns the plugin that writes, inside those that wrap it."""
    while (inner := getattr(plugin, "checkpoint_io", None)) is not None:
        plugin = inner
    return plugin


def _failed_in_parts(error: BaseException) -> bool:
    """Whether it comes from torch.distributed.checkpoint, which is then loaded already; importing it takes a while."""
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return api is not None and isinstance(error, api.CheckpointException)


class Trainer(L.Trainer):
    """Lightning's Trainer; a checkpoint in parts is also written under a temporary name and checked, by any strategy.

    Files are written whole by the plugin, `CheckedFiles` or `BackgroundFiles`. When one process cannot write, all of
    them stop, with the reason.
    """

    saved_at_end: tuple[Path, int] | None = None  # where and at which step

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Saves a checkpoint; every rank must call it.

        Raises:
            CannotSave: When it cannot be written, as on a full disk; what had the name before is untouched.
        """
        if _is_remote(filepath):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        if self.is_global_zero:
            discard(hidden(Path(filepath), SAVING))  # what a killed process left is no part of this one
        path = Path(self.strategy.broadcast(str(filepath)))
        if self.saved_at_end == (path, self.global_step):
            return  # callbacks after ours may have changed the weights for good, as weight averaging does
        staged = hidden(path, SAVING)  # folders come to be there, and files of other plugins; ours publishes its own
        save = super().save_checkpoint
        try:
            self._together(path, lambda: save(staged, weights_only, storage_options), barrier=True)
            is_there, is_folder = self.strategy.broadcast((staged.exists(), staged.is_dir()))
            if is_folder:
                self._together(path, lambda: self._seal(staged))
            if is_there:
                self._together(path, lambda: publish(staged, path) if self.is_global_zero else None)
            elif not isinstance(_innermost(self.strategy.checkpoint_io), CheckedFiles):
                raise CannotSave(
                    f"trainer.plugins: {type(self.strategy.checkpoint_io).__name__} has not written {path} when it "
                    "returned: dllm_var.checkpoints.background.BackgroundFiles writes while training goes on"
                )
        except BaseException:
            if self.is_global_zero:
                discard(staged)
            raise

    def finish_saving(self) -> None:
        """Waits until checkpoints that are written in the background are whole; every rank must call it.

        Raises:
            CannotSave: When one could not be written.
        """
        self._together(None, self.strategy.checkpoint_io.teardown)

    def _together(self, path: Path | None, work: Callable[[], None], barrier: bool = False) -> None:
        """Does a part of saving; when it fails on one rank it fails on all, so that none waits for the others."""
        failure: BaseException | None = None
        try:
            work()
        except BaseException as error:
            if not isinstance(error, OSError) and not _failed_in_parts(error):
                raise
            failure = error
            if barrier:  # the ranks that succeeded wait there
                self.strategy.barrier()
        if not self.strategy.reduce_boolean_decision(failure is None, all=True):
            said = self._gather(None if failure is None else self._reason(failure, path))
            raise CannotSave(next(reason for reason in said if reason is not None)) from None

    def _reason(self, error: BaseException, path: Path | None) -> str:
        if _failed_in_parts(error):
            failures = [inner for inner, _ in error.failures.values()]  # type: ignore[attr-defined]
            error = next((inner for inner in failures if isinstance(inner, OSError)), failures[0])
        file = Path(getattr(error, "filename", None) or path or "")
        if path is not None and file.suffix != path.suffix:  # a part of the checkpoint; else one written earlier
            named = f"{path} at step {self.global_step} ({file})"
        else:
            named = f"{file} at step {self.global_step}" if file == path else str(file)
        kept = newest_usable(file.parent if path is None else path.parent)
        first = "make room" if getattr(error, "errno", None) in _FULL else "mend that"
        after = f"{kept} is whole: {first}, then go on with --resume" if kept else "there is no earlier one"
        return f"cannot write the checkpoint {named}: {getattr(error, 'strerror', None) or error}; {after}"

    def _seal(self, folder: Path) -> None:
        digests = checksums(folder, self.global_rank, self.world_size)
        parts = self._gather(digests)
        if self.is_global_zero:
            write_seal(folder, {name: digest for part in parts for name, digest in part.items()})

    def _gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, on every rank."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values
