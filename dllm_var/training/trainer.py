"""Lightning's Trainer, whose checkpoints are whole or not there; what it saves of a run, and when."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from dllm_var.checkpoints.archive import CannotSave, write_index_checksum
from dllm_var.checkpoints.checkpoint_io import CheckedFiles
from dllm_var.checkpoints.run_checkpoint import SAVING, newest_usable
from dllm_var.files import discard, publish, write_text
from dllm_var.training.resume import rows_per_step
from dllm_var.training.run_folders import listed

CONFIG_FILE = "config.yaml"
SAVE_EVERY = 500  # steps, when the settings do not say how checkpoints are kept


class Trainer(L.Trainer):
    """Lightning's Trainer; a checkpoint has its name when all processes have written their parts of it.

    Files are written whole by the plugin, `CheckedFiles` or `BackgroundFiles`. When one process cannot write, all of
    them stop, with the reason.
    """

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether the run saves any checkpoints."""
        return bool(self.checkpoint_callbacks) and not self.fast_dev_run  # type: ignore[attr-defined]

    def checkpoint_folders(self) -> list[Path]:
        """Returns the folders in which the run keeps checkpoints, last.ckpt in the first; every rank must ask."""
        own = [Path(c.dirpath) for c in self.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return [*own, Path(self.log_dir or self.default_root_dir) / "checkpoints"]

    def save_last(self) -> Path:
        """Saves the present state as last.ckpt, whole when this returns, and returns its path; every rank must call it.

        Raises:
            CannotSave: When it cannot be written.
        """
        path = self.checkpoint_folders()[0] / "last.ckpt"
        for callback in self.checkpoint_callbacks:  # so that a resumed run replaces this file, not beside it
            if isinstance(callback, ModelCheckpoint) and callback.save_last:
                callback.last_model_path = str(path)
        if self.is_global_zero and path.is_symlink():  # save_last="link": what it points to stays as it is
            path.unlink()
        self.save_checkpoint(path, weights_only=False)
        self.finish_saving()
        return path

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Saves a checkpoint; every rank must call it.

        Raises:
            CannotSave: When it cannot be written, as on a full disk; what had the name before is untouched.
        """
        if self.is_global_zero:
            discard(_staged(Path(filepath)))  # what a killed process left is no part of this one
        path = Path(self.strategy.broadcast(str(filepath)))
        staged = _staged(path)  # strategies write folders there, and other plugins files; ours writes to `path`
        save = super().save_checkpoint
        try:
            self._together(path, lambda: save(staged, weights_only, storage_options), barrier=True)
            if self.strategy.broadcast(staged.exists()):
                self._together(path, lambda: _complete(staged, path) if self.is_global_zero else None)
            elif not isinstance(_innermost(self.strategy.checkpoint_io), CheckedFiles):
                raise CannotSave(
                    f"trainer.plugins: {type(self.strategy.checkpoint_io).__name__} has not written {path} when it "
                    "returned: dllm_var.checkpoints.checkpoint_io.BackgroundFiles writes while training goes on"
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
        if self.strategy.reduce_boolean_decision(failure is None, all=True):
            return
        reasons = [None if failure is None else self._reason(failure, path)]
        if self.world_size > 1:
            reasons *= self.world_size
            torch.distributed.all_gather_object(reasons, reasons[0])
        raise CannotSave(next(reason for reason in reasons if reason is not None)) from None

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
        first = "make room" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        after = f"{kept} is whole: {first}, then go on with --resume" if kept else "there is no earlier one"
        return f"cannot write the checkpoint {named}: {getattr(error, 'strerror', None) or error}; {after}"


def _staged(path: Path) -> Path:
    return path.with_name(path.name + SAVING)


def _complete(staged: Path, path: Path) -> None:
    if staged.is_dir():
        write_index_checksum(staged)
    publish(staged, path)


def _innermost(plugin: Any) -> Any:
    """Returns the plugin that writes, inside those that wrap it."""
    while (inner := getattr(plugin, "checkpoint_io", None)) is not None:
        plugin = inner
    return plugin


def _failed_in_parts(error: BaseException) -> bool:
    """Whether it comes from torch.distributed.checkpoint, which is then loaded already; importing it takes a while."""
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return api is not None and isinstance(error, api.CheckpointException)


def default_checkpoints(trainer_settings: Any, best: bool) -> list[ModelCheckpoint]:
    """Returns what keeps checkpoints when the built `trainer` section has nothing that does: the last two.

    With `best` it also keeps the best one by `val/loss`.
    """
    keeps = any(isinstance(callback, Checkpoint) for callback in listed(trainer_settings.get("callbacks")))
    if keeps or trainer_settings.get("enable_checkpointing") is False:
        return []
    kept = ModelCheckpoint(
        monitor="step",
        mode="max",
        save_top_k=2,
        save_last=True,
        every_n_train_steps=SAVE_EVERY,
        save_on_train_epoch_end=True,  # or Lightning puts off the save of an epoch's last step
    )
    if not best:
        return [kept]
    return [kept, ModelCheckpoint(filename="best-{epoch}-{step}", monitor="val/loss", save_on_train_epoch_end=False)]


class SaveConfig(Callback):
    """Saves the resolved settings, a YAML `text`, in the run folder, and shows them in TensorBoard's text tab.

    Without a logger there is no run folder, and nothing is saved. A different config.yaml that is already there (a
    resumed run with changed settings) is kept as config.1.yaml, config.2.yaml and so on. Checkpoints have them, too.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # asked on every rank: the first one tells the others
        if not trainer.loggers or log_dir is None or not trainer.is_global_zero:
            return
        path = Path(log_dir) / CONFIG_FILE
        if path.is_file() and path.read_text(encoding="utf-8") != self.text:
            taken = len(list(path.parent.glob("config.*.yaml")))
            path.rename(path.with_name(f"config.{taken + 1}.yaml"))
        write_text(path, self.text)
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("config", f"```yaml\n{self.text}\n```", global_step=trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text
        checkpoint["rows_per_step"] = rows_per_step(trainer, getattr(trainer, "datamodule", None))
