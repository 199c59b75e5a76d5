"""Contenders of a training benchmark: our module under Lightning, and two baselines on transformers' Llama.

All train a model of the same shape on the same samples of random tokens, with the same masks, optimizer and clipping.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
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
        self.clock.mark("optimizer")
        segments = batch["segment_ids"]
        tokens = int((segments >= 0).sum())
        pairs = sum(row[row >= 0].bincount().square().sum() for row in segments)
        if module.attention == "full":
            pairs = segments.size(1) * tokens
        self.clock.count(tokens, segments.numel(), int(module.last_step_stats["loss_tokens"]), int(pairs))
        self.clock.end_step()


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
        with warnings.catch_warnings():  # Lightning's, about runs this short
            warnings.simplefilter("ignore")
            trainer.fit(self.module, packed_data(self.case, self.cache))
        self.module.trainer = None  # and with it the optimizer
        self.module.zero_grad()


class Baseline(Contender):
    """transformers' Llama of the same shape, reading in both directions, with full logits and AdamW.

    The objective and its noise are ours: the same tokens are masked, with the same rates.
    """

    def __init__(self, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(case, device, cache)
        shape = TransformerConfig(**case.transformer, vocab_size=case.vocab_size)
        self.model: Any = bidirectional_llama(shape).to(device)
        self.model.lm_head.register_forward_pre_hook(lambda *_: self.clock.mark("forward"))
        self.objective, self.noise = EosSchedule(), KeyedNoise(0)
        self.data = packed_data(case, cache)
        self.objective.bind(self.data.tokenizer.special)

    def masked(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns a batch's noised tokens and its labels, -100 at positions without a loss; both [B, L]."""
        noised = self.objective.corrupt(batch, self.noise)
        return noised.input_ids, noised.targets.masked_fill(~noised.loss_mask, -100)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross-entropy of all positions' logits [B, L, V], of which those with a label count."""
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


class PlainLoop(Baseline):
    """Packed rows with full attention in a plain loop: the loss as dLLM-Var's released code computes it."""

    def train(self, steps: int) -> None:
        optimizer = AdamW(parameter_groups(self.model), LEARNING_RATE, BETAS, WEIGHT_DECAY)
        batches = iter(packed_data(self.case, self.cache).train_dataloader())
        for _ in range(steps):
            batch = {name: value.to(self.device) for name, value in next(batches).items()}
            self.clock.mark("data")
            tokens, labels = self.masked(batch)
            real = batch["segment_ids"] >= 0
            count = int(real.sum())
            self.clock.count(count, real.numel(), int((labels >= 0).sum()), real.size(1) * count)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                logits = self.model(input_ids=tokens, use_cache=False).logits
                loss = self.loss(logits, labels)
            self.clock.mark("head_and_loss")
            loss.backward()
            del logits, loss
            self.clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.clock.end_step()


class PaddedTrainer(Baseline):
    """Each sample in a row of its own, padded to the longest of the batch, under transformers' Trainer.

    A batch has as many samples as the packed rows of the other contenders have on average.
    """

    def train(self, steps: int) -> None:
        from transformers import PrinterCallback, TrainerCallback, TrainingArguments
        from transformers import Trainer as TheirTrainer

        clock = self.clock

        class Marks(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.mark("data")

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                clock.mark("backward")

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.end_step()

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            value = self.loss(outputs.logits, labels)
            clock.mark("head_and_loss")
            pairs = int(self.lengths.square().sum())
            clock.count(int(self.lengths.sum()), labels.numel(), int((labels >= 0).sum()), pairs)
            return value

        table = self.data.table("train")
        samples = round(self.case.batch_size * self.case.context_length * len(table) / len(table.tokens))
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=max(1, samples),
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=CLIP,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                bf16=self.mixed,
                use_cpu=not self.mixed,
                dataloader_pin_memory=self.mixed,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = TheirTrainer(
                model=self.model,
                args=arguments,
                data_collator=self.collate,
                train_dataset=range(len(table)),
                compute_loss_func=loss,
                callbacks=[Marks()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.model.zero_grad()

    def collate(self, samples: list[int]) -> dict[str, Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels` of samples, each a row padded to the longest."""
        table = self.data.table("train")
        spans = [slice(int(table.offsets[sample]), int(table.offsets[sample + 1])) for sample in samples]
        self.lengths = torch.tensor([span.stop - span.start for span in spans])
        shape = (len(samples), int(self.lengths.max()))
        tokens = np.full(shape, self.data.tokenizer.pad_id, dtype=np.int64)
        supervised = np.zeros(shape, dtype=np.bool_)
        for row, span in enumerate(spans):
            tokens[row, : span.stop - span.start] = table.tokens[span]
            supervised[row, : span.stop - span.start] = table.supervised[span]
        present = (torch.arange(shape[1]) < self.lengths[:, None]).long()
        batch = {
            "input_ids": torch.from_numpy(tokens),
            "supervised": torch.from_numpy(supervised),
            "segment_ids": present - 1,
            "position_ids": torch.arange(shape[1]).expand(shape),
            "row": torch.tensor(samples),
        }
        noised, labels = self.masked(batch)
        return {"input_ids": noised, "attention_mask": present, "labels": labels}


def bidirectional_llama(shape: TransformerConfig) -> Any:
    """Returns a new LlamaForCausalLM of our shape, with a vocabulary, whose every position reads all others.

    Raises:
        UserError: Without transformers.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("the baselines need transformers and accelerate: pip install -e '.[dev]'") from error
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
    return {PLAIN_LOOP: PlainLoop, PADDED: PaddedTrainer}[name](case, device, cache)
