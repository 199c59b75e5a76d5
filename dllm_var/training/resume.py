"""Going on with a run bit for bit: the state that Lightning does not save, and the settings that may have changed."""

import random
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.utilities import rank_zero_info

from dllm_var.checkpoints.archive import UnusableCheckpoint, read_state
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.settings import load_yaml


class ExactResume(Callback):
    """Adds to checkpoints what Lightning leaves out, so that a run that is killed and resumed goes on bit for bit.

    - The random generators of all ranks, for samplers that draw, dropout and users' code.
    - The latest figures, which `ModelCheckpoint` and others may watch before the next step logs them again.
    - Whether the last step was validated. Validation that was due when the checkpoint was written, or under way, runs
      from its beginning: Lightning would leave it out, or measure only what remains of it.

    A checkpoint that is saved while a step is under way is that of the step before. Gradients are not saved: the
    resumed run trains the batches of the unfinished step again.
    """

    def __init__(self) -> None:
        self._in_step = self._validating = False  # a batch has begun whose step is not made yet; validation runs
        self._validated_step = -1
        self._last_step: dict[str, Any] = {}  # the number of the last finished step, and what checkpoints say of it
        self._random: dict[str, Any] = {}  # the generators after it; validation draws when it begins
        self._loaded: dict[str, Any] = {}  # this callback's part of the checkpoint, until training begins
        self._resumed = False  # and no batch has begun since

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._in_step = True
        if self._resumed:
            self._resumed = False
            _count_as_before(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step != self._last_step["step"]:
            self._step_is_made(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validating = not trainer.sanity_checking

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validating = False
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            if not self._in_step:  # it has drawn random numbers
                self._step_is_made(trainer)

    def _step_is_made(self, trainer: L.Trainer) -> None:
        self._in_step, self._random = False, random_state()
        self._last_step = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "fit_loop": trainer.fit_loop.state_dict(),
            "data": data_state(trainer),
        }

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds this callback's state; every rank must call it."""
        last = self._last_step
        unfinished = self._in_step and last["step"] == trainer.global_step
        if unfinished:
            checkpoint["epoch"], checkpoint["loops"]["fit_loop"] = last["epoch"], last["fit_loop"]
            checkpoint.update(last["data"])
        mine = self._random if unfinished or self._validating else random_state()
        states: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, mine)
        checkpoint["callbacks"][self.state_key] = {
            "validated_step": self._validated_step,
            "random": states,
            "metrics": {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()},
            "deferred": [callback._defer_save_until_validation for callback in _savers(trainer)],
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets the counters of validation from which Lightning concludes what to do; runs before it reads them."""
        self._loaded = checkpoint["callbacks"].get(self.state_key, {})
        if not self._loaded:
            return
        loops = checkpoint["loops"]["fit_loop"]
        batches, progress = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        self._validated_step = self._loaded["validated_step"]
        done = int(self._validated_step == checkpoint["global_step"] or not batches["total"]["processed"])
        progress["total"] = {"ready": 1, "started": 1, "processed": done, "completed": done}
        progress["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
        progress["is_last_batch"] = False
        data = type(getattr(trainer, "datamodule", None)).__qualname__
        self._last_step = {
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
            "fit_loop": loops,
            "data": {data: checkpoint[data]} if data in checkpoint else {},
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._resumed = bool(self._loaded)
        if not self._resumed:
            self._step_is_made(trainer)
            return
        states = self._loaded["random"]
        if len(states) == trainer.world_size:  # with another number of ranks there is no right one
            set_random_state(states[trainer.global_rank])
        self._random = random_state()
        batches = self._last_step["fit_loop"]["epoch_loop.batch_progress"]
        within_batch = batches["total"]["completed"] < batches["total"]["processed"]
        if len(states) == trainer.world_size and within_batch and batches["is_last_batch"]:
            torch.empty((), dtype=torch.int64).random_()  # the loader of the next epoch has drawn its seed already
        trainer.callback_metrics.update(self._loaded["metrics"])
        for callback, deferred in zip(_savers(trainer), self._loaded["deferred"], strict=False):
            callback._defer_save_until_validation = deferred
        self._loaded = {}


def data_state(trainer: L.Trainer) -> dict[str, Any]:
    """Returns a copy of the data module's state, as a checkpoint has it; nothing without a data module."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    return {} if datamodule is None else {type(datamodule).__qualname__: deepcopy(datamodule.state_dict())}


def _savers(trainer: L.Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _count_as_before(trainer: L.Trainer) -> None:
    """Sets two counters of steps that Lightning does not restore, when the first batch after the checkpoint begins."""
    for callback in _savers(trainer):
        if not callback.every_n_epochs:  # others save after validation
            callback._last_global_step_saved = trainer.global_step  # the present step has had its turn
    if trainer.lightning_module.automatic_optimization:  # Lightning counts it twice where validation is made up for
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class ResumableFitLoop(_FitLoop):
    """Lets a run that was killed after its last step come to its end: it is resumed, makes no step, and ends anew.

    Lightning leaves out whatever callbacks do at the end, such as the export of the weights.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
        self.epoch_loop = trainer.fit_loop.epoch_loop

    @property
    def skip(self) -> bool:
        skip = super().skip
        if not skip or self.trainer.ckpt_path is None or not self.max_batches:
            return skip
        rank_zero_info(
            f"training had come to its end at step {self.trainer.global_step}: only what follows it is done again; "
            "raise trainer.max_steps to train on"
        )
        return False


def random_state() -> dict[str, Any]:
    """Returns the state of the generators of Python, numpy and torch in this process, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - users' code may draw from it
    state = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *map(float, rest)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators into a state that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


_MAY_CHANGE = (
    "trainer",
    *("model.compile", "model.activation_checkpointing", "model.init_from", "model.loss_guard"),
    *("data.num_workers", "data.cache_dir", "data.check_resume"),
    *("model.transformer", "model.lora"),  # the model compares them by content, when the checkpoint is loaded
)
_COMPARED_BY_CONTENT = ("data.source", "data.tokenizer", "data.mask_token", "data.terminators")  # by PackedDataModule
_DECIDE_WHAT_IS_LEARNED = (
    *("trainer.precision", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val"),
    *("trainer.gradient_clip_algorithm", "trainer.overfit_batches", "trainer.limit_train_batches"),
)
_ROWS = ("data.batch_size", "trainer.accumulate_grad_batches")  # compared as the rows of a step


def check_changes(path: Path, text: str, trainer: L.Trainer, datamodule: Any) -> None:
    """Tells which settings have changed since a checkpoint was written; refuses those that make it another run.

    `text` has the run's resolved settings as YAML. With `data.check_resume=false` what would be refused is only told.
    """
    try:
        checkpoint = read_state(path)
        saved, rows_then = dict(load_yaml(checkpoint["config"])), checkpoint["rows_per_step"]
    except (UnusableCheckpoint, KeyError, TypeError, ValueError, yaml.YAMLError):  # damage is told when it is loaded
        rank_zero_info(f"{path} does not hold the settings it was made with: they cannot be compared with the present")
        return
    now, rows_now = load_yaml(text), rows_per_step(trainer, datamodule)
    changes: dict[str, str] = {}
    for section in ("model", "data", "trainer"):
        changes |= _changes(section, saved.get(section), now.get(section))
    if rows_then is not None and rows_now is not None:
        changes = {name: change for name, change in changes.items() if name not in _ROWS}
        changes |= _changes("rows of a step, over all devices", rows_then, rows_now)
    for change in changes.values():
        rank_zero_info(f"changed since the checkpoint: {change}")
    may_change = _MAY_CHANGE + (_COMPARED_BY_CONTENT if isinstance(datamodule, PackedDataModule) else ())
    refused = [
        change
        for name, change in changes.items()
        if not _is_part(name, may_change) or _is_part(name, _DECIDE_WHAT_IS_LEARNED)
    ]
    if refused and getattr(datamodule, "check_resume", True):
        raise UserError(
            f"changed since {path} was written: {', '.join(refused)}; set it back, start a new run with "
            "model.init_from, or go on all the same with --data.check_resume=false"
        )


def _is_part(name: str, settings: Iterable[str]) -> bool:
    """Whether a setting is one of these or stands below one."""
    return any(f"{name}.".startswith(f"{setting}.") for setting in settings)


def _changes(name: str, was: Any, now: Any) -> dict[str, str]:
    """Returns the differences of two values of a setting, by name; what only one version knows is left out."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return {} if was == now else {name: f"{name}: {_short(was)} -> {_short(now)}"}
    if was.get("class_path") != now.get("class_path"):
        return _changes(name, was.get("class_path"), now.get("class_path"))
    changes: dict[str, str] = {}
    for key in (key for key in was if key in now):
        changes |= _changes(name if key == "init_args" else f"{name}.{key}", was[key], now[key])
    return changes


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = f"[{', '.join(map(_short, value))}]"
    elif isinstance(value, dict) and "class_path" in value:
        value = value["class_path"]
    text = "null" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def rows_per_step(trainer: L.Trainer, datamodule: Any) -> int | None:
    """Returns how many rows an optimizer step is of, over all devices; None where the data has no `batch_size`."""
    batch_size = getattr(datamodule, "batch_size", None)
    if not isinstance(batch_size, int):
        return None
    groups = trainer.num_devices * trainer.num_nodes // getattr(trainer.strategy, "group_size", 1)
    return batch_size * groups * trainer.accumulate_grad_batches
