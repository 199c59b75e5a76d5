"""What the tests on a GPU share: the device, and a short fit on it.

`GPU_TESTS_DEVICE=cpu` runs what a CPU can do of them, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from dllm_var import DiffusionLM
from dllm_var.datamodules import PackedDataModule
from dllm_var.model import TransformerConfig
from dllm_var.training.optim import AdamW, Schedule
from dllm_var.training.trainer import Trainer

SHAPE = dict(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
CONTEXT = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    device = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.fail("the gpu tests need a CUDA device, and torch finds none", pytrace=False)
    return device


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """For what cannot be seen on a CPU: memory, and waits."""
    if device.type != "cuda":
        pytest.skip("can be seen on a CUDA device only")
    return device


class Losses(L.Callback):
    """The loss of every step, or the one that was logged last."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(pl_module.step.last.loss)


@pytest.fixture
def fit(device: torch.device, tmp_path: Path) -> Callable[..., tuple[Trainer, DiffusionLM, list[float]]]:
    """Trains a small model for a few steps; returns trainer, module and the losses of the steps."""

    def run(
        model: dict[str, Any] | None = None,
        ckpt_path: str | None = None,
        callbacks: tuple[L.Callback, ...] = (),
        on: torch.device = device,
        **settings: Any,
    ) -> tuple[Trainer, DiffusionLM, list[float]]:
        L.seed_everything(0, verbose=False)
        defaults: dict[str, Any] = dict(
            transformer=TransformerConfig(**SHAPE),
            optimizer=lambda groups: AdamW(groups, lr=3e-3),
            schedule=Schedule("constant", 0),
        )
        module = DiffusionLM(**{**defaults, **(model or {})})
        losses = Losses()
        trainer = Trainer(
            **{
                "accelerator": "gpu" if on.type == "cuda" else "cpu",
                "devices": 1,
                "max_steps": 8,
                "log_every_n_steps": 1,  # the losses are read then
                "limit_val_batches": 0,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": tmp_path,
                "callbacks": [losses, *callbacks],
                **settings,
            }
        )
        data = PackedDataModule(batch_size=8, context_length=CONTEXT, packing="best_fit", canvas=12)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer, module, losses.losses

    return run
