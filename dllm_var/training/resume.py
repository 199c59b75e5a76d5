"""Going on with a run bit for bit: the state that Lightning does not save, and the settings that may have changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.utilities import rank_zero_info

from dllm_var.checkpoints.archive import UnusableCheckpoint, read_state
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.settings import load_yaml

# -- state -------------------------------------------------------------------------------------------------------------


class ExactResume(Callback):
    """Adds to checkpoints what Lightning leaves out, so that a run that is killed and resumed goes on bit for bit.

    - The random generators of all ranks. The package's own rows and noise need none; samplers that draw, dropout and
      users' code do.
    - The latest figures, which `ModelCheckpoint` and others may watch before the next step logs them again.
    - Whether the last step was validated. Validation that was due when the checkpoint was written, or under way, runs
      from its beginning: Lightning would leave it out, or measure only what remains of it.

    A checkpoint that is saved between two batches is that of a finished optimizer step. Gradients are not saved: of
    batches that were being accumulated it says that they are not trained yet, and the resumed run trains them again.
    """

    def __init__(self) -> None:
        self._validated_step = self._loaded_step = -1
        self._accumulates = False
        self._in_step = False  # a batch has begun whose step is not made yet
        self._after_step: dict[str, Any] | None = None  # state after the last step that such batches change
        self._torch: dict[str, Any] = {}  # torch's generators after the last step; validation draws when it begins
        self._before_validation: dict[str, Any] | None = None  # all generators, while validation runs
        self._loaded: dict[str, Any] = {}
        self._epoch_is_over = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
        self._accumulates = scheduled or trainer.accumulate_grad_batches > 1
        self._loaded, self._after_step, self._before_validation, self._loaded_step = {}, None, None, -1
        self._in_step = self._epoch_is_over = False

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._in_step = True
        if trainer.global_step == self._loaded_step:
            _count_as_before(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._after_step is None or trainer.global_step != self._after_step["step"]:
            self._step_is_made(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and not self._in_step:
            self._before_validation = random_state() | self._torch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before_validation = None
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            if not self._in_step:  # it has drawn random numbers
                self._step_is_made(trainer)

    def _step_is_made(self, trainer: L.Trainer) -> None:
        self._in_step, self._torch = False, torch_state()
        if self._accumulates:  # a checkpoint may be saved before the next step is made
            self._after_step = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "fit_loop": trainer.fit_loop.state_dict(),
                "data": data_state(trainer),
                "random": random_state(),
            }

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds this callback's state; every rank must call it."""
        mine, before = self._before_validation or random_state(), self._after_step
        if self._in_step and before is not None and before["step"] == trainer.global_step:
            mine, checkpoint["epoch"] = before["random"], before["epoch"]
            checkpoint["loops"]["fit_loop"] = before["fit_loop"]
            checkpoint.update(before["data"])
        states: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, mine)
        metrics = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
        deferred = [callback._defer_save_until_validation for callback in _savers(trainer)]
        own = {"validated_step": self._validated_step, "random": states, "metrics": metrics, "deferred": deferred}
        checkpoint["callbacks"][self.state_key] = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated_step, self._loaded = state_dict["validated_step"], state_dict

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets the counters of validation from which Lightning concludes what to do; runs before it reads them."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        progress, batches = loops.get("epoch_loop.val_loop.batch_progress"), loops.get("epoch_loop.batch_progress")
        if saved is None or progress is None or batches is None:
            return
        within_batch = batches["total"]["completed"] < batches["total"]["processed"]
        self._epoch_is_over = within_batch and batches["is_last_batch"]
        done = int(saved["validated_step"] == checkpoint["global_step"] or not batches["total"]["processed"])
        progress["total"] = {"ready": 1, "started": 1, "processed": done, "completed": done}
        progress["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
        progress["is_last_batch"] = False
        self._loaded_step = checkpoint["global_step"]
        data = type(getattr(trainer, "datamodule", None)).__qualname__
        self._after_step = {
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
            "fit_loop": loops,
            "data": {data: checkpoint[data]} if data in checkpoint else {},
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = self._loaded.get("random", [])
        if len(states) == trainer.world_size:  # with another number of ranks there is no right one
            set_random_state(states[trainer.global_rank])
        self._torch = torch_state()
        if self._after_step is None:
            self._step_is_made(trainer)
        else:
            self._after_step["random"] = random_state()
        if len(states) == trainer.world_size and self._epoch_is_over:
            torch.empty((), dtype=torch.int64).random_()  # the loader of the next epoch has drawn its seed already
        trainer.callback_metrics.update(self._loaded.get("metrics", {}))
        for callback, deferred in zip(_savers(trainer), self._loaded.get("deferred", []), strict=False):
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

    @classmethod
    def take_over(cls, trainer: L.Trainer) -> None:
        """Puts such a loop in the place of the trainer's own."""
        loop = cls(trainer, min_epochs=trainer.fit_loop.min_epochs, max_epochs=trainer.fit_loop.max_epochs)
        loop.epoch_loop = trainer.fit_loop.epoch_loop
        trainer.fit_loop = loop

    @property
    def skip(self) -> bool:
        ended = super().skip and self.trainer.ckpt_path is not None and bool(self.max_batches)
        if ended:
            rank_zero_info(
                f"training had come to its end at step {self.trainer.global_step}: only what follows it is done again; "
                "raise trainer.max_steps to train on"
            )
        return super().skip and not ended


def random_state() -> dict[str, Any]:
    """Returns the state of the generators of Python, numpy and torch in this process, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - users' code may draw from it
    state = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *map(float, rest)),
    }
    return state | torch_state()


def torch_state() -> dict[str, Any]:
    """Returns the state of torch's generators in this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}
    return {"torch": torch.get_rng_state()}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators into a state that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# -- settings ----------------------------------------------------------------------------------------------------------

_REFUSED, _TOLD, _BY_CONTENT, _IGNORED = "refused", "told", "compared by content", "ignored"
# What happens when a setting has changed since the checkpoint; the longest name here that it begins with decides.
_SETTINGS = {
    _REFUSED: (  # they decide what is learned
        *("model", "data", "trainer.precision", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val"),
        *("trainer.gradient_clip_algorithm", "trainer.overfit_batches", "trainer.limit_train_batches"),
    ),
    _TOLD: (  # they say where a run is, how long, and what is kept
        *("trainer", "model.compile", "model.activation_checkpointing", "model.init_from", "model.loss_guard"),
        *("data.num_workers", "data.cache_dir", "data.check_resume"),
    ),
    _BY_CONTENT: (  # model and data compare them when the checkpoint is loaded
        *("model.transformer", "model.lora"),
        *("data.source", "data.tokenizer", "data.mask_token", "data.terminators"),
    ),
    _IGNORED: ("trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.profiler"),
}
_ROWS = ("data.batch_size", "trainer.accumulate_grad_batches")  # compared as the rows of a step


def check_changes(path: Path, text: str, trainer: L.Trainer, datamodule: Any) -> None:
    """Tells which settings have changed since a checkpoint was written; refuses those that make it another run.

    `text` has the run's resolved settings as YAML. With `data.check_resume=false` what would be refused is only told.
    An optimizer refuses the state of another.

    Raises:
        UserError: Names all of the settings, with both values, and the remedy.
    """
    try:
        checkpoint = read_state(path)
        saved, rows_then = dict(load_yaml(checkpoint["config"])), checkpoint["rows_per_step"]
    except (UnusableCheckpoint, KeyError, TypeError, ValueError, yaml.YAMLError):  # damage is told when it is loaded
        rank_zero_info(f"{path} does not hold the settings it was made with: they cannot be compared with the present")
        return
    now, rows_now = load_yaml(text), rows_per_step(trainer, datamodule)
    rows_known = rows_then is not None and rows_now is not None
    refused: list[tuple[str, str]] = []
    if rows_known:
        refused += _changes("rows of a step, over all devices", rows_then, rows_now)
    for section in ("model", "data", "trainer"):
        for name, change in _changes(section, saved.get(section), now.get(section)):
            rule = _rule(name)
            if rule == _BY_CONTENT and section == "data" and not isinstance(datamodule, PackedDataModule):
                rule = _REFUSED
            if rule == _TOLD:
                rank_zero_info(f"changed since the checkpoint: {change}")
            elif rule == _REFUSED and not (rows_known and name in _ROWS):
                refused.append((name, change))
    if refused and getattr(datamodule, "check_resume", True):
        raise UserError(
            f"changed since {path} was written: {', '.join(change for _, change in refused)}; set it back, start a new "
            "run with model.init_from, or go on all the same with --data.check_resume=false"
        )
    for name, change in refused:
        kept = " (the optimizer keeps what the checkpoint has)" if name.startswith("model.optimizer.") else ""
        rank_zero_info(f"changed since the checkpoint, which makes it another run: {change}{kept}")


def _rule(name: str) -> str:
    rules = {known: rule for rule, names in _SETTINGS.items() for known in names if f"{name}.".startswith(f"{known}.")}
    return rules[max(rules, key=len)]


def _changes(name: str, was: Any, now: Any) -> Iterator[tuple[str, str]]:
    """Compares two values of a setting; yields each difference by name and as text.

    Settings that only one version of the package knows are left out.
    """
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != now:
            yield name, f"{name}: {_short(was)} -> {_short(now)}"
    elif was.get("class_path") != now.get("class_path"):
        yield from _changes(name, was.get("class_path"), now.get("class_path"))
    else:
        for key in (key for key in was if key in now):
            yield from _changes(name if key == "init_args" else f"{name}.{key}", was[key], now[key])


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = value["class_path"]
    text = "null" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def rows_per_step(trainer: L.Trainer, datamodule: Any) -> int | None:
    """Returns how many rows an optimizer step is of, over all devices; None where the data has no `batch_size`."""
    batch_size = getattr(datamodule, "batch_size", None)
    if not isinstance(batch_size, int):
        return None
    groups = trainer.num_devices * trainer.num_nodes // getattr(trainer.strategy, "tensor_parallel_size", 1)
    return batch_size * groups * trainer.accumulate_grad_batches
