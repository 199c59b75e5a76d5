"""Lightning's Trainer and checkpoint plugin, with checkpoints that are whole or not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dllm_var.checkpointing.choose import newest_usable
from dllm_var.checkpointing.files import (
    UNFINISHED,
    CannotSave,
    UnusableCheckpoint,
    discard,
    hidden,
    publish,
    read_file,
    remove,
    write_file,
)
from dllm_var.checkpointing.shards import checksums, write_seal


class CheckedFiles(TorchCheckpointIO):
    """Writes checkpoint files under a temporary name first, with a checksum, and reads them without running code.

    For any `lightning.Trainer`: `plugins=[CheckedFiles()]`. The command line always has it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(checkpoint, Path(path))

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


def _failed_in_parts(error: BaseException) -> bool:
    """Whether it comes from torch.distributed.checkpoint, which is then loaded already; importing it takes a while."""
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return api is not None and isinstance(error, api.CheckpointException)


class Trainer(L.Trainer):
    """Lightning's Trainer; a checkpoint in parts is also written under a temporary name and checked, by any strategy.

    When one process cannot write, all of them stop, with the reason.
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
        path = Path(self.strategy.broadcast(str(filepath)))
        if self.saved_at_end == (path, self.global_step):
            return  # callbacks after ours may have changed the weights for good, as weight averaging does
        unfinished = hidden(path, UNFINISHED)
        save = super().save_checkpoint
        try:
            self._together(path, lambda: save(unfinished, weights_only, storage_options), barrier=True)
            if self.strategy.broadcast(unfinished.is_dir()):
                self._together(path, lambda: self._seal(unfinished))
            self._together(path, lambda: publish(unfinished, path) if self.is_global_zero else None)
        except BaseException:
            if self.is_global_zero:
                discard(unfinished)
            raise

    def _together(self, path: Path, work: Callable[[], None], barrier: bool = False) -> None:
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
            raise CannotSave(self._why(path, failure)) from None

    def _why(self, path: Path, failure: Any) -> str:
        if failure is not None and _failed_in_parts(failure):
            failures = [error for error, _ in failure.failures.values()]
            failure = next((error for error in failures if isinstance(error, OSError)), failures[0])
        reason = getattr(failure, "strerror", None) or failure or "another process failed"
        kept = newest_usable(path.parent) if self.is_global_zero and path.parent.is_dir() else None
        after = f"{kept} is whole: make room, then go on with --resume" if kept else "there is no earlier one"
        return f"cannot write the checkpoint {path} at step {self.global_step}: {reason}; {after}"

    def _seal(self, folder: Path) -> None:
        digests = checksums(folder, self.global_rank, self.world_size)
        parts: list[Any] = [digests]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * self.world_size
            torch.distributed.all_gather_object(parts, digests)
        if self.is_global_zero:
            write_seal(folder, {name: digest for part in parts for name, digest in part.items()})
