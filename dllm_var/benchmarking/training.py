"""Measures training: contenders in turn, round after round, and what their figures come to."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dllm_var.benchmarking.instruments import PeakMemory
from dllm_var.benchmarking.training_base import Contender
from dllm_var.benchmarking.training_clock import PHASES, Step
from dllm_var.benchmarking.training_contenders import build
from dllm_var.benchmarking.training_settings import COMPILED, FULL, PLAIN_LOOP, TrainingCase
from dllm_var.callbacks.speed import compute_dtype, measure_peak_flops
from dllm_var.model.build import can_compile
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer

PEAK_SECONDS = 0.5  # for the fastest matrix product, in each round

Figures = dict[str, Any]


class TrainingRun:
    """One case: builds its contenders, measures them in turn, and adds up.

    Args:
        case: What to measure.
        rounds: How often each contender gets its turn.
        device: Where.
        cache: Folder for tokenized data.
        show: Is told case, phase and contender as they come.
    """

    def __init__(
        self,
        case: TrainingCase,
        rounds: int,
        device: torch.device,
        cache: Path,
        show: Callable[[str, str, str], None],
    ) -> None:
        self.case, self.rounds, self.device, self.cache, self.show = case, rounds, device, cache, show
        self.names = [name for name in case.contenders if name not in (COMPILED, FULL) or can_compile(device)]
        self.peaks: list[float] = []
        self.measured: dict[str, list[Figures]] = {name: [] for name in self.names}
        with torch.device("meta"):
            self.shape = Transformer(TransformerConfig(**case.transformer, vocab_size=case.vocab_size))

    def run(self) -> None:
        """Measures all rounds; what has been measured stays when an exception ends it."""
        contenders = {}
        for name in self.names:
            self.show(self.case.name, "warm-up", name)
            contenders[name] = build(name, self.case, self.device, self.cache)
            contenders[name].run(0)  # compiles, and fills caches and allocators
        for number in range(self.rounds):
            self.peaks.append(measure_peak_flops(self.device, self._dtype, PEAK_SECONDS))
            for name, contender in contenders.items():
                self.show(self.case.name, f"round {number + 1} of {self.rounds}", name)
                self.measured[name].append(self._measure(contender))

    @property
    def _dtype(self) -> torch.dtype:
        return compute_dtype("bf16-mixed" if self.device.type == "cuda" else "32-true")

    def _measure(self, contender: Contender) -> Figures:
        gc.collect()
        with PeakMemory(self.device) as memory:
            steps = contender.run(self.case.steps)
        weights = sum(p.numel() * p.element_size() for p in contender.model.parameters())
        figures = add_up(steps)
        figures["peak_memory_bytes"] = None if memory.bytes is None else memory.bytes + weights
        # What the task needs, whoever does it: the pairs that attend, the head where a loss is.
        useful = self.shape.flops_per_token(figures["pairs_per_token"], figures["loss_share"])
        figures["flops_per_second"] = useful * figures["tokens_per_second"]
        figures["mfu"] = figures["flops_per_second"] / self.peaks[-1]
        return figures

    def result(self) -> Figures:
        """Returns the case's figures, ratios and bars as plain types."""
        contenders = []
        for name, rounds in self.measured.items():
            if rounds:
                contenders.append({"name": name, "rounds": rounds, **medians(rounds)})
        result: Figures = {
            "name": self.case.name,
            "vocab_size": self.case.vocab_size,
            "transformer": self.case.transformer,
            "parameters": self.shape.num_parameters,
            "context_length": self.case.context_length,
            "batch_size": self.case.batch_size,
            "steps": self.case.steps,
            "ours": self.case.ours if self.case.ours in self.names else None,
            "gemm_peak_flops": median(self.peaks) if self.peaks else None,
            "contenders": contenders,
        }
        result["over_plain_loop"] = over(contenders, PLAIN_LOOP)
        result["bars"] = bars(self.case, result)
        return result


def add_up(steps: Sequence[Step]) -> Figures:
    """Returns speed and phases of some steps.

    Args:
        steps: At least one.
    """
    phases = {phase: sum(step.seconds[phase] for step in steps) for phase in PHASES}
    seconds, positions = sum(phases.values()), sum(step.positions for step in steps)
    tokens = sum(step.tokens for step in steps)
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / len(steps),
        "phase_seconds": {phase: value / len(steps) for phase, value in phases.items()},
        "padding_share": 1 - tokens / positions,
        "loss_share": sum(step.loss_tokens for step in steps) / tokens,
        "pairs_per_token": sum(step.pairs for step in steps) / tokens,
    }


def medians(rounds: Sequence[Figures]) -> Figures:
    """Returns the median over rounds of each figure."""
    result: Figures = {}
    for name, value in rounds[0].items():
        values = [figures[name] for figures in rounds]
        if isinstance(value, dict):
            result[name] = medians(values)
        else:
            result[name] = None if any(v is None for v in values) else median(values)
    return result


def over(contenders: Sequence[Figures], baseline: str) -> dict[str, Figures]:
    """Returns each contender's speed and memory over a baseline's: medians of the ratios within each round."""
    base = next((contender["rounds"] for contender in contenders if contender["name"] == baseline), None)
    if base is None:
        return {}
    return {
        contender["name"]: {
            name: _ratio([r[key] for r in contender["rounds"]], [r[key] for r in base])
            for name, key in (("tokens_per_second", "tokens_per_second"), ("peak_memory", "peak_memory_bytes"))
        }
        for contender in contenders
    }


def _ratio(values: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    ratios = [value / other for value, other in zip(values, base, strict=False) if value is not None and other]
    return median(ratios) if ratios else None


def bars(case: TrainingCase, result: Figures) -> dict[str, Figures]:
    """Returns what was asked of a case, what came out, and whether that passes; null where it was not measured.

    Args:
        case: Has the bars.
        result: Its figures and ratios.
    """
    utilisation = {contender["name"]: contender["mfu"] for contender in result["contenders"]}
    ratios = result["over_plain_loop"].get(result["ours"], {})
    asked = {}
    for name, bar in case.bars.items():
        least = not name.startswith("peak_memory")
        if name.startswith("mfu"):
            value = utilisation.get(FULL, utilisation.get(result["ours"]))
        else:
            value = ratios.get("tokens_per_second" if least else "peak_memory")
        passed = None if value is None else bool(value >= bar if least else value <= bar)
        asked[name] = {"value": value, "bar": bar, "direction": "at least" if least else "at most", "passed": passed}
    return asked


def top_ratios(cases: Sequence[Figures]) -> Figures:
    """Returns the ratios that bars are about, by name, and the bars with pass or fail."""
    every = {name: bar for case in cases for name, bar in case["bars"].items()}
    return {**{name: bar["value"] for name, bar in every.items()}, "bars": every}
