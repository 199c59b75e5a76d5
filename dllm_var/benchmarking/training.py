"""Measures training: contenders train the same model in turn, round after round."""

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dllm_var.benchmarking.contenders import Contender, build_contender, precision_of
from dllm_var.benchmarking.instruments import PHASES, PeakMemory, shown
from dllm_var.benchmarking.results import against_bar
from dllm_var.benchmarking.settings import BASELINES, COMPILED, FULL, OURS, PLAIN_LOOP, TrainingCase
from dllm_var.callbacks.speed import compute_dtype, measure_peak_flops
from dllm_var.errors import one_line
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.module import can_compile

Figures = dict[str, Any]
PEAK_SECONDS = 0.5  # of matrix products in each round, whose fastest is the peak
REPORTED = (
    "name",
    "vocab_size",
    "transformer",
    "objective",
    "context_length",
    "batch_size",
    "steps",
)  # settings in the result


class TrainingRun:
    """All measurements of one case; an exception that ends it leaves them. `cache` gets the tokenized data."""

    def __init__(self, case: TrainingCase, rounds: int, device: torch.device, cache: Path) -> None:
        self.case, self.rounds, self.device, self.cache = case, rounds, device, cache
        self.names = [name for name in case.contenders if name not in (COMPILED, FULL) or can_compile(device)]
        self.precision = precision_of(case, device)
        self.peaks: list[float] = []
        self.measured: dict[str, list[Figures]] = {name: [] for name in self.names}
        self.warm_up: dict[str, float] = {}  # seconds of the first step, with building and compiling the model
        self.failed: dict[str, str] = {}
        with torch.device("meta"):
            self.shape = Transformer(TransformerConfig(**case.transformer, vocab_size=case.vocab_size))

    def run(self) -> None:
        contenders: dict[str, Contender] = {}
        for name in shown(f"{self.case.name}: warm-up", list(self.names)):
            began = time.perf_counter()
            try:
                contenders[name] = build_contender(name, self.case, self.device, self.cache)
                contenders[name].run(0)  # compiles, and fills caches and allocators
            except RuntimeError as error:  # such as no memory: the others may still say something
                self.failed[name] = one_line(error)
                contenders.pop(name, None)
                self.names.remove(name)
            self.warm_up[name] = time.perf_counter() - began
        for number in range(self.rounds):
            self.peaks.append(measure_peak_flops(self.device, compute_dtype(self.precision), PEAK_SECONDS))
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
        read = figures["read_per_token"]
        useful = read * self.shape.flops_per_token(figures["pairs_per_token"] / read, figures["loss_share"] / read)
        figures["flops_per_second"] = useful * figures["tokens_per_second"]
        figures["mfu"] = figures["flops_per_second"] / self.peaks[-1]
        return figures

    def result(self) -> Figures:
        """Returns the case's figures, ratios and bars as plain data."""
        case, base = self.case, self.measured.get(PLAIN_LOOP, [])
        measured = {name: rounds for name, rounds in self.measured.items() if rounds}
        contenders = [
            {"name": name, "warm_up_seconds": self.warm_up[name], "rounds": rounds, **medians(rounds)}
            for name, rounds in measured.items()
        ]
        ratios = {name: over(rounds, base) for name, rounds in measured.items()}
        for ratio, baseline in BASELINES.items():
            for name, rounds in measured.items():
                ratios[name][ratio] = over(rounds, self.measured.get(baseline, []))["tokens_per_second"]
        ours = next((name for name in (COMPILED, OURS) if name in self.names), None)
        return {
            **{name: getattr(case, name) for name in REPORTED},
            "precision": self.precision,
            "parameters": self.shape.num_parameters,
            "ours": ours,
            "gemm_peak_flops": median(self.peaks) if self.peaks else None,
            "contenders": contenders,
            "over_plain_loop": ratios,
            "failed": self.failed,
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
        "read_per_token": total["read"] / tokens,
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
