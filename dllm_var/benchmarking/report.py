"""Reports of a benchmark, made from its JSON alone: tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_var.benchmarking.instruments import PHASES
from dllm_var.errors import UserError

MISSING = "-"
Figures = dict[str, Any]
Column = tuple[str, str, str]  # header, path of the value in a result, format

ANSWERS: tuple[Column, ...] = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("exact", "exact_match", "{:.1%}"),
    ("ended by eos", "ended_by_eos", "{:.1%}"),
    ("early", "premature", "{:.1%}"),
    ("late", "overrun", "{:.1%}"),
    ("length error", "length_error", "{:.2f}"),
    ("hit limit", "hit_limit", "{:.1%}"),
    ("prompts", "prompts", "{:,}"),
)
SPEED: tuple[Column, ...] = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("NFE", "nfe", "{:.1f}"),
    ("tok/fwd", "tokens_per_forward", "{:.2f}"),
    ("tok/s", "single.tokens_per_second", "{:,.0f}"),
    ("ms/req", "single.ms", "{:,.1f}"),
    ("overhead", "single.sampler_overhead", "{:.0%}"),
    ("MB", "memory.single", "{:.1f}"),
    ("x AR", "over_autoregressive", "{:.2f}"),
    ("x AR fwd", "forwards_over_autoregressive", "{:.2f}"),
    ("tok/s", "batched.tokens_per_second", "{:,.0f}"),
    ("ms/req", "batched.ms", "{:,.1f}"),
    ("MB", "memory.batched", "{:.1f}"),
)
TRAINING: tuple[Column, ...] = (
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("x plain", "over_plain_loop", "{:.2f}"),
    ("MFU", "mfu", "{:.0%}"),
    ("ms/step", "ms", "{:,.0f}"),
    *((phase.replace("_", " "), f"phase_ms.{phase}", "{:,.1f}") for phase in PHASES),
    ("padding", "padding_share", "{:.0%}"),
    ("MB", "memory", "{:,.0f}"),
)
RATIOS = {
    "over_fixed_length": "useful tokens/s over fixed-length diffusion",
    "over_autoregressive": "useful tokens/s over the autoregressive twin",
    "batch_32_over_1": "batched throughput over batch 1",
    "sampler_overhead": "time outside the model's forwards",
}
FORWARD_RATIOS = {
    "forwards_over_fixed_length": "fixed-length diffusion",
    "forwards_over_autoregressive": "the autoregressive twin",
}
SAMPLERS_NOTE = (
    "The last three columns are for batches of {batch_size}, those before for batch 1. NFE: forwards per request, of "
    "all models. tok: useful tokens. MB: peak memory beyond the models. x AR: tokens/s over the autoregressive twin's; "
    "x AR fwd: the same where a forward costs the same whatever its width, which is a GPU's cost model."
)
TRAINING_NOTE = (
    "tokens/s counts tokens of samples, not padding. x plain: over the plain loop, within each round. Phases in ms per "
    "step. MFU: FLOPs the task needs (forward and backward, pairs of tokens that attend, head where a loss is, nothing "
    "recomputed) over the fastest matrix product of the same round. MB: weights, gradients, optimizer state and "
    "activations at their peak."
)


def report(title: str, result: Figures, pictures: Sequence[str] = ()) -> str:
    """Returns a benchmark's report in Markdown, with columns aligned for a terminal and links to its pictures."""
    machine = result["machine"]
    marks = [word for word in ("partial", "quick") if result.get(word)]
    lines = [
        f"# {title}",
        "",
        *([f"{' and '.join(marks)} run: not for comparison  "] if marks else []),
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, device {machine['device']}, "
        f"torch {machine['torch']}, commit {machine['commit'] or 'unknown'}, {result['date']}  ",
        f"{result['repeats']} rounds in turn, medians; {result['seconds']:.0f} s in all: `{result['command']}`",
    ]
    for task in result.get("tasks", []):
        lines += ["", *_task_lines(task)]
    for case in result.get("trainings", []):
        lines += ["", *_training_lines(case)]
    for picture in pictures:
        lines += ["", f"![accuracy and speed]({picture})"]
    return "\n".join(lines) + "\n"


def _task_lines(task: Figures) -> list[str]:
    settings = []
    for setting in task["settings"]:
        timings = {kind: dict(setting[kind]) for kind in ("single", "batched")}
        for timing in timings.values():
            if timing:
                timing["ms"] = 1000 * timing["seconds_per_request"]
        memory = {kind: _mebibytes(size) for kind, size in (setting.get("peak_memory_bytes") or {}).items()}
        settings.append({**setting, **timings, "memory": memory})
    lines = [f"## {task['name']}: {task['checkpoint']}, {task['parameters']:,} weights, {task['split']} split", ""]
    for columns in (ANSWERS, SPEED):
        lines += [*_table(columns, settings, task["chosen"]), ""]
    lines += [SAMPLERS_NOTE.format(**task), ""]
    costs = task["per_forward"]
    if costs:
        header = ["tokens of a forward", *(str(cost["width"]) for cost in costs)]
        times = ["ms", *(f"{1000 * cost['seconds']:.2f}" for cost in costs)]
        relative = ["over one token's", *(f"{cost['relative']:.2f}" for cost in costs)]
        lines += [*_aligned([header, times, relative]), ""]
    return [*lines, *(f"- {line}" for line in [*map(_curve_line, task["curves"]), *_task_findings(task)])]


def _task_findings(task: Figures) -> list[str]:
    """Returns the best setting, how it was chosen, each bar with its verdict, and the default's ratios."""
    if task["chosen"] is None:
        return ["no entry has role default: no best setting is chosen and no ratio is taken"]
    lines = [f"* {task['chosen']}: {task['rule']}."]
    if task["accuracy_over_default"] is not None and task["chosen"] != task["default"]:
        points = 100 * task["accuracy_over_default"]
        lines.append(f"its accuracy on the {task['split']} split: {points:+.1f} points against {task['default']}")
    lines += [_bar_line(RATIOS[name], bar, _ratio_format(name)) for name, bar in task["bars"].items()]
    if task["credit"]:
        lines.append(task["credit"] + ".")
    if (equal := task.get("over_autoregressive_at_equal_accuracy")) is not None:
        lines.append(f"over the autoregressive twin, the fastest setting of its accuracy: {equal:.2f}x")
    ratios, default = task["ratios"], task["default_ratios"]
    forwards = [f"{ratios[name]:.2f}x over {label}" for name, label in FORWARD_RATIOS.items() if ratios.get(name)]
    if forwards:
        lines.append(f"where a forward costs the same whatever its width: {', '.join(forwards)}")
    shown = [f"{_ratio_format(name).format(default[name])} {RATIOS[name]}" for name in RATIOS if default.get(name)]
    if shown and task["default"] != task["chosen"]:
        lines.append(f"with {task['default']}: {'; '.join(shown)}")
    return lines


def _curve_line(curve: Figures) -> str:
    if curve["aup"] is None:
        return f"{curve['name']}: not measured"
    points = [f"{p['value']}: {p['accuracy']:.1%} at {p['tokens_per_forward']:.2f}" for p in curve["points"]]
    return f"{curve['name']}: AUP {curve['aup']:.1f} (accuracy at tokens/forward: {'; '.join(points)})"


def _training_lines(case: Figures) -> list[str]:
    peak = case["gemm_peak_flops"]
    title = (
        f"## {case['name']}: {case['parameters']:,} weights, vocabulary {case['vocab_size']:,}, "
        f"{case['batch_size']} x {case['context_length']} tokens per step"
        + (f", matrix products at {peak / 1e9:,.0f} GFLOP/s" if peak else "")
    )
    contenders = [
        {
            **contender,
            "over_plain_loop": case["over_plain_loop"].get(contender["name"], {}).get("tokens_per_second"),
            "ms": 1000 * contender["step_seconds"],
            "phase_ms": {phase: 1000 * seconds for phase, seconds in contender["phase_seconds"].items()},
            "memory": _mebibytes(contender["peak_memory_bytes"]),
        }
        for contender in case["contenders"]
    ]
    lines = [title, "", *_table(TRAINING, contenders, case["ours"]), "", TRAINING_NOTE, ""]
    for name, bar in case["bars"].items():
        of = "" if name.startswith("mfu") else f" of {case['ours']} over the plain loop's"
        lines.append(f"- {_bar_line(name + of, bar, _ratio_format(name))}")
    return lines


def _table(columns: Sequence[Column], results: Sequence[Figures], best: str | None) -> list[str]:
    rows = [["", *(header for header, _, _ in columns)]]
    for result in results:
        row = [f"{result['name']} *" if result["name"] == best else result["name"]]
        for _, path, form in columns:
            value: Any = result
            for key in path.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            row.append(MISSING if value is None else form.format(value))
        rows.append(row)
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table whose columns are as wide as their widest cells; the first row is its header."""
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([name.ljust(widths[0]), *numbers])} |")
    rule = f"|{'-' * (widths[0] + 2)}|{''.join('-' * (width + 1) + ':|' for width in widths[1:])}"
    return [lines[0], rule, *lines[1:]]


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _ratio_format(name: str) -> str:
    return "{:.0%}" if name.startswith(("mfu", "sampler_overhead")) else "{:.2f}x"


def _bar_line(label: str, bar: Figures, form: str) -> str:
    if bar["passed"] is None:
        verdict = "not measured" if bar["value"] is None else "not judged"
    else:
        verdict = "pass" if bar["passed"] else "FAIL"
    value = MISSING if bar["value"] is None else form.format(bar["value"])
    return f"{label}: {value} ({'>=' if bar['direction'] == 'at least' else '<='} {form.format(bar['bar'])}: {verdict})"


def plot_task(task: Figures, path: Path) -> None:
    """Draws a task's accuracy against parallelism and against speed, and the cost of a forward, into a PNG file.

    Raises:
        UserError: When matplotlib, an optional extra, is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('plots need matplotlib: pip install "dllm-var[plots]"') from error
    costs = task["per_forward"]
    panels = 3 if costs else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_accuracy(axes[0], task, "tokens_per_forward", "tokens per forward")
    _draw_accuracy(axes[1], task, "tokens_per_second", "useful tokens/s, batch 1")
    if costs:
        widths = [cost["width"] for cost in costs]
        axes[2].plot(widths, [1000 * cost["seconds"] for cost in costs], marker="o", markersize=4, color="black")
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks(widths, [str(width) for width in widths], fontsize=7)
        axes[2].set_ylim(bottom=0)
        axes[2].set_xlabel("tokens of a forward (64 cached before them)")
        axes[2].set_ylabel("ms per forward, batch 1")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{task['name']}, {task['split']} split")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _draw_accuracy(axis: Any, task: Figures, speed: str, label: str) -> None:
    on_a_curve = {point["setting"] for curve in task["curves"] for point in curve["points"]}
    for curve in task["curves"]:
        points = [(point[speed], 100 * point["accuracy"]) for point in curve["points"] if point[speed] is not None]
        name = curve["name"] if curve["aup"] is None else f"{curve['name']} (AUP {curve['aup']:.0f})"
        axis.plot(*zip(*sorted(points), strict=True) if points else ([], []), marker="o", markersize=4, label=name)
    scored = [setting for setting in task["settings"] if "accuracy" in setting]
    accuracies = [100 * setting["accuracy"] for setting in scored]
    # The axis begins a little below the worst accuracy that is at least half of the best.
    bottom = max(0.0, min((y for y in accuracies if y >= max(accuracies) / 2), default=0.0) - 3)
    for number, setting in enumerate(s for s in scored if s["name"] not in on_a_curve):
        x = setting["single"].get(speed) if speed == "tokens_per_second" else setting[speed]
        y, name = 100 * setting["accuracy"], setting["name"]
        if y < bottom:  # drawn at the edge: it would flatten all the others
            y, name = bottom, f"{name} ({y:.0f} %)"
        size = 60 if setting["name"] == task["chosen"] else 28
        axis.scatter([x or 0], [y], marker="sDv^<>PXp*hd"[number % 12], s=size, label=name, clip_on=False)
    axis.set_ylim(bottom=bottom)
    axis.set_xlabel(label)
    axis.set_ylabel("accuracy (%)")
