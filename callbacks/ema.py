"""An exponential moving average of the weights, used wherever the model is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dllm_var.errors import UserError
from dllm_var.training.strategies import is_sharded, owns_gradients


class EmaWeights(WeightAveraging):
    """Averages the weights of past steps, and uses the average for everything but training.

    Lightning's WeightAveraging, which uses it in validation and after training; here `SamplingCallback`, `RunSummary`
    and `ExportWeights` get it too, whatever the order of the callbacks. A checkpoint holds both: its `state_dict` is
    the average, so that `validate`, `test`, `predict` and `generate` use it, and `--resume` goes on with the weights
    in training, bit for bit.

    Args:
        decay: Share of the average that stays at an update, at most.
        warmup: Begins with less, min(decay, (1 + n) / (10 + n)) at update n (TensorFlow's ExponentialMovingAverage), so
            that the average forgets the first weights however short the run.
        every_n_steps: Optimizer steps between updates.
        device: Device of the average; None for that of the weights.

    Raises:
        UserError: For numbers that make no sense; at the start of training when no process has the whole weights.
    """

    def __init__(
        self, decay: float = 0.999, warmup: bool = True, every_n_steps: int = 1, device: str | None = None
    ) -> None:
        if not 0 <= decay < 1 or every_n_steps < 1:
            raise UserError(
                f"callback EmaWeights needs 0 <= decay < 1 and every_n_steps >= 1, got {decay} and {every_n_steps}"
            )
        super().__init__(device=device)
        self.decay, self.warmup, self.every_n_steps = decay, warmup, every_n_steps
        self._in_training: list[Tensor] | None = None  # kept here while the average is in the model

    def decay_at(self, update: int) -> float:
        """Returns the share of the average that stays at an update; none of it at the first, number 0."""
        decay = min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
        return decay if update else 0.0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if is_sharded(trainer.strategy) or owns_gradients(trainer.strategy):
            strategy = type(trainer.strategy).__name__
            raise UserError(
                f"callback EmaWeights needs the whole weights in every process, which {strategy} does not leave there: "
                "use configs/strategy/ddp.yaml, or leave out configs/ema.yaml"
            )
        pl_module.configure_model()
        device = self._device or trainer.strategy.root_device  # the model itself is moved there later
        parts = nn.ModuleDict(dict(pl_module.named_children()))  # its copy copies no sampler, optimizer or trainer
        self._average_model = Average(parts, device, self.decay_at)

    @contextmanager
    def in_use(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
        """Puts the average, of all steps up to now, into the model for a while."""
        already = self._average_model is None or self._in_training is not None
        if not already:
            self.on_train_batch_end(trainer, pl_module, None, None, 0)  # it may be another callback's turn first
            self._take_average(pl_module)
        try:
            yield
        finally:
            if not already:
                self._give_back(pl_module)

    def _take_average(self, pl_module: L.LightningModule) -> None:
        if self._average_model is not None and self._in_training is None:
            self._in_training = [value.detach().clone() for value in _values(pl_module)]
            self._copy_average_to_current(pl_module)

    def _give_back(self, pl_module: L.LightningModule) -> None:
        if self._in_training is not None:
            for value, kept in zip(_values(pl_module), self._in_training, strict=True):
                value.data.copy_(kept)
            self._in_training = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_average(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._give_back(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the weights for the last checkpoint; `on_fit_end` exchanges them."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._average_model is not None
        self._copy_average_to_current(pl_module)
        self._average_model = None  # what follows, such as trainer.test, is about the weights that are in the model

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._give_back(pl_module)  # saved in the midst of a validation that is not going to end
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class Average(AveragedModel):
    """The average of a module's parameters, updated without waiting for the device.

    torch's AveragedModel counts updates on the device, and asks it for the count at each one.

    Args:
        model: Whose parameters; copied.
        device: Where the average is kept.
        decay_at: Returns the share of the average that stays at update 0, 1, ...
    """

    def __init__(self, model: nn.Module, device: Any, decay_at: Callable[[int], float]) -> None:
        super().__init__(model, device)
        self.n_averaged = torch.zeros_like(self.n_averaged, device="cpu")
        self.decay_at = decay_at

    def update_parameters(self, model: nn.Module) -> None:
        """Moves the average towards a module's present parameters."""
        average = list(self.module.parameters())
        current = [new.detach().to(old.device, old.dtype) for old, new in zip(average, model.parameters(), strict=True)]
        update = get_ema_multi_avg_fn(self.decay_at(int(self.n_averaged)))
        update(average, current, self.n_averaged)
        self.n_averaged += 1


def _values(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


@contextmanager
def averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Puts averaged weights into the model for a while where the run keeps them."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EmaWeights):
            with callback.in_use(trainer, pl_module):
                yield
            return
    yield
