"""Who trains in a training benchmark: our module under Lightning, and two baselines on transformers' Llama."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from dllm_var.benchmarking.training_base import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Contender
from dllm_var.benchmarking.training_baselines import PaddedTrainer, PlainLoop
from dllm_var.benchmarking.training_clock import StepClock
from dllm_var.benchmarking.training_data import packed_data
from dllm_var.benchmarking.training_settings import COMPILED, FULL, OURS, PADDED, PLAIN_LOOP, TrainingCase
from dllm_var.model.config import TransformerConfig
from dllm_var.module import DiffusionLM
from dllm_var.objectives import EosSchedule
from dllm_var.training.checkpointing import Trainer
from dllm_var.training.optim import AdamW, Schedule


class Quiet(Logger):
    """Takes what is logged and keeps nothing, so that logging costs what it costs in a run."""

    name, version = "quiet", 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class LightningMarks(L.Callback):
    """Marks the clock at the seams of Lightning's training step."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.clock.mark("data")

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.clock.mark("head_and_loss")

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.clock.mark("backward")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.mark("optimizer")
        segments = batch["segment_ids"]
        tokens = int((segments >= 0).sum())
        pairs = sum(row[row >= 0].bincount().square().sum() for row in segments)
        if module.attention == "full":
            pairs = segments.size(1) * tokens
        self.clock.count(tokens, segments.numel(), int(module.last_step_stats["loss_tokens"]), int(pairs))
        self.clock.end_step()


class Ours(Contender):
    """DiffusionLM under the Lightning Trainer, as `fit` builds them; by default each sample sees itself only.

    Args:
        case: What to train.
        device: Where.
        cache: Folder for tokenized data.
        compile: As `model.compile`.
        attention: As `model.attention`.
    """

    def __init__(
        self,
        case: TrainingCase,
        device: torch.device,
        cache: Path,
        compile: bool = False,
        attention: Literal["full", "document"] = "document",
    ) -> None:
        super().__init__(case, device, cache)
        self.module = DiffusionLM(
            TransformerConfig(**case.transformer, vocab_size=case.vocab_size),
            EosSchedule(),
            attention,
            lambda groups: AdamW(groups, LEARNING_RATE, BETAS, WEIGHT_DECAY),
            Schedule("constant", 0),
            compile=compile,
        )
        self._watched = False

    @property
    def model(self) -> nn.Module:
        if self.module.transformer is None:
            self.module.use_tokenizer(packed_data(self.case, self.cache).tokenizer)
            self.module.configure_model()
        assert self.module.transformer is not None
        return self.module.transformer

    def train(self, steps: int) -> None:
        if not self._watched:
            watch(self.model, "hidden_states", lambda: self.clock.mark("forward"))
            self._watched = True
        trainer = Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if self.mixed else "32-true",
            max_steps=steps,
            gradient_clip_val=CLIP,
            callbacks=[LightningMarks(self.clock)],
            logger=Quiet(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        with warnings.catch_warnings():  # Lightning's, about runs this short
            warnings.simplefilter("ignore")
            trainer.fit(self.module, packed_data(self.case, self.cache))
        self.module.trainer = None  # and with it the optimizer
        self.module.zero_grad()


def watch(module: nn.Module, method: str, after: Callable[[], None]) -> None:
    """Has `after` called whenever a method of this module has returned."""
    function = getattr(module, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        after()
        return result

    setattr(module, method, watched)


def build(name: str, case: TrainingCase, device: torch.device, cache: Path) -> Contender:
    """Returns a contender by its name in the config."""
    if name in (OURS, COMPILED, FULL):
        attention: Literal["full", "document"] = "full" if name == FULL else "document"
        return Ours(case, device, cache, compile=name != OURS, attention=attention)
    return {PLAIN_LOOP: PlainLoop, PADDED: PaddedTrainer}[name](case, device, cache)
