"""What Lightning leaves out of a checkpoint and a resumed run needs to go on bit for bit."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.utilities import rank_zero_info

_VALIDATION, _BATCHES = "epoch_loop.val_loop.batch_progress", "epoch_loop.batch_progress"


class ExactResume(Callback):
    """Adds to checkpoints what Lightning leaves out, so that a run that is killed and resumed goes on bit for bit.

    - The random generators of all ranks. The package's own rows and noise need none; samplers that draw, dropout and
      users' code do.
    - The latest figures, which `ModelCheckpoint` and others may watch before the next step logs them again.
    - Whether the last step was validated. Validation that was due when the checkpoint was written, or under way, runs
      from its beginning: Lightning would leave it out, or measure only what remains of it.

    A checkpoint is always that of a finished optimizer step, whoever saves it and when. Gradients are not saved: of
    batches that were being accumulated it says that they are not trained yet, and the resumed run trains them again.
    """

    def __init__(self) -> None:
        self._validated_step = self._loaded_step = -1
        self._step = -1  # the last one that is finished
        self._in_step = False  # a batch has begun that the next one needs
        self._after_step: dict[str, Any] = {}  # what such batches change before their step is made: counters, data
        self._random: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}
        self._epoch_is_over = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._loaded, self._after_step, self._random = {}, {}, {}
        self._loaded_step, self._step, self._in_step, self._epoch_is_over = -1, -1, False, False

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._in_step = True
        if trainer.global_step == self._loaded_step:
            _count_as_saved(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step != self._step:
            self._note(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            if not self._in_step:  # it has drawn random numbers
                self._note(trainer)

    def _note(self, trainer: L.Trainer) -> None:
        self._step, self._in_step = trainer.global_step, False
        self._random = random_state()
        datamodule: Any = getattr(trainer, "datamodule", None)
        data = {} if datamodule is None else {type(datamodule).__qualname__: deepcopy(datamodule.state_dict())}
        self._after_step = {"epoch": trainer.current_epoch, "fit_loop": trainer.fit_loop.state_dict(), "data": data}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds this callback's state; every rank must call it."""
        noted = self._step == trainer.global_step  # not yet, where a callback saves whose turn is before
        mine = self._random if noted else random_state()
        states: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, mine)
        metrics = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
        own = {"validated_step": self._validated_step, "random": states, "metrics": metrics}
        checkpoint["callbacks"][self.state_key] = own
        if noted and self._in_step:
            checkpoint["epoch"] = self._after_step["epoch"]
            checkpoint["loops"]["fit_loop"] = self._after_step["fit_loop"]
            checkpoint.update(self._after_step["data"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated_step, self._loaded = state_dict["validated_step"], state_dict

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets the counters of validation from which Lightning concludes what to do; runs before it reads them."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        progress, batches = loops.get(_VALIDATION), loops.get(_BATCHES)
        if saved is None or progress is None or batches is None:
            return
        in_step = batches["total"]["completed"] < batches["total"]["processed"]
        self._epoch_is_over = in_step and batches["is_last_batch"]
        done = int(saved["validated_step"] == checkpoint["global_step"] or not batches["total"]["processed"])
        progress["total"] = {"ready": 1, "started": 1, "processed": done, "completed": done}
        progress["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
        progress["is_last_batch"] = False
        data = type(getattr(trainer, "datamodule", None)).__qualname__
        data_state = {data: checkpoint[data]} if data in checkpoint else {}
        self._after_step = {"epoch": checkpoint["epoch"], "fit_loop": loops, "data": data_state}
        self._loaded_step = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        states, self._random = self._loaded.get("random", []), random_state()
        if len(states) == trainer.world_size:  # with another number of ranks there is no right one
            self._random = states[trainer.global_rank]
            set_random_state(self._random)
            if self._epoch_is_over:  # the loader of the next epoch, which draws a seed, has been made already
                torch.empty((), dtype=torch.int64).random_()
        trainer.callback_metrics.update(self._loaded.get("metrics", {}))
        self._loaded = {}
        if not self._after_step:
            self._note(trainer)


def _count_as_saved(trainer: L.Trainer) -> None:
    """Tells what saves every so many steps that the present step, which the run goes on from, has had its turn."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not callback.every_n_epochs:  # others save after validation
            callback._last_global_step_saved = trainer.global_step  # of all its state, Lightning leaves out this


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
        if not super().skip:
            return False
        ended = self.trainer.ckpt_path is not None and bool(self.max_batches)
        if ended:
            rank_zero_info(
                f"training had come to its end at step {self.trainer.global_step}: only what follows it is done again; "
                "raise trainer.max_steps to train on"
            )
        return not ended


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
