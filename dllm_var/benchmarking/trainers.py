"""Contenders of a training benchmark: our module under Lightning, and two baselines on transformers' Llama.

All train a model of the same shape on the same samples of random tokens, with the same masks, optimizer and clipping.
"""

from __future__ import annotations

import gc
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from dllm_var.benchmarking.instruments import Step, StepClock
from dllm_var.benchmarking.settings import COMPILED, FULL, OURS, PADDED, PLAIN_LOOP, TrainingCase
from dllm_var.datamodules import CmudictSource, PackedDataModule, Source
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.module import DiffusionLM
from dllm_var.objectives import EosSchedule, KeyedNoise
from dllm_var.objectives.base import Batch
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


def packed_data(case: TrainingCase, cache: Path) -> PackedDataModule:
    """Returns a case's data module, at its first row; its samples are strung together and cut, as in the paper."""
    tokens = ENOUGH * (case.steps + 1) * case.batch_size * case.context_length
    samples = max(64, tokens // (case.prompt_tokens + case.answer_tokens))
    source = RandomSamples(samples, case.prompt_tokens, case.answer_tokens, case.context_length)
    return PackedDataModule(source, None, case.batch_size, case.context_length, "concat", cache_dir=str(cache))


class Contender(ABC):
    """Trains a case's model; it is kept over the rounds, its optimizer state is not."""

    model: nn.Module

    def __init__(self, case: TrainingCase, device: torch.device, cache: Path) -> None:
        self.case, self.device, self.cache = case, device, cache
        self.clock = StepClock(device)
        self.mixed = device.type == "cuda"  # bf16-mixed there, float32 on the CPU

    @abstractmethod
    def train(self, steps: int) -> None:
        """Trains for that many optimizer steps, from the data's first row, with a new optimizer; marks the clock."""

    def run(self, steps: int) -> list[Step]:
        """Trains for one step to warm up and then for `steps`, which it returns."""
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
        loss_tokens = int(module.last_step_stats["loss_tokens"])
        self.clock.end_step(batch["segment_ids"], loss_tokens, module.attention == "full")


class Ours(Contender):
    """DiffusionLM under the Lightning Trainer, as `fit` builds them; `compile` and `attention` are its settings."""

    def __init__(
        self,
        case: TrainingCase,
        device: torch.device,
        cache: Path,
        compile: bool,
        attention: Literal["full", "document"],
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
        self.module.use_tokenizer(packed_data(case, cache).tokenizer)
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
        with quiet():
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
            trainer.fit(self.module, packed_data(self.case, self.cache))
        self.module.trainer = None  # and with it the optimizer
        self.module.zero_grad()


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out Lightning's notes about every fit, and its warnings about short ones."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class PlainLoop(Contender):
    """transformers' Llama of the same shape, reading in both directions, in a plain loop with full logits and AdamW.

    Rows are packed, attention is full, and the loss is what dLLM-Var's released code computes. The objective and its
    noise are ours: the same tokens are masked, with the same rates.
    """

    full_attention = True

    def __init__(self, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(case, device, cache)
        shape = TransformerConfig(**case.transformer, vocab_size=case.vocab_size)
        self.model: Any = bidirectional_llama(shape).to(device)
        self.model.lm_head.register_forward_pre_hook(lambda *_: self.clock.mark("forward"))
        self.objective, self.noise = EosSchedule(), KeyedNoise(0)
        self.data = packed_data(case, cache)
        self.objective.bind(self.data.tokenizer.special)

    def batches(self) -> Iterator[Batch]:
        """Yields batches from the data's first row on."""
        yield from packed_data(self.case, self.cache).train_dataloader()

    def train(self, steps: int) -> None:
        optimizer = AdamW(parameter_groups(self.model), LEARNING_RATE, BETAS, WEIGHT_DECAY)
        batches = self.batches()
        for _ in range(steps):
            batch = {name: value.to(self.device) for name, value in next(batches).items()}
            self.clock.mark("data")
            noised = self.objective.corrupt(batch, self.noise)
            labels = noised.targets.masked_fill(~noised.loss_mask, -100)
            seen = None if self.full_attention else (batch["segment_ids"] >= 0).long()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                logits = self.model(input_ids=noised.input_ids, attention_mask=seen, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
            self.clock.mark("head_and_loss")
            loss.backward()
            loss_tokens = int(noised.loss_mask.sum())
            del logits, loss, noised, labels
            self.clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.clock.end_step(batch["segment_ids"], loss_tokens, self.full_attention)


class PaddedLoop(PlainLoop):
    """The plain loop with each sample in a row of its own, padded to the longest of the batch.

    A batch has as many samples as the packed rows of the other contenders have on average.
    """

    full_attention = False

    def batches(self) -> Iterator[Batch]:
        table = self.data.table("train")
        count = max(1, round(self.case.batch_size * self.case.context_length * len(table) / len(table.tokens)))
        for start in cycle(range(0, len(table) - count + 1, count)):
            yield self.padded(range(start, start + count))

    def padded(self, samples: range) -> Batch:
        """Returns a batch of samples of the table, each a row padded to the longest."""
        table = self.data.table("train")
        spans = [slice(int(table.offsets[sample]), int(table.offsets[sample + 1])) for sample in samples]
        lengths = torch.tensor([span.stop - span.start for span in spans])
        present = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.full(present.shape, self.data.tokenizer.pad_id)
        supervised = torch.zeros(present.shape, dtype=torch.bool)
        for row, span in enumerate(spans):
            tokens[row, : lengths[row]] = torch.from_numpy(table.tokens[span].astype(np.int64))
            supervised[row, : lengths[row]] = torch.from_numpy(table.supervised[span].astype(np.bool_))
        positions = torch.arange(present.size(1)).expand(present.shape)
        return {
            "input_ids": tokens,
            "supervised": supervised,
            "segment_ids": present.long() - 1,
            "position_ids": positions,
            "row": torch.tensor(samples),
        }


def bidirectional_llama(shape: TransformerConfig) -> Any:
    """Returns a new LlamaForCausalLM of our shape, with a vocabulary, whose every position reads all others.

    Raises:
        UserError: Without transformers.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("the baselines need transformers: pip install -e '.[dev]'") from error
    shape = shape.resolved()
    settings: dict[str, Any] = dict(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    config = LlamaConfig(**settings)
    config.is_causal = False  # no causal mask is made
    llama = LlamaForCausalLM(config)
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False  # and the kernel is not asked for one
    return llama


def build_contender(name: str, case: TrainingCase, device: torch.device, cache: Path) -> Contender:
    """Returns a contender by its name in the config."""
    if name in (OURS, COMPILED, FULL):
        return Ours(case, device, cache, compile=name != OURS, attention="full" if name == FULL else "document")
    return {PLAIN_LOOP: PlainLoop, PADDED: PaddedLoop}[name](case, device, cache)
