"""Measurements of samplers, and what they come to: the best setting, ratios, bars and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from dllm_var.benchmarking.settings import BARS, Entry
from dllm_var.model.transformer import Transformer
from dllm_var.sampling import Generation, Request, Sampler
from dllm_var.sampling.auxiliary import AuxiliaryModel

if TYPE_CHECKING:
    from dllm_var.benchmarking.samplers import TaskRun

REPORTED = ("name", "checkpoint", "autoregressive_checkpoint", "split", "selection_split", "batch_size")  # of a task
AUP_ALPHA = 3.0  # how much lost accuracy costs
AUP_TOLERANCE = 5.0  # per cent below the first point's accuracy that still count
TOLERANCE = 0.01  # accuracy that the best setting may lose against the default one
EQUAL = 0.005  # accuracy that a setting may lose against the twin and still count as equal
CHOSEN_BY = {  # ratios to the twin; what their best setting at equal accuracy has most of on the selection split
    "over_autoregressive": "tokens_per_second",
    "over_autoregressive_batched": "batched_tokens_per_second",
    "forwards_over_autoregressive": "tokens_per_forward",
}
RULE = (
    "the candidate with the most useful tokens/s at batch 1 on the {split} split, among those whose accuracy there is "
    f"at most {100 * TOLERANCE:g} point below that of '{{default}}'; its figures are of the {{measured}} split"
)


@dataclass
class Decoding:
    """One decode of a list of prompts."""

    answers: list[Generation]
    seconds: list[float]  # of each call of `generate`
    forward_seconds: float  # the part of it inside transformers

    @property
    def tokens(self) -> int:
        """Useful tokens: no prompt, no terminator, nothing behind it."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def forwards(self) -> list[int]:
        """Forward passes of each answer, of all models."""
        return [answer.nfe + answer.auxiliary_nfe for answer in self.answers]


@dataclass(eq=False)
class Contender:
    """A setting with its sampler and model, and its measurements so far."""

    setting: Entry
    sampler: Sampler
    model: Transformer
    scores: dict[str, float] = field(default_factory=dict)  # figures of its answers; empty until scored
    single: list[Decoding] = field(default_factory=list)  # one prompt at a time
    batched: list[Decoding] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)  # peak bytes beyond the models, `single` and `batched`
    selection_scores: dict[str, float] = field(default_factory=dict)  # on the split that chooses the best setting
    selection_single: list[Decoding] = field(default_factory=list)
    selection_batched: list[Decoding] = field(default_factory=list)

    @property
    def selection(self) -> dict[str, float | None]:
        """Accuracy and speeds on the selection split; None for what was not measured."""
        return {
            "accuracy": self.selection_scores.get("accuracy"),
            "tokens_per_second": speed(self.selection_single) if self.selection_single else None,
            "batched_tokens_per_second": speed(self.selection_batched) if self.selection_batched else None,
            "tokens_per_forward": self.selection_scores.get("tokens_per_forward"),
        }

    @property
    def models(self) -> list[Transformer]:
        """The model, and the one that the sampler brings."""
        brought = [value for value in vars(self.sampler).values() if isinstance(value, AuxiliaryModel)]
        return [self.model, *(one.beside(self.model, Request()) for one in brought)]


def with_role(contenders: Sequence[Contender], role: str) -> Contender | None:
    """Returns the contender with a role that only one can have."""
    return next((contender for contender in contenders if contender.setting.role == role), None)


def near_default(contenders: Sequence[Contender]) -> list[Contender]:
    """Returns the candidates, and the default, whose accuracy on the selection split is near the default's."""
    default = with_role(contenders, "default")
    if default is None or not default.selection_scores:
        return []
    lowest = default.selection_scores["accuracy"] - TOLERANCE
    scored = [one for one in contenders if one.setting.role in ("candidate", "default") and one.selection_scores]
    return [contender for contender in scored if contender.selection_scores["accuracy"] >= lowest]


def best_setting(contenders: Sequence[Contender]) -> Contender | None:
    """Returns the fastest of those near the default, by the selection split alone; None without a default."""
    timed = [contender for contender in near_default(contenders) if contender.selection_single]
    default = with_role(contenders, "default")
    return max(timed, key=lambda contender: speed(contender.selection_single), default=default)


def speed(runs: Sequence[Decoding]) -> float:
    """Returns useful tokens per second: the median over runs."""
    return median(run.tokens / sum(run.seconds) for run in runs)


def overhead(runs: Sequence[Decoding]) -> float:
    """Returns the share of time outside the transformers' forwards: the median over runs."""
    return median(1 - run.forward_seconds / sum(run.seconds) for run in runs)


def over(ours: Contender, baseline: Contender | None, cost: str = "seconds") -> float | None:
    """Returns our useful tokens per `cost` (`seconds` or `forwards`) over a baseline's, at batch 1; None unmeasured.

    It is the median over rounds, each ratio taken within a round over the prompts that both have timed.
    """
    if baseline is None or not ours.single or not baseline.single:
        return None
    values = []
    for mine, theirs in zip(ours.single, baseline.single, strict=False):  # an interrupted round may lack one of them
        count = min(len(mine.answers), len(theirs.answers))
        tokens, their_tokens = (sum(len(answer.tokens) for answer in run.answers[:count]) for run in (mine, theirs))
        if not their_tokens:
            return None
        our_cost, their_cost = (sum(getattr(run, cost)[:count]) for run in (mine, theirs))
        values.append(tokens / our_cost / (their_tokens / their_cost))
    return median(values)


def over_batched(ours: Contender, baseline: Contender | None) -> float | None:
    """Returns the same in batches: the median over rounds; None where the two did not decode the same prompts."""
    if baseline is None:
        return None
    pairs = [(a, b) for a, b in zip(ours.batched, baseline.batched, strict=False) if len(a.answers) == len(b.answers)]
    values = [speed([mine]) / speed([theirs]) for mine, theirs in pairs if theirs.tokens]
    return median(values) if values else None


def over_twin(ours: Contender, contenders: Sequence[Contender]) -> dict[str, float | None]:
    """Returns a setting's ratios to the autoregressive twin, by the names in `CHOSEN_BY`."""
    twin = with_role(contenders, "autoregressive")
    return {
        "over_autoregressive": over(ours, twin),
        "over_autoregressive_batched": over_batched(ours, twin),
        "forwards_over_autoregressive": over(ours, twin, "forwards"),
    }


def ratios(ours: Contender, contenders: Sequence[Contender]) -> dict[str, float | None]:
    """Returns one setting's ratios to the task's baselines; None where a figure is missing.

    `over_*` are useful tokens/s (at batch 1, or in batches where the name says so), `forwards_over_*` useful tokens per
    forward.
    """
    fixed = with_role(contenders, "fixed_length")
    rounds = zip(ours.batched, ours.single, strict=False)
    batched = [speed([many]) / speed([one]) for many, one in rounds if one.tokens]
    return {
        "over_fixed_length": over(ours, fixed),
        "batch_32_over_1": median(batched) if batched else None,
        "sampler_overhead": overhead(ours.single) if ours.single else None,
        "forwards_over_fixed_length": over(ours, fixed, "forwards"),
        **over_twin(ours, contenders),
    }


def equal_to_twin(contenders: Sequence[Contender]) -> list[Contender]:
    """Returns the settings that are as accurate as the twin (less `EQUAL`) on as many prompts, the twin included."""
    twin = with_role(contenders, "autoregressive")
    if twin is None or not twin.scores:
        return []
    lowest = twin.scores["accuracy"] - EQUAL - 1e-9  # a loss of exactly `EQUAL` counts as equal, whatever its rounding
    scored = [one for one in contenders if one.scores and one.scores["prompts"] == twin.scores["prompts"]]
    return [one for one in scored if one.scores["accuracy"] >= lowest]


def at_equal_accuracy(contenders: Sequence[Contender]) -> dict[str, tuple[Contender, float]]:
    """Returns for each ratio in `CHOSEN_BY` the best setting of those as accurate as the twin, and its ratio.

    The selection split says which setting is the fastest. Where this one turns out to be slower than the twin, and
    where there is no other, the twin itself counts, with 1. A ratio that the twin has not been measured for is absent.
    """
    twin, found = with_role(contenders, "autoregressive"), {}
    for name, figure in CHOSEN_BY.items():
        timed = []
        for one in equal_to_twin(contenders):
            quickness, value = one.selection[figure], over_twin(one, contenders)[name]
            if quickness is not None and value is not None:
                timed.append((quickness, value, one))
        if twin is not None and twin in (one for *_, one in timed):
            _, value, best = max(timed, key=lambda entry: entry[0])
            found[name] = (best, value) if value >= 1 else (twin, 1.0)
    return found


def against_bar(value: float | None, bar: float, direction: str) -> dict[str, Any]:
    """Returns a value, its bar, and whether it passes: None when there is no value."""
    passed = None if value is None else bool(value >= bar if direction == "at least" else value <= bar)
    return {"value": value, "bar": bar, "direction": direction, "passed": passed}


def task_result(run: TaskRun) -> dict[str, Any]:
    """Returns the measurements of one task, complete or not, as plain data."""
    task, contenders = run.task, run.contenders
    best, default = best_setting(contenders), with_role(contenders, "default")
    equal = at_equal_accuracy(contenders)
    values = {} if best is None else ratios(best, contenders)
    settings = [
        {
            **{name: getattr(one.setting, name) for name in ("name", "role", "checkpoint", "sampler")},
            "parameters": one.model.num_parameters,
            **one.scores,
            "single": timing(one.single),
            "batched": timing(one.batched),
            "peak_memory_bytes": one.memory,
            "selection": one.selection,
            **ratios(one, contenders),
        }
        for one in contenders
    ]
    rule = None
    if default is not None:
        rule = RULE.format(split=task.selection_split, default=default.setting.name, measured=task.split)
    return {
        **{name: getattr(task, name) for name in REPORTED},
        "parameters": run.model.num_parameters,
        "seconds": run.seconds,
        "chosen": None if best is None else best.setting.name,
        "default": None if default is None else default.setting.name,
        "rule": rule,
        "ratios": values,
        **{f"{name}_at_equal_accuracy": equal[name][1] if name in equal else None for name in CHOSEN_BY},
        "at_equal_accuracy": {name: one.setting.name for name, (one, _) in equal.items()},
        "bars": {name: against_bar(values.get(name), bar, BARS[name]) for name, bar in task.bars.items()},
        "settings": settings,
        "curves": curves(run, settings),
        "per_forward": run.forward_costs,
    }


def timing(runs: Sequence[Decoding]) -> dict[str, Any]:
    """Returns speed, seconds per request and overhead of some runs of the same prompts: medians over runs."""
    if not runs:
        return {}
    requests = len(runs[0].answers)
    per_call = requests / len(runs[0].seconds)
    return {
        "prompts": requests,
        "tokens_per_second": speed(runs),
        "seconds_per_request": median(seconds / per_call for run in runs for seconds in run.seconds),
        "sampler_overhead": overhead(runs),
    }


def curves(run: TaskRun, settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns every sweep with its area; the best accuracy is that of any setting scored on as many prompts."""
    scored = {one["name"]: one for one in settings if "accuracy" in one}
    most = min(run.task.prompts, len(run.examples))
    best = max((one["accuracy"] for one in scored.values() if one["prompts"] >= most), default=None)
    found = []
    for name, values in run.curves.items():
        points = [
            {
                "value": value,
                "setting": setting,
                "accuracy": scored[setting]["accuracy"],
                "tokens_per_forward": scored[setting]["tokens_per_forward"],
                "tokens_per_second": scored[setting]["single"].get("tokens_per_second"),
            }
            for value, setting in values
            if setting in scored and scored[setting]["tokens_per_forward"] > 0
        ]
        area = None
        if points:
            parallelism = [point["tokens_per_forward"] for point in points]
            area = aup(parallelism, [100 * p["accuracy"] for p in points], None if best is None else 100 * best)
        found.append({"name": name, "points": points, "best_accuracy": best, "aup": area})
    return found


def aup(parallelism: Sequence[float], accuracy: Sequence[float], best_accuracy: float | None = None) -> float:
    """Accuracy under parallelism: the weighted area under accuracy as a function of tokens per forward.

    Points are taken from the least to the most parallel; those more than `AUP_TOLERANCE` below the first are left out.
    The area left of the first point is a rectangle, the others are trapezoids of y W(y), where the weight
    W(y) = min(exp(-AUP_ALPHA (1 - y / best_accuracy)), 1) makes lost accuracy cost more than the tokens it buys
    (d3LLM, arXiv 2601.07568). There is at least one point, and parallelisms are above 0. Accuracies are in per cent;
    `best_accuracy` is the best that any method has on the task, of these points when None.
    """
    points = sorted(zip(parallelism, accuracy, strict=True), key=lambda point: (point[0], -point[1]))
    first, floor = points[0], points[0][1] - AUP_TOLERANCE
    best = max(accuracy) if best_accuracy is None else best_accuracy
    lost = {y: max(1 - y / best, 0) if best > 0 else 0 for _, y in points}
    kept = [(tokens, y * math.exp(-AUP_ALPHA * lost[y])) for tokens, y in points if y >= floor]
    area = first[0] * first[1]
    for (left, low), (right, high) in pairwise(kept):
        area += (right - left) * (low + high) / 2
    return area


def sampler_ratios(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the ratios of the first task, and below `tasks` those of each, from their results."""
    names = ("chosen", "at_equal_accuracy", "bars")
    each = {task["name"]: {**task["ratios"], **{name: task[name] for name in names}} for task in tasks}
    equal = [f"{name}_at_equal_accuracy" for name in CHOSEN_BY]
    first = tasks[0]["ratios"] if tasks else {}
    return {**first, **{name: {task["name"]: task[name] for task in tasks} for name in equal}, "tasks": each}
