"""Curves of accuracy against parallelism and speed, and what a forward costs. Needs matplotlib, an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_var.errors import UserError


def plot_task(task: dict[str, Any], path: Path) -> None:
    """Draws one task into a PNG file.

    Args:
        task: Its part of the result.
        path: The file.

    Raises:
        UserError: When matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('plots need matplotlib: pip install "dllm-var[plots]"') from error

    panels = ["tokens_per_forward", "tokens_per_second", *(["per_forward"] if task["per_forward"] else [])]
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        if panel == "per_forward":
            _draw_cost(axis, task)
        else:
            _draw_accuracy(axis, task, panel)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{task['name']}, {task['split']} split")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _draw_accuracy(axis: Any, task: dict[str, Any], speed: str) -> None:
    on_a_curve: set[str] = set()
    for curve in task["curves"]:
        points = [(point[speed], 100 * point["accuracy"]) for point in curve["points"] if point[speed] is not None]
        on_a_curve.update(point["setting"] for point in curve["points"])
        label = f"{curve['name']} (AUP {curve['aup']:.0f})" if curve["aup"] is not None else curve["name"]
        axis.plot(*zip(*sorted(points), strict=True) if points else ([], []), marker="o", markersize=4, label=label)
    markers = "sDv^<>PXp*hd"
    scored = [setting for setting in task["settings"] if "accuracy" in setting]
    bottom = _lowest_shown([100 * setting["accuracy"] for setting in scored])
    others = [setting for setting in scored if setting["name"] not in on_a_curve]
    for number, setting in enumerate(others):
        x = setting["single"].get(speed) if speed == "tokens_per_second" else setting[speed]
        y, label = 100 * setting["accuracy"], setting["name"]
        if y < bottom:  # at the edge, so that it does not flatten all the others
            y, label = bottom, f"{label} ({y:.0f} %)"
        marker = markers[number % len(markers)]
        size = 60 if setting["name"] == task["chosen"] else 28
        axis.scatter([x or 0], [y], marker=marker, s=size, label=label, clip_on=False)
    axis.set_ylim(bottom=bottom)
    axis.set_xlabel("tokens per forward" if speed == "tokens_per_forward" else "useful tokens/s, batch 1")
    axis.set_ylabel("accuracy (%)")


def _lowest_shown(accuracies: list[float]) -> float:
    """Returns where the axis begins: a little below the worst accuracy that is at least half of the best."""
    best = max(accuracies, default=0.0)
    return max(0.0, min((y for y in accuracies if y >= best / 2), default=0.0) - 3)


def _draw_cost(axis: Any, task: dict[str, Any]) -> None:
    costs = task["per_forward"]
    widths = [cost["width"] for cost in costs]
    axis.plot(widths, [1000 * cost["seconds"] for cost in costs], marker="o", markersize=4, color="black")
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths], fontsize=7)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens of a forward (64 cached before them)")
    axis.set_ylabel("ms per forward, batch 1")
