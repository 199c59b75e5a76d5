"""A model, data and samplers small enough to train a few steps in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from dllm_var import DiffusionLM
from dllm_var.datamodules.cmudict import CmudictSource
from dllm_var.model.config import TransformerConfig
from dllm_var.sampling import BlockDiffusionSampler, Generation
from dllm_var.sampling.base import Sampler
from dllm_var.text.tokenizer import Tokenizer

ROWS, LENGTH = 24, 16


@dataclass(frozen=True)
class Example:
    prompt: str
    prompt_ids: list[int]
    references: list[list[int]]


class ToyData(L.LightningDataModule):
    """Rows of random letters and phones; held-out examples spell each letter of a word as K."""

    def __init__(self, splits: tuple[str, ...] = ("validation", "test"), words: int = 12) -> None:
        super().__init__()
        self.tokenizer = Tokenizer.from_pretrained(CmudictSource().default_tokenizer)
        self.splits, self.words = splits, words

    def held_out(self, split: str, n: int | None = None) -> list[Example]:
        if split not in self.splits:
            return []
        words = [chr(97 + i % 26) * (1 + i % 3) for i in range(self.words)]
        phone = self.tokenizer.encode("K")[0]
        return [Example(w, self.tokenizer.encode(w), [[phone] * len(w)]) for w in words][:n]

    def _loader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.tokenizer.vocab_size, (ROWS, LENGTH), generator=generator)
        supervised = torch.arange(LENGTH).expand(ROWS, LENGTH) >= LENGTH // 2
        ids[:, -1] = self.tokenizer.terminator_id
        ids[ids == self.tokenizer.mask_id] = self.tokenizer.pad_id
        rows = [
            {
                "input_ids": ids[i],
                "supervised": supervised[i],
                "segment_ids": torch.zeros(LENGTH, dtype=torch.long),
                "position_ids": torch.arange(LENGTH),
                "row": torch.tensor(i),
            }
            for i in range(ROWS)
        ]
        return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader:
        return self._loader()

    def val_dataloader(self) -> DataLoader:
        return self._loader()


class SpySampler(Sampler):
    """Answers every prompt with K for each letter but one, and notes how it was called."""

    def __init__(self, fail: bool = False, disturb: Callable[[Any], None] | None = None) -> None:
        self.fail, self.disturb = fail, disturb
        self.steps: list[int] = []
        self.modes: list[bool] = []
        self.gradients: list[bool] = []

    def decode(self, model: Any, prompts: list, request: Any) -> list[Generation]:
        raise AssertionError("generate is overridden")

    def generate(
        self, model: Any, prompts: Any, *, tokenizer: Any = None, max_new_tokens: Any = None, **_: Any
    ) -> list:
        if self.disturb is not None:
            self.disturb(model)
        if self.fail and max_new_tokens is None:
            raise RuntimeError("the sampler is broken")
        if max_new_tokens is None:  # not the trial before training
            self.steps.append(model.trainer.global_step)
            self.modes.append(model.transformer.training)
            self.gradients.append(torch.is_grad_enabled())
        phone = tokenizer.encode("K")[0]
        return [Generation([phone] * (len(p) - 1), "eos", nfe=2, seconds=0.1, prompt_length=len(p)) for p in prompts]


@pytest.fixture
def data() -> ToyData:
    return ToyData()


@pytest.fixture
def spy() -> SpySampler:
    return SpySampler()


@pytest.fixture
def real_sampler() -> BlockDiffusionSampler:
    return BlockDiffusionSampler(block_length=4, max_new_tokens=8)


def toy_model() -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(TransformerConfig(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32))


@pytest.fixture
def fit(tmp_path: Path, data: ToyData) -> Callable[..., tuple[L.Trainer, DiffusionLM]]:
    """Trains the toy model for a few steps with the given callbacks and Trainer settings."""

    def run(*callbacks: L.Callback, data: ToyData = data, ckpt_path: str | None = None, **settings: Any) -> Any:
        settings = {
            "max_steps": 6,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "log_every_n_steps": 2,
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            **settings,
        }
        trainer, model = L.Trainer(callbacks=list(callbacks), **settings), toy_model()
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return trainer, model

    return run
