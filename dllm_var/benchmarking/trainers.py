"""Contenders of a training benchmark: our module under Lightning, and a plain loop around transformers' Llama.

All train a model of the same shape on the same samples of random tokens, with the same masks, optimizer and clipping.
"""

from __future__ import annotations

import gc
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from dllm_var.benchmarking.instruments import StepClock
from dllm_var.benchmarking.settings import FULL, OURS, PLAIN_LOOP, TrainingCase
from dllm_var.checkpoints.families import LLAMA, write_config
from dllm_var.datamodules import CmudictSource, PackedDataModule, Source
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.module import DiffusionLM
from dllm_var.objectives import EosSchedule, KeyedNoise
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.training.optim import AdamW, Schedule, parameter_groups
from dllm_var.training.trainer import Trainer

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0  # of every contender
SPREAD = 0.7  # standard deviation of the logarithm of a sample's lengths
ENOUGH = 4  # times as many tokens in the data as one round trains on


class RandomSamples(Source):
    """Prompts and answers of random tokens with log-normal lengths, like those of instruction data.

    Args:
        samples: How many.
        prompt_tokens: Median length of the prompts.
        answer_tokens: Median length of the answers.
        longest: Longest sample: prompt, answer and terminator together.
        seed: Decides lengths and tokens.
    """

    default_tokenizer: str = CmudictSource.default_tokenizer or ""

    def __init__(self, samples: int, prompt_tokens: int, answer_tokens: int, longest: int, seed: int = 0) -> None:
        self.settings = (samples, prompt_tokens, answer_tokens, longest, seed)

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        samples, prompt_tokens, answer_tokens, longest, seed = self.settings
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


class Contender(ABC):
    """Trains a case's model; it is kept over the rounds, its optimizer state is not."""

    model: nn.Module

    def __init__(self, case: TrainingCase, device: torch.device, cache: Path) -> None:
        self.case, self.device, self.cache = case, device, cache
        self.shape = TransformerConfig(**case.transformer, vocab_size=case.vocab_size)
        self.clock = StepClock(device)
        self.mixed = device.type == "cuda"  # bf16-mixed there, float32 on the CPU

    def data(self) -> PackedDataModule:
        """Returns the data, at its first row; the samples are strung together and cut, as in the paper."""
        case = self.case
        tokens = ENOUGH * (case.steps + 1) * case.batch_size * case.context_length
        samples = max(64, tokens // (case.prompt_tokens + case.answer_tokens))
        source = RandomSamples(samples, case.prompt_tokens, case.answer_tokens, case.context_length)
        return PackedDataModule(source, None, case.batch_size, case.context_length, "concat", cache_dir=str(self.cache))

    @abstractmethod
    def train(self, steps: int) -> None:
        """Trains for that many optimizer steps, from the data's first row, with a new optimizer; marks the clock."""

    def run(self, steps: int) -> list[dict[str, float]]:
        """Trains for one step to warm up and then for `steps`, whose seconds and counts it returns."""
        self.clock.restart()
        self.train(steps + 1)
        gc.collect()
        return self.clock.steps[1:]


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
        self.clock.end_step(batch["segment_ids"], module.last_step_stats)


class Ours(Contender):
    """DiffusionLM under the Lightning Trainer, as `fit` builds them; `name` says with which settings."""

    def __init__(self, name: str, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(case, device, cache)
        self.module = DiffusionLM(
            self.shape,
            EosSchedule(),
            "full" if name == FULL else "document",
            lambda groups: AdamW(groups, LEARNING_RATE, BETAS, WEIGHT_DECAY),
            Schedule("constant", 0),
            compile=name != OURS,
        )
        self.module.use_tokenizer(self.data().tokenizer)
        self.module.configure_model()
        transformer: Any = self.module.transformer
        hidden_states = transformer.hidden_states

        def marked(*args: Any, **kwargs: Any) -> Any:
            result = hidden_states(*args, **kwargs)
            self.clock.mark("forward")
            return result

        transformer.hidden_states = marked
        self.model = transformer

    def train(self, steps: int) -> None:
        logging.disable(logging.INFO)  # Lightning's notes about every fit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # and its warnings about short ones
                self.fit(steps)
        finally:
            logging.disable(logging.NOTSET)
        self.module.trainer = None  # and with it the optimizer
        self.module.zero_grad()

    def fit(self, steps: int) -> None:
        """Trains with a new Trainer."""
        trainer = Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if self.mixed else "32-true",
            max_steps=steps,
            gradient_clip_val=CLIP,
            callbacks=[LightningMarks(self.clock)],
            logger=DummyLogger(),  # logging costs its usual time
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(self.module, self.data())


class PlainLoop(Contender):
    """transformers' Llama of the same shape, reading in both directions, in a plain loop with full logits and AdamW.

    Rows are packed, attention is full, and the loss is what dLLM-Var's released code computes. The objective and its
    noise are ours: the same tokens are masked, with the same rates.
    """

    def __init__(self, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(case, device, cache)
        self.model: Any = bidirectional_llama(self.shape).to(device)
        self.model.lm_head.register_forward_pre_hook(lambda *_: self.clock.mark("forward"))
        self.objective, self.noise = EosSchedule().bind(self.data().tokenizer.special), KeyedNoise(0)

    def train(self, steps: int) -> None:
        optimizer = AdamW(parameter_groups(self.model), LEARNING_RATE, BETAS, WEIGHT_DECAY)
        batches = iter(self.data().train_dataloader())
        for _ in range(steps):
            batch = {name: value.to(self.device) for name, value in next(batches).items()}
            self.clock.mark("data")
            noised = self.objective.corrupt(batch, self.noise)
            labels = noised.targets.masked_fill(~noised.loss_mask, -100)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                logits = self.model(input_ids=noised.input_ids, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
            self.clock.mark("head_and_loss")
            loss.backward()
            counts: dict[str, Any] = {
                "loss_tokens": noised.loss_mask.sum(),
                "attended_pairs": labels.numel() * labels.size(1),
            }
            del logits, loss, noised, labels
            self.clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.clock.end_step(batch["segment_ids"], counts)


def bidirectional_llama(shape: TransformerConfig) -> Any:
    """Returns a new LlamaForCausalLM of our shape whose every position reads all others; raises UserError without
    transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError('the plain loop needs transformers: pip install "dllm-var[transformers]"') from error
    llama = LlamaForCausalLM(LlamaConfig(**write_config(LLAMA, shape.resolved(), "float32")))
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False  # as the settings say; the attention's kernel asks the layer
    return llama


def build_contender(name: str, case: TrainingCase, device: torch.device, cache: Path) -> Contender:
    """Returns a contender by its name in the config."""
    return PlainLoop(case, device, cache) if name == PLAIN_LOOP else Ours(name, case, device, cache)
