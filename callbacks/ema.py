"""An exponential moving average of the weights, used for everything but training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.training.strategies import owns_gradients, shards_parameters


class EmaWeights(WeightAveraging):
    """Averages the weights of past steps, and uses the average for everything but training.

    Lightning's WeightAveraging puts the average into the model for validation and after training; `averaged` does so
    for `SamplingCallback`, `RunSummary` and `ExportWeights`, whatever the order of the callbacks. A checkpoint holds
    both: its `state_dict` is the average, so that `validate`, `test`, `predict` and `generate` use it, and `--resume`
    goes on with the weights in training, bit for bit.

    Args:
        decay: Share of the average that stays at an update, at most.
        warmup: Begins with less, min(decay, (1 + n) / (10 + n)) at update n (TensorFlow's ExponentialMovingAverage), so
            that the average forgets the first weights however short the run.
        every_n_steps: Optimizer steps between updates.
        device: Device of the average; None for that of the weights.
    """

    def __init__(
        self, decay: float = 0.999, warmup: bool = True, every_n_steps: int = 1, device: str | None = None
    ) -> None:
        if not 0 <= decay < 1 or every_n_steps < 1:
            given = f"{decay} and {every_n_steps}"
            raise UserError(f"callback EmaWeights needs 0 <= decay < 1 and every_n_steps >= 1, got {given}")
        super().__init__(device=device, use_buffers=False, avg_fn=self._mix)
        self.decay, self.warmup, self.every_n_steps = decay, warmup, every_n_steps
        self.in_use = False  # the average is in the model, and the weights in training are where the average was

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.in_use = False
        if stage != "fit":
            return
        if shards_parameters(trainer.strategy) or owns_gradients(trainer.strategy):
            strategy = type(trainer.strategy).__name__
            raise UserError(
                f"callback EmaWeights needs the whole weights in every process, which {strategy} does not leave there: "
                "use configs/strategy/ddp.yaml, or leave out configs/ema.yaml"
            )
        pl_module.configure_model()
        parts = L.LightningModule()  # Lightning copies all of it: no sampler or optimizer, which may not be copied
        for name, part in pl_module.named_children():
            parts.add_module(name, part)
        parts.to(trainer.strategy.root_device)  # Lightning does so after `setup`; the average is made here
        super().setup(trainer, parts, stage)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None or (step_idx + 1) % self.every_n_steps:
            return False
        update = step_idx // self.every_n_steps
        # The share of the average that stays at this update.
        self._kept = min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
        return True

    def _mix(self, average: Tensor, weight: Tensor, updates: Tensor | int) -> Tensor:
        if not average.is_floating_point():  # integers of a quantised matrix, which stay
            return average
        return average.lerp(weight.to(average.dtype), 1 - self._kept)  # weights may have 16 bits

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not self.in_use:
            super().on_validation_epoch_start(trainer, pl_module)
            self.in_use = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.in_use:
            super().on_validation_epoch_end(trainer, pl_module)
            self.in_use = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the weights as they are for the last checkpoint."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.on_validation_epoch_end(trainer, pl_module)  # a validation is broken off
        if trainer.state.fn == "fit":
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


@contextmanager
def averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Puts the average of all steps up to now into the model for a while, where the run has one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    ema = next((callback for callback in callbacks if isinstance(callback, EmaWeights)), None)
    if ema is None or ema.in_use:
        yield
        return
    ema.on_train_batch_end(trainer, pl_module, None, None, 0)  # it may be another callback's turn first
    ema.on_validation_epoch_start(trainer, pl_module)
    try:
        yield
    finally:
        ema.on_validation_epoch_end(trainer, pl_module)
