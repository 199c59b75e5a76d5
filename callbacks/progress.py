"""One line that moves on a terminal, plain lines where output goes to a file."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from dllm_var.callbacks.decoding import say
from dllm_var.errors import UserError

VALIDATION = {
    "val/loss": "loss {:.3f}",
    "val/masked_accuracy": "masked accuracy {:.1%}",
    "val/terminator_recall": "terminator recall {:.1%}",
    "val/perplexity_bound": "perplexity bound {:.2f}",
}
TRAINING = {
    "train/loss": "loss {:.3f}",
    "train/masked_accuracy": "masked accuracy {:.1%}",
    "tokens/s": "{:,.0f} tokens/s",
}


class ProgressBar(TQDMProgressBar):
    """Shows what the module logs for the progress bar, and a line after each validation.

    With `trainer.max_steps` the bar spans the whole run, else an epoch. Where stdout is no terminal there is a line
    every `plain_every_n_steps` optimizer steps instead of a bar.

    Args:
        refresh_seconds: Least time between two refreshes of the bar.
        plain_every_n_steps: Optimizer steps between two plain lines.

    Raises:
        UserError: `plain_every_n_steps` is below one.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def __init__(self, refresh_seconds: float = 0.2, plain_every_n_steps: int = 100) -> None:
        if plain_every_n_steps < 1:
            raise UserError(f"plain_every_n_steps of the progress bar is {plain_every_n_steps}: give at least 1")
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.plain_every_n_steps = plain_every_n_steps
        self._plain = False
        self._shown = 0.0
        self._began = 0.0
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._plain = not (sys.stdout.isatty() or "ipykernel" in sys.modules)
        if self._plain:
            self.disable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began, self._step = time.perf_counter(), trainer.global_step
        self.train_progress_bar.initial = trainer.global_step  # a resumed run's rate is that of its new steps

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.max_steps <= 0:
            super().on_train_epoch_start(trainer, pl_module)
            return
        self.train_progress_bar.total = trainer.max_steps
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if self._plain:
            if stepped and self._step % self.plain_every_n_steps == 0:
                say(trainer, self._plain_line(trainer))
            return
        self.train_progress_bar.n = self._step if trainer.max_steps > 0 else batch_idx + 1
        now = time.perf_counter()
        if now - self._shown >= self.refresh_seconds:
            self._shown = now
            self._refresh(trainer)

    def _refresh(self, trainer: L.Trainer) -> None:
        if self.is_enabled:
            self.train_progress_bar.set_postfix_str(", ".join(figures(trainer)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._refresh(trainer)

    def _plain_line(self, trainer: L.Trainer) -> str:
        steps = f"step {self._step}" + (f"/{trainer.max_steps}" if trainer.max_steps > 0 else "")
        minutes, seconds = divmod(int(time.perf_counter() - self._began), 60)
        return "  ".join([steps, *figures(trainer), f"{minutes}:{seconds:02d}"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_enabled:
            self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        shown = [form.format(float(metrics[name])) for name, form in VALIDATION.items() if name in metrics]
        if shown:
            say(trainer, f"step {trainer.global_step} validation: " + ", ".join(shown))


def figures(trainer: L.Trainer) -> list[str]:
    """What the module logged for the progress bar in training, formatted: the known ones first and in their own way."""
    metrics = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    known = [form.format(metrics[name]) for name, form in TRAINING.items() if name in metrics]
    others = [name for name in metrics if name not in TRAINING and not name.startswith("val/")]
    return known + [f"{name.removeprefix('train/')} {metrics[name]:.4g}" for name in others]
