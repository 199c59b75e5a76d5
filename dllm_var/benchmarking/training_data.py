"""Samples for a training benchmark: random tokens in lengths like those of instruction data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_var.benchmarking.training_settings import TrainingCase
from dllm_var.datamodules import CmudictSource, Source
from dllm_var.datamodules.packed import PackedDataModule
from dllm_var.objectives import KeyedNoise, Objective
from dllm_var.text.tokenizer import Tokenizer

SPREAD = 0.7  # standard deviation of the logarithm of a length
ENOUGH = 4  # times as many tokens as one round trains on


class RandomSamples(Source):
    """Prompts and answers of random tokens; both lengths are log-normal, and a sample fits a row.

    Args:
        samples: How many.
        prompt_tokens: Median length of the prompts.
        answer_tokens: Median length of the answers.
        longest: What prompt, answer and terminator may have together.
        seed: Decides lengths and tokens.
    """

    default_tokenizer = CmudictSource.default_tokenizer

    def __init__(self, samples: int, prompt_tokens: int, answer_tokens: int, longest: int, seed: int = 0) -> None:
        self.settings = (samples, prompt_tokens, answer_tokens, longest, seed)

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        samples, prompt_tokens, answer_tokens, longest, seed = self.settings
        assert self.default_tokenizer is not None
        tokenizer = Tokenizer.from_pretrained(self.default_tokenizer)
        special = {tokenizer.mask_id, tokenizer.pad_id, *tokenizer.terminator_ids}
        words = np.array([token for token in range(tokenizer.vocab_size) if token not in special])
        generator = np.random.default_rng(seed)
        for _ in range(samples):
            lengths = np.array([prompt_tokens, answer_tokens]) * np.exp(SPREAD * generator.standard_normal(2))
            lengths = np.maximum(lengths * min(1.0, (longest - 1) / lengths.sum()), 1).astype(int)
            ids = generator.choice(words, lengths.sum())
            yield {"input_ids": ids.tolist(), "prompt_length": int(lengths[0])}

    def fingerprint(self) -> str:
        return f"random samples {self.settings}"


def packed_data(case: TrainingCase, cache: Path) -> PackedDataModule:
    """Returns the data module of a case, at its first row: as in the paper samples are strung together and cut.

    Args:
        case: Says how long samples and rows are.
        cache: Folder for tokenized data.
    """
    tokens = ENOUGH * (case.steps + 1) * case.batch_size * case.context_length
    samples = max(64, tokens // (case.prompt_tokens + case.answer_tokens))
    source = RandomSamples(samples, case.prompt_tokens, case.answer_tokens, case.context_length)
    return PackedDataModule(source, None, case.batch_size, case.context_length, "concat", cache_dir=str(cache))


class SamplesByThemselves(torch.utils.data.Dataset):
    """The samples of a data module, one by one, and the collator that pads and masks a batch of them.

    Args:
        data: Has the samples.
        objective: Masks them.
        noise: With which random numbers.
    """

    def __init__(self, data: PackedDataModule, objective: Objective, noise: KeyedNoise) -> None:
        self.table, self.pad_id = data.table("train"), data.tokenizer.pad_id
        self.objective, self.noise = objective, noise

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        span = slice(int(self.table.offsets[index]), int(self.table.offsets[index + 1]))
        return {"row": index, "input_ids": self.table.tokens[span], "supervised": self.table.supervised[span]}

    @property
    def mean_length(self) -> float:
        """Tokens of a sample, on average."""
        return len(self.table.tokens) / len(self.table)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels` (-100 where nothing is asked), padded to the longest."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        tokens = np.full((len(samples), longest), self.pad_id, dtype=np.int64)
        supervised = np.zeros_like(tokens, dtype=np.bool_)
        present = np.zeros_like(tokens)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            tokens[row, :length], supervised[row, :length] = sample["input_ids"], sample["supervised"]
            present[row, :length] = 1
        batch = {
            "input_ids": torch.from_numpy(tokens),
            "supervised": torch.from_numpy(supervised),
            "segment_ids": torch.from_numpy(present - 1),
            "position_ids": torch.arange(longest).expand(len(samples), -1),
            "row": torch.tensor([sample["row"] for sample in samples]),
        }
        noised = self.objective.corrupt(batch, self.noise)
        return {
            "input_ids": noised.input_ids,
            "attention_mask": torch.from_numpy(present),
            "labels": noised.targets.masked_fill(~noised.loss_mask, -100),
        }
