"""Measures training: our module under Lightning and a plain loop around transformers' Llama, round after round."""

import gc
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from dllm_var.benchmarking.instruments import PHASES, PeakMemory, StepClock, shown
from dllm_var.benchmarking.results import against_bar
from dllm_var.benchmarking.settings import COMPILED, FULL, OURS, PLAIN_LOOP, TrainingCase
from dllm_var.callbacks.speed import compute_dtype, measure_peak_flops
from dllm_var.checkpoints.families import LLAMA, write_config
from dllm_var.datamodules import CmudictSource, PackedDataModule, Source
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.module import DiffusionLM, can_compile
from dllm_var.objectives import EosSchedule, KeyedNoise
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.training.optim import AdamW, Schedule, parameter_groups
from dllm_var.training.trainer import Trainer

Figures = dict[str, Any]
PEAK_SECONDS = 0.5  # of matrix products in each round, whose fastest is the peak
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0  # of every contender
SPREAD = 0.7  # standard deviation of the logarithm of a sample's lengths
ENOUGH = 4  # times as many tokens in the data as one round trains on
REPORTED = ("name", "vocab_size", "transformer", "context_length", "batch_size", "steps")  # settings in the result


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


class Ours(Contender):
    """DiffusionLM under the Lightning Trainer, with the settings that `name` says."""

    def __init__(self, name: str, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(name, case, device, cache)
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
                    accelerator="gpu" if self.mixed else "cpu",
                    devices=1,
                    precision="bf16-mixed" if self.mixed else "32-true",
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

    def __init__(self, name: str, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(name, case, device, cache)
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
            pairs = labels.numel() * labels.size(1)
            counts: dict[str, Any] = {"loss_tokens": noised.loss_mask.sum(), "attended_pairs": pairs}
            del logits, loss, noised, labels
            self.clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.clock.end_step(batch["segment_ids"], counts)


def bidirectional_llama(shape: TransformerConfig) -> Any:
    """Returns a new LlamaForCausalLM of our shape whose every position reads all others."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError('the plain loop needs transformers: pip install "dllm-var[transformers]"') from error
    llama = LlamaForCausalLM(LlamaConfig(**write_config(LLAMA, shape.resolved(), "float32")))
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False  # as the settings say; the attention's kernel asks the layer
    return llama


class TrainingRun:
    """All measurements of one case; an exception that ends it leaves them. `cache` gets the tokenized data."""

    def __init__(self, case: TrainingCase, rounds: int, device: torch.device, cache: Path) -> None:
        self.case, self.rounds, self.device, self.cache = case, rounds, device, cache
        self.names = [name for name in case.contenders if name not in (COMPILED, FULL) or can_compile(device)]
        self.peaks: list[float] = []
        self.measured: dict[str, list[Figures]] = {name: [] for name in self.names}
        with torch.device("meta"):
            self.shape = Transformer(TransformerConfig(**case.transformer, vocab_size=case.vocab_size))

    def run(self) -> None:
        contenders = {}
        for name in shown(f"{self.case.name}: warm-up", self.names):
            kind = PlainLoop if name == PLAIN_LOOP else Ours
            contenders[name] = kind(name, self.case, self.device, self.cache)
            contenders[name].run(0)  # compiles, and fills caches and allocators
        dtype = compute_dtype("bf16-mixed" if self.device.type == "cuda" else "32-true")
        for number in range(self.rounds):
            self.peaks.append(measure_peak_flops(self.device, dtype, PEAK_SECONDS))
            for name in shown(f"{self.case.name}: round {number + 1} of {self.rounds}", self.names):
                self.measured[name].append(self._measure(contenders[name]))

    def _measure(self, contender: Contender) -> Figures:
        gc.collect()
        with PeakMemory(self.device) as memory:
            steps = contender.run(self.case.steps)
        weights = sum(p.numel() * p.element_size() for p in contender.model.parameters())
        figures = add_up(steps)
        figures["peak_memory_bytes"] = None if memory.bytes is None else memory.bytes + weights
        # The FLOPs that the task needs, whoever does it: the pairs that attend, the head where there is a loss.
        useful = self.shape.flops_per_token(figures["pairs_per_token"], figures["loss_share"])
        figures["flops_per_second"] = useful * figures["tokens_per_second"]
        figures["mfu"] = figures["flops_per_second"] / self.peaks[-1]
        return figures

    def result(self) -> Figures:
        """Returns the case's figures, ratios and bars as plain data."""
        case, base = self.case, self.measured.get(PLAIN_LOOP, [])
        measured = {name: rounds for name, rounds in self.measured.items() if rounds}
        contenders = [{"name": name, "rounds": rounds, **medians(rounds)} for name, rounds in measured.items()]
        ratios = {name: over(rounds, base) for name, rounds in measured.items()}
        ours = next((name for name in (COMPILED, OURS) if name in self.names), None)
        return {
            **{name: getattr(case, name) for name in REPORTED},
            "parameters": self.shape.num_parameters,
            "ours": ours,
            "gemm_peak_flops": median(self.peaks) if self.peaks else None,
            "contenders": contenders,
            "over_plain_loop": ratios,
            "bars": bars(case.bars, ours, contenders, ratios),
        }


def add_up(steps: Sequence[dict[str, float]]) -> Figures:
    """Returns speed, phases and shares of at least one step of a `StepClock`."""
    total = {name: sum(step[name] for step in steps) for name in steps[0]}
    seconds, tokens = sum(total[phase] for phase in PHASES), total["tokens"]
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / len(steps),
        "phase_seconds": {phase: total[phase] / len(steps) for phase in PHASES},
        "loss_share": total["loss_tokens"] / tokens,
        "pairs_per_token": total["pairs"] / tokens,
    }


def medians(rounds: Sequence[Figures]) -> Figures:
    result: Figures = {}
    for name, value in rounds[0].items():
        values = [figures[name] for figures in rounds]
        if isinstance(value, dict):
            result[name] = medians(values)
        else:
            result[name] = None if None in values else median(values)
    return result


def over(rounds: Sequence[Figures], base: Sequence[Figures]) -> dict[str, float | None]:
    """Returns speed and memory over a baseline's: medians of the ratios within each round, None without any."""
    found: dict[str, float | None] = {}
    for name, figure in (("tokens_per_second", "tokens_per_second"), ("peak_memory", "peak_memory_bytes")):
        pairs = [(ours[figure], theirs[figure]) for ours, theirs in zip(rounds, base, strict=False)]
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
        found[name] = median(ratios) if ratios else None
    return found


def bars(
    wanted: dict[str, float], ours: str | None, contenders: Sequence[Figures], ratios: dict[str, Figures]
) -> dict[str, Figures]:
    """Returns each bar with its value out of the contenders' figures and ratios, and whether it passes."""
    utilisation = {contender["name"]: contender["mfu"] for contender in contenders}
    values = {**ratios.get(ours or "", {}), "mfu": utilisation.get(FULL, utilisation.get(ours))}
    found = {}
    for name, bar in wanted.items():
        value = next((value for ratio, value in values.items() if name.startswith(ratio)), None)
        found[name] = against_bar(value, bar, "at most" if name.startswith("peak_memory") else "at least")
    return found


def training_ratios(cases: Sequence[Figures]) -> Figures:
    """Returns the ratios of all cases by the names of their bars, and the bars."""
    every = {name: bar for case in cases for name, bar in case["bars"].items()}
    return {**{name: bar["value"] for name, bar in every.items()}, "bars": every}
