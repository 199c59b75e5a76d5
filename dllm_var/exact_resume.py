"""What Lightning leaves out of a checkpoint and a resumed run needs to go on bit for bit."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.utilities import rank_zero_info

_VALIDATION, _BATCHES = "epoch_loop.val_loop.batch_progress", "epoch_loop.batch_progress"


class ExactResume(Callback):
    """Keeps the state of all random generators of all ranks, and whether the last step was validated.

    The package's own rows and noise need no generator's state; samplers that draw, dropout and users' code do.
    Validation that was due when the checkpoint was written, or under way, runs from its beginning: Lightning would
    leave it out, or measure only what remains of it.
    """

    def __init__(self) -> None:
        self._validated_step = -1
        self._after_step: dict[str, Any] | None = None  # the loaders of a validation that is not over draw as well
        self._states: list[dict[str, Any]] = []
        self._epoch_is_over = False

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._after_step = None

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._after_step = random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_step, self._after_step = trainer.global_step, None

    def state_dict(self) -> dict[str, Any]:
        mine = self._after_step or random_state()
        states: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, mine)
        return {"validated_step": self._validated_step, "random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated_step, self._states = state_dict["validated_step"], state_dict["random"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets the counters of validation from which Lightning concludes what to do; runs before it reads them."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        progress, batches = loops.get(_VALIDATION), loops.get(_BATCHES)
        if saved is None or progress is None or batches is None:
            return
        in_step = batches["total"]["completed"] < batches["total"]["processed"]
        self._epoch_is_over = in_step and batches["is_last_batch"]
        done = int(saved["validated_step"] == checkpoint["global_step"])
        progress["total"] = {"ready": 1, "started": 1, "processed": done, "completed": done}
        progress["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
        progress["is_last_batch"] = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self._states) == trainer.world_size:  # with another number of ranks there is no right one
            set_random_state(self._states[trainer.global_rank])
            if self._epoch_is_over:  # the loader of the next epoch, which draws a seed, has been made already
                torch.empty((), dtype=torch.int64).random_()
        self._states = []


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
