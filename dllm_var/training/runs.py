"""The content of a run folder: config.yaml, checkpoints/, TensorBoard events and what callbacks add."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from dllm_var.module import DiffusionLM
from dllm_var.training.changed_settings import rows_per_step
from dllm_var.training.checkpointing import Trainer
from dllm_var.training.run_folders import RUNS

CONFIG_FILE = "config.yaml"
SAVE_EVERY = 500  # steps, when the settings do not say how checkpoints are kept


class SaveConfig(SaveConfigCallback):
    """Saves the resolved settings in the run folder and shows them in TensorBoard's text tab.

    Without a logger there is no run folder, and nothing is saved. A different config.yaml that is already there (a
    resumed run with changed settings) is kept as config.1.yaml, config.2.yaml and so on. Checkpoints have them, too.

    Args:
        text: The settings as YAML.
        *args: Of Lightning's callback, as are `kwargs`.
    """

    def __init__(self, *args: Any, text: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text = text

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not trainer.loggers:
            return
        self.save_to_log_dir = False  # done below
        log_dir = trainer.log_dir  # asked on every rank: the first one tells the others
        if trainer.is_global_zero and not self.already_saved and log_dir is not None:
            path = Path(log_dir) / CONFIG_FILE
            self._keep_earlier(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text, encoding="utf-8")
        super().setup(trainer, pl_module, stage)

    def _keep_earlier(self, path: Path) -> None:
        if not path.is_file() or path.read_text() == self.text:
            return
        number = 1
        while (kept := path.with_name(f"config.{number}.yaml")).exists():
            number += 1
        path.rename(kept)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text
        checkpoint["rows_per_step"] = rows_per_step(trainer, getattr(trainer, "datamodule", None))

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("config", f"```yaml\n{self.text}\n```", global_step=trainer.global_step)


def default_logger(name: str) -> dict[str, Any]:
    """Returns the settings of the logger that makes the run folder runs/NAME/version_N in trainer.default_root_dir."""
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": RUNS, "name": name, "version": None, "default_hp_metric": False},
    }


def default_checkpoints(settings: Any) -> list[ModelCheckpoint]:
    """Returns what keeps checkpoints when the settings name nothing that does: the last two, and the best.

    Args:
        settings: Of a Trainer command.
    """
    trainer = settings.trainer
    if trainer.get("enable_checkpointing") is False:
        return []
    named = trainer.get("callbacks") or []
    for callback in named if isinstance(named, list) else [named]:
        module, _, name = str(getattr(callback, "class_path", "")).rpartition(".")
        if module and issubclass(getattr(import_module(module), name), Checkpoint):
            return []
    kept = [
        ModelCheckpoint(
            monitor="step",
            mode="max",
            save_top_k=2,
            save_last=True,
            every_n_train_steps=SAVE_EVERY,
            save_on_train_epoch_end=True,  # or Lightning puts off the save of an epoch's last step
        )
    ]
    kind = str(settings.model.class_path).rpartition(".")
    if issubclass(getattr(import_module(kind[0]), kind[2]), DiffusionLM):
        kept.append(ModelCheckpoint(filename="best-{epoch}-{step}", monitor="val/loss", save_on_train_epoch_end=False))
    return kept


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Returns the folders in which the run keeps checkpoints, last.ckpt in the first; every rank must ask."""
    own = [Path(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return [*own, Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"]


def save_last(trainer: L.Trainer) -> Path:
    """Saves the present state as last.ckpt of the run, whole when this returns; every rank must call it.

    Returns:
        The checkpoint.
    """
    path = checkpoint_folders(trainer)[0] / "last.ckpt"
    for callback in trainer.checkpoint_callbacks:  # so that a resumed run replaces this file, not beside it
        if isinstance(callback, ModelCheckpoint) and callback.save_last:
            callback.last_model_path = str(path)
    if trainer.is_global_zero and path.is_symlink():  # save_last="link": what it points to stays as it is
        path.unlink()
    trainer.save_checkpoint(path, weights_only=False)
    if isinstance(trainer, Trainer):
        trainer.finish_saving()
    return path
