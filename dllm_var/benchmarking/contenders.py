"""The contenders of the training benchmark: our module under Lightning, and plain loops around transformers' Llama."""

import gc
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from dllm_var.benchmarking.instruments import StepClock, llama_config, random_model
from dllm_var.benchmarking.settings import (
    AUTOMODEL_LOSS,
    DLLM_LOSS,
    FULL,
    OURS,
    PADDED_LOOP,
    PLAIN_LOOP,
    TrainingCase,
)
from dllm_var.datamodules import CmudictSource, PackedDataModule, Source
from dllm_var.model.config import TransformerConfig
from dllm_var.module import DiffusionLM
from dllm_var.objectives import EosSchedule, KeyedNoise, Mdlm, NoisedBatch, Objective
from dllm_var.objectives.base import Batch
from dllm_var.settings import build
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.training.optim import AdamW, Schedule, parameter_groups
from dllm_var.training.trainer import Trainer

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0  # of every contender
SPREAD = 0.7  # standard deviation of the logarithm of a sample's lengths
POOL = 50  # batches whose samples are sorted by length together, as transformers does
GOLDEN_RATIO = (5**0.5 - 1) / 2
ENOUGH = 4  # times as many tokens in the data as one round trains on


class RandomSamples(Source):
    """Prompts and answers of random tokens with log-normal lengths, like those of instruction data.

    `prompt_tokens` and `answer_tokens` are median lengths; no sample, with its terminator, is longer than `longest`.
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
    """One way to train a case's model, on the same samples and masks as the others, with the same optimizer."""

    model: nn.Module

    def __init__(self, name: str, case: TrainingCase, device: torch.device, cache: Path) -> None:
        self.name, self.case, self.device, self.cache = name, case, device, cache
        self.shape = TransformerConfig(**case.transformer, vocab_size=case.vocab_size)
        self.clock = StepClock(device)
        self.precision = precision_of(case, device)
        self.dtype = torch.bfloat16 if self.precision == "bf16-true" else torch.float32

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


class Ours(Contender):
    """DiffusionLM under the Lightning Trainer, with the settings that `name` says."""

    def __init__(self, name: str, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(name, case, device, cache)
        self.module = DiffusionLM(
            self.shape,
            objective_of(case),
            "full" if name == FULL else "document",
            lambda groups: AdamW(groups, LEARNING_RATE, BETAS, WEIGHT_DECAY),
            Schedule("constant", 0),
        )
        self.module.use_tokenizer(self.data().tokenizer)
        transformer: Any = random_model(self.module.config, device, self.dtype)
        transformer.recompute_activations(case.activation_checkpointing)
        if name != OURS:
            transformer.compile_layers()
        self.module.transformer = transformer
        hidden_states = transformer.hidden_states

        def marked(*args: Any, **kwargs: Any) -> Any:
            result = hidden_states(*args, **kwargs)
            self.clock.mark("forward")
            return result

        transformer.hidden_states = marked
        self.model = transformer

    def train(self, steps: int) -> None:
        marks = LambdaCallback(
            on_train_batch_start=lambda *_: self.clock.mark("data"),
            on_before_backward=lambda *_: self.clock.mark("head_and_loss"),
            on_after_backward=lambda *_: self.clock.mark("backward"),
            on_train_batch_end=lambda trainer, module, outputs, batch, _: self.clock.end_step(
                batch["segment_ids"], module.last_step_stats
            ),
        )
        logging.disable(logging.INFO)  # Lightning's notes about every fit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # and its warnings about short ones
                trainer = Trainer(
                    accelerator="gpu" if self.device.type == "cuda" else "cpu",
                    devices=1,
                    precision=self.precision,
                    max_steps=steps,
                    gradient_clip_val=CLIP,
                    callbacks=[marks],
                    logger=DummyLogger(),  # logging costs its usual time
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    limit_val_batches=0,
                )
                trainer.fit(self.module, self.data())
        finally:
            logging.disable(logging.NOTSET)
        self.module.trainer = None  # and with it the optimizer
        self.module.zero_grad()


class PlainLoop(Contender):
    """transformers' Llama in a plain loop with full attention and logits: the loss of dLLM-Var's released code.

    The objective and its noise are ours: the same tokens are masked, with the same rates.
    """

    objective: Objective = EosSchedule()

    def __init__(self, name: str, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(name, case, device, cache)
        with device:
            self.model: Any = bidirectional_llama(self.shape).to(self.dtype)
        self.model.lm_head.register_forward_pre_hook(lambda *_: self.clock.mark("forward"))
        self.objective, self.noise = self.objective.bind(self.data().tokenizer.special), KeyedNoise(0)

    def batches(self) -> Iterator[Batch]:
        """Yields batches from the data's first row on."""
        yield from self.data().train_dataloader()

    def loss(self, logits: Tensor, noised: NoisedBatch) -> Tensor:
        """Returns the loss that backward starts from, of logits [B, L, V]."""
        labels = noised.targets.masked_fill(~noised.loss_mask, -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)

    def train(self, steps: int) -> None:
        optimizer = AdamW(parameter_groups(self.model), LEARNING_RATE, BETAS, WEIGHT_DECAY)
        batches, mixed = self.batches(), self.precision == "bf16-mixed"
        for _ in range(steps):
            batch = {name: value.to(self.device) for name, value in next(batches).items()}
            self.clock.mark("data")
            noised = self.objective.corrupt(batch, self.noise)
            used = batch["segment_ids"] >= 0
            seen = None if self.name == PLAIN_LOOP or bool(used.all()) else used.long()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                logits = self.model(input_ids=noised.input_ids, attention_mask=seen, use_cache=False).logits
                loss = self.loss(logits, noised)
            self.clock.mark("head_and_loss")
            loss.backward()
            lengths = used.sum(dim=1)
            pairs = used.numel() * used.size(1) if self.name == PLAIN_LOOP else lengths.square().sum()
            counts = {"loss_tokens": noised.loss_mask.sum(), "read_tokens": lengths.sum(), "attended_pairs": pairs}
            del logits, loss, noised
            self.clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.clock.end_step(batch["segment_ids"], counts)


class PaddedLoop(PlainLoop):
    """The plain loop with each sample in a row of its own, as the trainers of dllm and of transformers batch them.

    Samples of similar lengths are batched (`group_by_length`): the shuffled data is cut into pools of so many batches,
    each sorted by length. As few batches are timed, their order mixes lengths evenly. A batch has as many samples as
    packed rows have on average. A token sees its sample.
    """

    def batches(self) -> Iterator[Batch]:
        table, generator = self.data().table("train"), np.random.default_rng(0)
        count = max(1, round(self.case.batch_size * self.case.context_length * len(table) / len(table.tokens)))
        lengths = np.diff(table.offsets)
        while True:
            order = generator.permutation(len(table))
            pools = [order[at : at + count * POOL] for at in range(0, len(order), count * POOL)]
            order = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
            groups = [order[at : at + count] for at in range(0, len(order) - count + 1, count)]
            for number in np.argsort(np.arange(len(groups)) * GOLDEN_RATIO % 1):
                yield self._padded(groups[number].tolist())

    def _padded(self, samples: list[int]) -> Batch:
        """Returns a batch of samples of the table, each a row padded to the longest."""
        data = self.data()
        table = data.table("train")
        spans = [slice(int(table.offsets[sample]), int(table.offsets[sample + 1])) for sample in samples]
        lengths = torch.tensor([span.stop - span.start for span in spans])
        present = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.full(present.shape, data.tokenizer.pad_id)
        supervised = torch.zeros(present.shape, dtype=torch.bool)
        for row, span in enumerate(spans):
            tokens[row, : lengths[row]] = torch.from_numpy(table.tokens[span].astype(np.int64))
            supervised[row, : lengths[row]] = torch.from_numpy(table.supervised[span].astype(np.bool_))
        positions = torch.arange(present.size(1)).expand(present.shape)
        batch = {"input_ids": tokens, "supervised": supervised, "segment_ids": present.long() - 1}
        return {**batch, "position_ids": positions, "row": torch.tensor(samples)}


class PeerLoss(PaddedLoop):
    """The padded loop with the loss of another trainer of masked diffusion, restated; both compute that of `Mdlm`.

    They take cross-entropies of all positions, with the weight 1/t where a token is masked and 0 elsewhere, over the
    number of supervised tokens: dllm (`MDLMTrainer.compute_loss`) from logits [B, V, L], NeMo Automodel
    (`MDLMCrossEntropyLoss`) from logits [B * L, V].
    """

    objective = Mdlm()

    def loss(self, logits: Tensor, noised: NoisedBatch) -> Tensor:
        assert noised.weights is not None
        if self.name == DLLM_LOSS:
            every = F.cross_entropy(logits.transpose(1, 2), noised.targets, reduction="none")
        else:
            every = F.cross_entropy(logits.flatten(0, 1), noised.targets.flatten(), reduction="none")
        return (every.view_as(noised.targets) * noised.weights * noised.loss_mask).sum() / noised.normaliser


def build_contender(name: str, case: TrainingCase, device: torch.device, cache: Path) -> Contender:
    """Builds the contender of that name; `cache` gets the tokenized data."""
    kinds = {PLAIN_LOOP: PlainLoop, PADDED_LOOP: PaddedLoop, DLLM_LOSS: PeerLoss, AUTOMODEL_LOSS: PeerLoss}
    return kinds.get(name, Ours)(name, case, device, cache)


def precision_of(case: TrainingCase, device: torch.device) -> Any:
    """Returns the Trainer's precision for a case."""
    return case.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")


def objective_of(case: TrainingCase) -> Objective:
    """Returns the objective that ours trains on."""
    if case.objective is None:
        return EosSchedule()
    return build(Objective, "objective", case.objective, f"training {case.name}")


def bidirectional_llama(shape: TransformerConfig) -> Any:
    """Returns a new LlamaForCausalLM of our shape whose every position reads all others."""
    config = llama_config(shape, "float32")
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM(config)
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False  # as the settings say; the attention's kernel asks the layer
    return llama
