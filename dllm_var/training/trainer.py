"""Lightning's Trainer, whose checkpoints are whole or not there; what it saves of a run, and when."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch.distributed.checkpoint.api import CheckpointException

from dllm_var.checkpoints.archive import CannotSave, write_index_checksum
from dllm_var.checkpoints.checkpoint_io import CheckedFiles
from dllm_var.checkpoints.run_checkpoint import SAVING, newest_usable
from dllm_var.files import discard, publish, write_text
from dllm_var.training.resume import rows_per_step
from dllm_var.training.run_folders import RunFolders, listed

CONFIG_FILE = "config.yaml"
SAVE_EVERY = 500  # steps, when the settings do not say how checkpoints are kept


class Trainer(L.Trainer):
    """Lightning's Trainer; a checkpoint has its name when all processes have written their parts of it.

    Files are written whole by the plugin, `CheckedFiles` or `BackgroundFiles`. When one process cannot write, all of
    them stop with CannotSave, which has the reason; what had the name before is untouched.
    """

    @property
    def keeps_checkpoints(self) -> bool:
        return bool(self.checkpoint_callbacks) and not self.fast_dev_run  # type: ignore[attr-defined]

    def checkpoint_folder(self) -> Path:
        """Returns the folder in which the run keeps last.ckpt; every rank must ask."""
        own = [Path(c.dirpath) for c in self.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return own[0] if own else Path(self.log_dir or self.default_root_dir) / "checkpoints"

    def save_last(self) -> Path:
        """Saves the present state as last.ckpt, whole when this returns; every rank must call it."""
        path = self.checkpoint_folder() / "last.ckpt"
        for callback in self.checkpoint_callbacks:  # so that a resumed run replaces this file, not beside it
            if isinstance(callback, ModelCheckpoint) and callback.save_last:
                callback.last_model_path = str(path)
        self.save_checkpoint(path, weights_only=False)
        self.finish_saving()
        return path

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        path = Path(filepath)
        staged = path.with_name(path.name + SAVING)  # for folders, and files of other plugins; ours writes to `path`
        if self.is_global_zero:
            discard(staged)  # what a killed process left is no part of this one
        path, staged = self.strategy.broadcast((path, staged))
        reason, written = None, False
        try:
            super().save_checkpoint(staged, weights_only, storage_options)
            written = True
            if self.is_global_zero and staged.exists():
                write_index_checksum(staged)
                publish(staged, path)
            elif self.is_global_zero and not isinstance(self.strategy.checkpoint_io, CheckedFiles):
                reason = (
                    f"trainer.plugins: {type(self.strategy.checkpoint_io).__name__} has not written {path} when it "
                    "returned: dllm_var.checkpoints.checkpoint_io.BackgroundFiles writes while training goes on"
                )
        except (OSError, CheckpointException) as error:
            reason = _reason(error, path)
            if not written:
                self.strategy.barrier()  # the ranks that succeeded wait there
        except BaseException:
            if self.is_global_zero:
                discard(staged)
            raise
        self._fail_together(reason, staged)

    def finish_saving(self) -> None:
        """Waits until checkpoints that are written in the background are whole; every rank must call it."""
        folder, reason = self.checkpoint_folder(), None
        try:
            self.strategy.checkpoint_io.teardown()
        except OSError as error:
            reason = _reason(error, folder / "last.ckpt")
        self._fail_together(reason)

    def _fail_together(self, reason: str | None, unfinished: Path | None = None) -> None:
        """Raises CannotSave on all ranks when one of them gives a reason, so that none waits for the others."""
        reasons = [reason] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(reasons, reason)
        for given in filter(None, reasons):
            if unfinished is not None and self.is_global_zero:
                discard(unfinished)
            raise CannotSave(given)


def _reason(error: Any, path: Path) -> str:
    """Says which checkpoint cannot be written, that at `path` or an earlier one, and which one is whole."""
    if isinstance(error, CheckpointException):  # those of several ranks
        error, _ = next(iter(error.failures.values()))
    name, why = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
    kept = newest_usable(path.parent)
    after = f"{kept} is whole: mend that, then go on with --resume" if kept else "there is no earlier one"
    return f"cannot write the checkpoint {name}: {why}; {after}"


def default_checkpoints(trainer_settings: Any, best: bool) -> list[ModelCheckpoint]:
    """Returns what keeps the last two checkpoints, and with `best` that of the lowest `val/loss`, by default."""
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
    """Saves the resolved settings, a YAML `text`, in the run folder when all checks have passed and the work begins.

    Without a logger there is no run folder, and nothing is saved. A different config.yaml that is already there (a
    resumed run with changed settings) is kept as config.1.yaml, config.2.yaml and so on. Checkpoints have them, too.
    """

    def __init__(self, text: str, folders: RunFolders) -> None:
        self.text, self.folders = text, folders

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folders.begun = True
        log_dir = trainer.log_dir  # asked on every rank: the first one tells the others
        if not trainer.loggers or log_dir is None or not trainer.is_global_zero:
            return
        path = Path(log_dir) / CONFIG_FILE
        if path.is_file() and path.read_text(encoding="utf-8") != self.text:
            taken = len(list(path.parent.glob("config.*.yaml")))
            path.rename(path.with_name(f"config.{taken + 1}.yaml"))
        write_text(path, self.text)

    on_test_start = on_predict_start = on_train_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_train_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text
        checkpoint["rows_per_step"] = rows_per_step(trainer, getattr(trainer, "datamodule", None))
