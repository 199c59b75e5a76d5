"""The best setting, by a rule that does not see its figures, and how it stands against the baselines and the bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dllm_var.benchmarking.contenders import Contender, Run

TOLERANCE = 0.01  # accuracy that the best setting may lose against the default one
# What each ratio is to reach, and whether more or less is better.
BARS = {
    "over_fixed_length": (30.1, "at least"),
    "over_autoregressive": (2.4, "at least"),
    "batch_32_over_1": (6.0, "at least"),
    "sampler_overhead": (0.20, "at most"),
}
RULE = (
    "the candidate with the most useful tokens/s at batch 1 on the {split} split, among those whose accuracy there is "
    f"at most {100 * TOLERANCE:g} point below that of '{{default}}'; its figures are of the {{measured}} split"
)


def choose(contenders: Sequence[Contender]) -> Contender | None:
    """Returns the best setting by `RULE`, looking at nothing but the selection split; null without a default.

    Args:
        contenders: All settings of a task, measured or not.
    """
    default = with_role(contenders, "default")
    if default is None or not default.selection_scores:
        return default
    bar = default.selection_scores["accuracy"] - TOLERANCE
    near = [
        contender
        for contender in contenders
        if contender.setting.role in ("candidate", "default")
        and contender.selection_single
        and contender.selection_scores["accuracy"] >= bar
    ]
    return max(near, key=lambda contender: speed(contender.selection_single), default=default)


def with_role(contenders: Sequence[Contender], role: str) -> Contender | None:
    """Returns the contender with a role that only one can have."""
    return next((contender for contender in contenders if contender.setting.role == role), None)


def ratios(ours: Contender, contenders: Sequence[Contender], answer_lengths: Sequence[int]) -> dict[str, float | None]:
    """Returns how one setting stands against the task's baselines; null where a figure is missing.

    `over_*` are useful tokens/s at batch 1, `forwards_over_*` useful tokens per forward: the ratio of speeds on
    hardware whose forwards cost the same whatever their width. Each is taken over the prompts both have timed.

    Args:
        ours: The setting.
        contenders: All settings of the task.
        answer_lengths: Tokens of each prompt's (longest) reference. The fixed-length baseline is credited with as many
            where its own answer has fewer, so that a bad answer does not make it look slower than it is.
    """
    autoregressive = with_role(contenders, "autoregressive")
    fixed = with_role(contenders, "fixed_length")
    pairs = [(speed([many]), speed([one])) for many, one in zip(ours.batched, ours.single, strict=False)]
    batched = statistics.median(many / one for many, one in pairs) if pairs and all(one for _, one in pairs) else None
    return {
        "over_fixed_length": _over(ours, fixed, _seconds, answer_lengths),
        "over_autoregressive": _over(ours, autoregressive, _seconds),
        "batch_32_over_1": batched,
        "sampler_overhead": overhead(ours.single),
        "forwards_over_fixed_length": _over(ours, fixed, _forwards, answer_lengths),
        "forwards_over_autoregressive": _over(ours, autoregressive, _forwards),
    }


def credited(contenders: Sequence[Contender], answer_lengths: Sequence[int]) -> str | None:
    """Returns what the credit of the fixed-length baseline (see `ratios`) comes to; null when it has none."""
    fixed = with_role(contenders, "fixed_length")
    if fixed is None or not fixed.single:
        return None
    own = [len(answer.tokens) for answer in fixed.single[0].answers]
    wanted = answer_lengths[: len(own)]
    if all(mine >= length for mine, length in zip(own, wanted, strict=True)):
        return None
    return (
        f"'{fixed.setting.name}' answers with {sum(own) / len(own):.1f} tokens where the references have "
        f"{sum(wanted) / len(own):.1f}: in ratios it counts as if it had given as many"
    )


def against_bars(values: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """Returns each bar with the value and whether it is reached; null when there is no value."""
    result = {}
    for name, (bar, direction) in BARS.items():
        value = values.get(name)
        passed = None if value is None else (value >= bar if direction == "at least" else value <= bar)
        result[name] = {"value": value, "bar": bar, "direction": direction, "passed": passed}
    return result


def speed(runs: Sequence[Run]) -> float:
    """Returns useful tokens per second: the median over repeats."""
    return statistics.median(run.tokens / sum(run.seconds) for run in runs)


def overhead(runs: Sequence[Run]) -> float | None:
    """Returns the share of time outside the transformers' forwards: the median over repeats."""
    return statistics.median(1 - run.forward_seconds / sum(run.seconds) for run in runs) if runs else None


def _seconds(run: Run, count: int) -> float:
    return sum(run.seconds[:count])


def _forwards(run: Run, count: int) -> float:
    return sum(answer.nfe + answer.auxiliary_nfe for answer in run.answers[:count])


def _over(
    ours: Contender,
    baseline: Contender | None,
    cost: Callable[[Run, int], float],
    credit: Sequence[int] | None = None,
) -> float | None:
    """Returns our useful tokens per cost over the baseline's: the median over rounds, each pair taken in one round."""
    if baseline is None or not ours.single or not baseline.single:
        return None
    values = []
    for mine, theirs in zip(ours.single, baseline.single, strict=False):  # an interrupted round may lack one of them
        count = min(len(mine.answers), len(theirs.answers))
        tokens = sum(len(answer.tokens) for answer in mine.answers[:count])
        lengths = [len(answer.tokens) for answer in theirs.answers[:count]]
        if credit is not None:
            lengths = [max(pair) for pair in zip(lengths, credit[:count], strict=True)]
        if not sum(lengths):
            return None
        values.append(tokens / cost(mine, count) / (sum(lengths) / cost(theirs, count)))
    return statistics.median(values)
