"""Ctrl-C during training: finish the step, save, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from dllm_var.runs import save_last


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after its state had been saved; the message names the checkpoint."""


class StopOnInterrupt(Callback):
    """Turns the first Ctrl-C of a run into an orderly stop with a checkpoint; the second stops at once.

    The step under way is finished first, so that the saved weights, optimizer and counters belong together.

    Raises:
        Interrupted: When the checkpoint is written.
    """

    def __init__(self) -> None:
        self._asked = False
        self._last_step = 0
        self._previous: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self._asked = True
        print("\nstopping after this step (Ctrl-C again: at once)", flush=True)

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._last_step  # between accumulated batches there are gradients to lose
        self._last_step = trainer.global_step
        if stepped:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = self._asked
        if trainer.world_size > 1:  # the ranks must stop at the same step
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked:
            return
        path = save_last(trainer)
        raise Interrupted(f"stopped at step {trainer.global_step}, saved {path}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
