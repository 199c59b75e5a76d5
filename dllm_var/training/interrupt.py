"""The end of a run: signals, a checkpoint of the last finished step, an exit status."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from dllm_var.checkpoints.archive import CannotSave
from dllm_var.checkpoints.run_checkpoint import newest_checkpoint
from dllm_var.training.ranks import is_launched_child
from dllm_var.training.resume import data_state
from dllm_var.training.step import TooManySkipped

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_URGENCY = (0, *SIGNALS)  # the later, the more urgent; 0 for no signal


class Interrupted(Exception):
    """Training was stopped by signal `number`; the message says what was saved."""

    def __init__(self, message: str, number: int, requeued: bool = False) -> None:
        super().__init__(message)
        self.status, self.requeued = 128 + number, requeued


class StopOnSignal(Callback):
    """Turns signals into an orderly stop with a checkpoint, and raises Interrupted then; for our own `Trainer`.

    The step under way is finished first, on all ranks, whichever of them got the signal. SIGUSR1 saves and goes on; in
    a SLURM job, where it announces the end of the allotted time, it requeues the job and stops. When another callback
    or the data fail between two steps, or too many updates were skipped, the last step is saved as well.
    """

    def __init__(self) -> None:
        self._training_over = False
        self._asked, self._last_step = 0, 0  # a signal, a step
        self._folder: Path | None = None
        self._between_steps: Any = None  # the data's state while weights and counters belong together

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.keeps_checkpoints:
            self._folder = trainer.checkpoint_folder()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step, self._training_over = trainer.global_step, False
        self._listen()

    def _listen(self) -> None:
        """Takes the signals over; Lightning gives them back when the run has ended, however it ends."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == number:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._asked = max(self._asked, number, key=_URGENCY.index)
        if self._training_over:
            self._end_now()
        elif not is_launched_child():
            does = "saving" if _only_saves(number) else "stopping"
            again = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            with contextlib.suppress(RuntimeError):  # in the midst of another print
                print(f"\n{signal.Signals(number).name}: {does} after this step{again}", flush=True)

    def training_is_over(self) -> None:
        """Cuts short what follows training when a signal asks or has asked for it; the last step must be saved."""
        self._training_over = True
        self._end_now()

    def _end_now(self) -> None:
        number = self._asked
        if number and not _only_saves(number) and not is_launched_child():  # the first process ends the others
            after = "after the last step, which is saved: what follows was cut short"
            raise Interrupted(f"{signal.Signals(number).name} {after}", number)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._between_steps = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self._last_step:  # between accumulated batches there are gradients to lose
            return
        self._last_step = trainer.global_step
        if trainer.world_size == 1:
            self._between_steps = data_state(trainer)
        self._obey(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._obey(trainer, pl_module)

    def _obey(self, trainer: Any, pl_module: L.LightningModule) -> None:
        asked = self._asked
        if trainer.world_size > 1:  # the ranks must act at the same step, on the same signal
            urgency = torch.tensor(_URGENCY.index(asked), device=pl_module.device)
            asked = _URGENCY[int(trainer.strategy.reduce(urgency, reduce_op="max"))]
        if not asked or (trainer.validating and _only_saves(asked)):  # in validation the weights may be averages
            return
        self._asked = 0
        if trainer.global_step == 0:  # a sanity check, or validation among the first step's accumulated batches
            raise Interrupted("stopped before the first step", asked)
        path, step = trainer.save_last(), trainer.global_step
        if _only_saves(asked):
            if trainer.is_global_zero:
                print(f"saved {path} at step {step}", flush=True)
            return
        requeued = asked == signal.SIGUSR1 and trainer.is_global_zero and requeue()
        raise Interrupted(f"stopped at step {step}, saved {path}", asked, requeued)

    def on_exception(self, trainer: Any, pl_module: L.LightningModule, exception: BaseException) -> None:
        between_steps = self._between_steps is not None and data_state(trainer) == self._between_steps
        unforeseen = isinstance(exception, Exception) and not isinstance(exception, Interrupted | CannotSave)
        if trainer.keeps_checkpoints and unforeseen and (between_steps or isinstance(exception, TooManySkipped)):
            with contextlib.suppress(CannotSave):
                trainer.save_last()
        if trainer.is_global_zero and trainer.state.fn == "fit" and hasattr(exception, "add_note"):
            kept = None if self._folder is None else newest_checkpoint(self._folder)
            found = f"the newest checkpoint is {kept}: go on with --resume"
            exception.add_note(found if kept else "there is no checkpoint of this run")


class SaveAtEnd(Callback):
    """Saves the last step of a run as last.ckpt when no checkpoint of that step exists; for our own `Trainer`.

    This must come before other callbacks: what they do when training ends may take minutes, or change the weights.
    """

    def __init__(self, stop: StopOnSignal) -> None:
        self.stop = stop
        self._saved_step = -1

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if trainer.keeps_checkpoints and self._saved_step != trainer.global_step:
            trainer.save_last()
        trainer.finish_saving()
        self.stop.training_is_over()


def _only_saves(number: int) -> bool:
    return number == signal.SIGUSR1 and "SLURM_JOB_ID" not in os.environ


def requeue() -> bool:
    """Asks SLURM to run this job again; says so when it cannot."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot requeue job {job}: {getattr(error, 'stderr', '').strip() or error}", flush=True)
        return False
    return True
