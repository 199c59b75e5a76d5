"""Measures training: the contenders of one case in turn, round after round, and what their figures add up to."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dllm_var.benchmarking.instruments import PHASES, PeakMemory, shown
from dllm_var.benchmarking.results import against_bar
from dllm_var.benchmarking.settings import COMPILED, FULL, OURS, PLAIN_LOOP, TrainingCase
from dllm_var.benchmarking.trainers import Contender, build_contender
from dllm_var.callbacks.speed import compute_dtype, measure_peak_flops
from dllm_var.model.build import can_compile
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer

PEAK_SECONDS = 0.5  # of matrix products in each round, whose fastest is the peak

Figures = dict[str, Any]


class TrainingRun:
    """All measurements of one case; they are kept when an exception ends it.

    Args:
        case: What to measure.
        rounds: How often each contender gets its turn.
        device: Where to train.
        cache: Folder for tokenized data.
    """

    def __init__(self, case: TrainingCase, rounds: int, device: torch.device, cache: Path) -> None:
        self.case, self.rounds, self.device, self.cache = case, rounds, device, cache
        self.names = [name for name in case.contenders if name not in (COMPILED, FULL) or can_compile(device)]
        self.peaks: list[float] = []
        self.measured: dict[str, list[Figures]] = {name: [] for name in self.names}
        with torch.device("meta"):
            self.shape = Transformer(TransformerConfig(**case.transformer, vocab_size=case.vocab_size))

    def run(self) -> None:
        """Measures all rounds."""
        contenders = {}
        for name in shown(f"{self.case.name}: warm-up", self.names):
            contenders[name] = build_contender(name, self.case, self.device, self.cache)
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
        contenders = [
            {"name": name, "rounds": rounds, **medians(rounds)} for name, rounds in self.measured.items() if rounds
        ]
        ratios = {contender["name"]: over(contender["rounds"], base) for contender in contenders}
        ours = next((name for name in (COMPILED, OURS) if name in self.names), None)
        return {
            "name": case.name,
            "vocab_size": case.vocab_size,
            "transformer": case.transformer,
            "parameters": self.shape.num_parameters,
            "context_length": case.context_length,
            "batch_size": case.batch_size,
            "steps": case.steps,
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
        "padding_share": 1 - tokens / total["positions"],
        "loss_share": total["loss_tokens"] / tokens,
        "pairs_per_token": total["pairs"] / tokens,
    }


def medians(rounds: Sequence[Figures]) -> Figures:
    """Returns the median over rounds of each figure."""
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
