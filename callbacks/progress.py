"""The progress of a run: a bar on a terminal, plain lines where output goes to a file."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

from dllm_var.errors import UserError

REFRESHES = 5  # per second
VALIDATION = {
    "val/loss": "loss {:.3f}",
    "val/masked_accuracy": "masked accuracy {:.1%}",
    "val/terminator_recall": "terminator recall {:.1%}",
    "val/perplexity_bound": "perplexity bound {:.2f}",
}
TRAINING = {"train/loss": "{:.3f}", "train/masked_accuracy": "{:.1%}", "tokens/s": "{:,.0f}"}


class ProgressBar(RichProgressBar):
    """Shows what the module logs for the progress bar, and a line after each validation.

    With `trainer.max_steps` the bar spans the whole run, else an epoch. Where stdout is no terminal there is a line
    every `plain_every_n_steps` optimizer steps instead of a bar.
    """

    def __init__(self, plain_every_n_steps: int = 100) -> None:
        if plain_every_n_steps < 1:
            raise UserError(f"plain_every_n_steps of the progress bar is {plain_every_n_steps}: give at least 1")
        super().__init__(refresh_rate=REFRESHES)
        self.plain_every_n_steps = plain_every_n_steps
        self._began = self._shown = 0.0
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not (sys.stdout.isatty() or "ipykernel" in sys.modules):
            self.disable()

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        """Returns few and narrow columns, so that the figures have room on a terminal of 80."""
        return [TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn()]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began, self._step = time.perf_counter(), trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        spans_run, bar = trainer.max_steps > 0, self.train_progress_bar_id
        if not spans_run or bar is None:
            super().on_train_epoch_start(trainer, pl_module)
            bar = self.train_progress_bar_id
        if self.progress is not None and bar is not None:
            span: dict[str, Any] = {"total": trainer.max_steps, "completed": trainer.global_step} if spans_run else {}
            self.progress.update(bar, description=f"Epoch {trainer.current_epoch}", **span)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if self.is_enabled and time.perf_counter() - self._shown >= 1 / REFRESHES:
            self._shown = time.perf_counter()
            done = self._step - 1 if trainer.max_steps > 0 else batch_idx
            super().on_train_batch_end(trainer, pl_module, outputs, batch, done)
        elif trainer.is_global_zero and self.is_disabled and stepped and self._step % self.plain_every_n_steps == 0:
            step = f"step {self._step}" + (f"/{trainer.max_steps}" if trainer.max_steps > 0 else "")
            minutes, seconds = divmod(int(time.perf_counter() - self._began), 60)
            logged = self.get_metrics(trainer, pl_module).items()
            figures = [f"{value} {name}" if "/" in name else f"{name} {value}" for name, value in logged]
            print("  ".join([step, *figures, f"{minutes}:{seconds:02d}"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.global_step if trainer.max_steps > 0 else trainer.fit_loop.batch_idx + 1
        super().on_train_batch_end(trainer, pl_module, None, None, done - 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        shown = [form.format(float(metrics[name])) for name, form in VALIDATION.items() if name in metrics]
        if shown:
            print(f"step {trainer.global_step} validation: " + ", ".join(shown))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Returns what the module logged for the bar in training, as text: the known figures first."""
        logged = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
        known = {name: form.format(logged[name]) for name, form in TRAINING.items() if name in logged}
        others = {name: f"{logged[name]:.4g}" for name in logged if name not in TRAINING}
        figures = {name.removeprefix("train/"): value for name, value in {**known, **others}.items()}
        return {name.replace("_", " "): value for name, value in figures.items() if not name.startswith("val/")}
