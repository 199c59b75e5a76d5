"""From measurements to the plain data that the JSON file holds and that tables and plots are made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dllm_var.benchmarking.measure import Contender, Run, TaskRun
from dllm_var.benchmarking.ratios import RULE, against_bars, choose, credited, overhead, ratios, speed, with_role
from dllm_var.metrics import aup


def task_result(run: TaskRun) -> dict[str, Any]:
    """Returns what was measured of one task, complete or not.

    Args:
        run: The measurements.
    """
    task, contenders = run.task, run.contenders
    lengths = [max(map(len, example.references)) for example in run.examples]
    chosen, default = choose(contenders), with_role(contenders, "default")
    values = {} if chosen is None else ratios(chosen, contenders, lengths)
    rule = None
    if default is not None:
        rule = RULE.format(split=task.selection_split, default=default.setting.name, measured=task.split)
    return {
        "name": task.name,
        "checkpoint": task.checkpoint,
        "autoregressive_checkpoint": task.autoregressive_checkpoint,
        "parameters": run.model.num_parameters,
        "weights_bytes": sum(weight.numel() * weight.element_size() for weight in run.model.parameters()),
        "split": task.split,
        "selection_split": task.selection_split,
        "batch_size": task.batch_size,
        "seconds": run.seconds,
        "chosen": None if chosen is None else chosen.setting.name,
        "default": None if default is None else default.setting.name,
        "rule": rule,
        "accuracy_over_default": _difference(chosen, default),
        "ratios": values,
        "bars": against_bars(values),
        "credit": credited(contenders, lengths),
        "default_ratios": {} if default is None else ratios(default, contenders, lengths),
        "settings": [_setting_result(contender, contenders, lengths) for contender in contenders],
        "curves": _curves(run),
        "per_forward": [asdict(cost) for cost in run.forward_costs],
    }


def _difference(chosen: Contender | None, default: Contender | None) -> float | None:
    """Returns how much more accurate the best setting is than the default one, on the split that is reported."""
    if chosen is None or default is None or not chosen.scores or not default.scores:
        return None
    return chosen.scores["accuracy"] - default.scores["accuracy"]


def _setting_result(contender: Contender, contenders: Sequence[Contender], lengths: Sequence[int]) -> dict[str, Any]:
    setting = contender.setting
    compared = ratios(contender, contenders, lengths)
    return {
        "name": setting.name,
        "role": setting.role,
        "checkpoint": setting.checkpoint,
        "sampler": setting.sampler,
        **contender.scores,
        "single": _timing(contender.single),
        "batched": _timing(contender.batched),
        "peak_memory_bytes": dict(contender.memory),
        "selection": {
            **({"accuracy": contender.selection_scores["accuracy"]} if contender.selection_scores else {}),
            **({"tokens_per_second": speed(contender.selection_single)} if contender.selection_single else {}),
        },
        **{name: value for name, value in compared.items() if "over_" in name and "batch" not in name},
    }


def _timing(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns speed, seconds per request and overhead of some runs of the same prompts: medians over repeats."""
    if not runs:
        return {}
    speeds = [run.tokens / sum(run.seconds) for run in runs]
    requests = len(runs[0].answers)
    one_by_one = len(runs[0].seconds) == requests
    latencies = (
        [s for run in runs for s in run.seconds] if one_by_one else [sum(run.seconds) / requests for run in runs]
    )
    return {
        "prompts": requests,
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_lowest": min(speeds),
        "tokens_per_second_highest": max(speeds),
        "seconds_per_request": statistics.median(latencies),
        "seconds_until_answered": statistics.median(answer.seconds for run in runs for answer in run.answers),
        "sampler_overhead": overhead(runs),
        "forwards_per_request": sum(run.forward_calls for run in runs) / len(runs) / requests,
    }


def _curves(run: TaskRun) -> list[dict[str, Any]]:
    """Returns every sweep with its area; the best accuracy is that of any setting scored on as many prompts."""
    scored = [contender for contender in run.contenders if contender.scores]
    full = [c.scores["accuracy"] for c in scored if c.scores["prompts"] >= min(run.task.prompts, len(run.examples))]
    curves = []
    for sweep in run.task.sweeps:
        points = [
            {
                "value": point.value,
                "setting": contender.setting.name,
                "accuracy": contender.scores["accuracy"],
                "tokens_per_forward": contender.scores["tokens_per_forward"],
                "tokens_per_second": speed(contender.single) if contender.single else None,
            }
            for contender in scored
            for point in contender.setting.points
            if point.sweep == sweep.name and contender.scores["tokens_per_forward"] > 0
        ]
        points.sort(key=lambda point: sweep.values.index(point["value"]))
        best = max(full, default=None)
        curve = {"name": sweep.name, "over": sweep.over, "points": points, "best_accuracy": best, "aup": None}
        if points:
            curve["aup"] = aup(
                [point["tokens_per_forward"] for point in points],
                [100 * point["accuracy"] for point in points],
                None if best is None else 100 * best,
            )
        curves.append(curve)
    return curves
