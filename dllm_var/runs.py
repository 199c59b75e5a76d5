"""The run folder: runs/NAME/version_N with config.yaml, checkpoints/, TensorBoard events and what callbacks add."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from dllm_var.changed_settings import rows_per_step
from dllm_var.checkpointing.choose import check_or_offer, is_sharded, newest_checkpoint
from dllm_var.checkpointing.trainer import Trainer
from dllm_var.errors import UserError
from dllm_var.module import DiffusionLM

CONFIG_FILE = "config.yaml"
SAVE_EVERY = 500  # steps, when the settings do not say how checkpoints are kept
_VERSIONED_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # both keep a run in save_dir/name/version_N


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
    """Returns the settings of the logger that makes the run folder runs/NAME/version_N."""
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": name, "default_hp_metric": False},
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


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """Returns the folder in which the run keeps its checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def save_last(trainer: L.Trainer) -> Path:
    """Saves the present state as last.ckpt of the run, whole when this returns; every rank must call it.

    Returns:
        The checkpoint.
    """
    path = checkpoint_folder(trainer) / "last.ckpt"
    for callback in trainer.checkpoint_callbacks:  # so that a resumed run replaces this file, not beside it
        if isinstance(callback, ModelCheckpoint) and callback.save_last:
            callback.last_model_path = str(path)
    if trainer.is_global_zero and path.is_symlink():  # save_last="link": what it points to stays as it is
        path.unlink()
    trainer.save_checkpoint(path, weights_only=False)
    if isinstance(trainer, Trainer):
        trainer.finish_saving()
    return path


def checkpoint_at(path: str) -> str | Path:
    """Returns the checkpoint that `--ckpt_path` means: a file, a folder of shards, or the newest one of a run folder.

    Raises:
        UserError: When nothing is there, a folder without a checkpoint, or one that cannot be used.
    """
    if path in ("hpc", "registry") or path.startswith("registry:") or "://" in path:  # Lightning looks these up
        return path
    found = find_checkpoint(path, "ckpt_path")
    check_or_offer(found, "--ckpt_path")
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
    callbacks = trainer_settings.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    folders = [Path(c.init_args.dirpath) for c in callbacks if "init_args" in c and c.init_args.get("dirpath")]
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


class NothingToResume(UserError):
    """There is no checkpoint to continue from."""


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


def _versioned(trainer_settings: Any) -> list[Any]:
    """Returns the settings of the loggers that number their runs."""
    loggers = trainer_settings.get("logger")
    loggers = loggers if isinstance(loggers, list) else [loggers]
    return [
        logger.init_args
        for logger in loggers
        if str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1] in _VERSIONED_LOGGERS
    ]


def _runs_folder(trainer_settings: Any, versioned: list[Any]) -> Path:
    """Returns the folder that holds the numbered runs, or the one run when there is no logger to number them."""
    default_root = trainer_settings.get("default_root_dir") or "."
    if not versioned:
        return Path(default_root)
    return Path(versioned[0].save_dir or default_root) / (versioned[0].name or "")


def _go_on_in(run: Path, versioned: list[Any]) -> None:
    number = run.name.removeprefix("version_")
    for init_args in versioned:
        if init_args.version is None:
            init_args.version = int(number) if number.isdigit() else run.name


def version_name(version: int | str) -> str:
    """Returns the name of a run's folder, as Lightning's loggers form it."""
    return version if isinstance(version, str) else f"version_{version}"


def _newest_version(root: Path) -> Path:
    """Returns the newest run folder under `root` that holds a checkpoint; `root` itself when there is none."""
    numbered = [
        path for path in root.glob("version_*") if path.is_dir() and path.name.removeprefix("version_").isdigit()
    ]
    numbered.sort(key=lambda path: int(path.name.removeprefix("version_")), reverse=True)
    return next((path for path in numbered if newest_checkpoint(path / "checkpoints") is not None), root)
