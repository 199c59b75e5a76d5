"""The plot of a benchmark's task, made from its JSON alone: every setting's accuracy against its speed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from statistics import median
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt

from dllm_var.benchmarking.results import EQUAL

Figures = dict[str, Any]

PANELS = {  # a figure of a setting, what its axis is called, and the ratio to the twin that belongs to it
    "tokens_per_second": ("useful tokens/s at batch 1", "over_autoregressive"),
    "tokens_per_forward": ("useful tokens per forward", "forwards_over_autoregressive"),
}
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
MARKERS = "osDv^Pph"  # one for each checkpoint
POINT: Figures = dict(facecolor="white", edgecolor="0.2", zorder=3, s=30)
RING: Figures = dict(facecolor="none", edgecolor="black", zorder=3, s=130)
TWIN_COLOUR = "crimson"
FONT_SIZE = 8.5
RADII = (0, 4, 9, 15, 23, 33, 45, 60, 76, 95, 120, 150)  # tried distances of a label from its point, in pixels
DIRECTIONS = np.array([(math.cos(angle), math.sin(angle)) for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False)])
LEADER: Figures = dict(arrowstyle="-", linewidth=0.6, color="0.4", shrinkA=0, shrinkB=3)  # from a label to its point
Array = npt.NDArray[np.float64]


@dataclass
class Label:
    """A text that belongs to a point of the plot."""

    text: str
    x: float
    y: float
    colour: str = "0.2"
    bold: bool = False
    radius: int = 5  # of the point's marker, in pixels


def draw_task(task: Figures) -> Any:
    """Returns a matplotlib figure of a task's accuracy against speed and against parallelism."""
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(9, 10.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, 1)
    labels = [_draw(axis, task, speed) for axis, speed in zip(panels, PANELS, strict=True)]
    figure.suptitle(f"{task['name']}, {task['split']} split")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    scored = [setting for setting in task["settings"] if "accuracy" in setting]
    low = [f"{one['name']} ({one['accuracy']:.0%})" for one in scored if 100 * one["accuracy"] < _limits(scored)[0]]
    if low:
        panels[0].set_title(fill(f"below the axis: {'; '.join(low)}", 115), fontsize=FONT_SIZE)
    figure.draw_without_rendering()  # from here on the layout is final: labels are placed in pixels
    figure.set_layout_engine("none")
    for axis, its_labels in zip(panels, labels, strict=True):
        _place(axis, its_labels)
    return figure


def _draw(axis: Any, task: Figures, speed: str) -> list[Label]:
    """Draws the curves and points of a panel; returns its labels, the most important ones first."""
    label, ratio = PANELS[speed]
    scored = [setting for setting in task["settings"] if "accuracy" in setting]
    bottom, top = _limits(scored)
    axis.set(ylim=(bottom, top), xlabel=label, ylabel="accuracy (%)")
    axis.set_xscale("log", subs=(1.5, 2, 3, 4, 5, 7))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.25, which="both")
    speeds = {one["name"]: one["single"].get(speed) if speed == "tokens_per_second" else one[speed] for one in scored}
    shown = [one for one in scored if speeds[one["name"]] and 100 * one["accuracy"] >= bottom]
    if shown:
        slowest, fastest = (end(speeds[one["name"]] for one in shown) for end in (min, max))
        room = 1.1 * (fastest / slowest) ** 0.1
        axis.set_xlim(slowest / room, fastest * room)

    important, labels = list[Label](), list[Label]()
    colours = {}  # of the settings that are points of a curve
    for curve, colour in zip(task["curves"], cycle(COLOURS), strict=False):
        colours.update({point["setting"]: colour for point in curve["points"]})
        points = [(p[speed], 100 * p["accuracy"], str(p["value"])) for p in curve["points"] if p[speed]]
        name = curve["name"] if curve["aup"] is None else f"{curve['name']} (AUP {curve['aup']:.0f})"
        axis.plot([x for x, *_ in points], [y for _, y, _ in points], ".-", color=colour, label=name)
        labels += [Label(value, x, y, colour) for x, y, value in (points[:1] + points[1:][-1:]) if y >= bottom]

    markers: dict[str, str] = {}  # of the checkpoints
    equal = task.get("at_equal_accuracy", {}).get(ratio)
    for setting in shown:
        name, x, y = setting["name"], speeds[setting["name"]], 100 * setting["accuracy"]
        if setting["role"] == "autoregressive":
            axis.scatter([x], [y], marker="*", s=300, color=TWIN_COLOUR, zorder=4, label=f"{name} (the twin)")
            axis.axhline(y, color=TWIN_COLOUR, linestyle="--", linewidth=1, label="its accuracy, and half a point less")
            axis.axhspan(y - 100 * EQUAL, y, color=TWIN_COLOUR, alpha=0.1, linewidth=0)
            axis.axvline(x, color=TWIN_COLOUR, linestyle=":", linewidth=1, label="its speed")
            important.append(Label(name, x, y, TWIN_COLOUR, True, 12))
            continue
        if name not in colours:
            marker = markers.setdefault(setting["checkpoint"], MARKERS[len(markers) % len(MARKERS)])
            axis.scatter([x], [y], marker=marker, **POINT)
        text = f"{name} *" if name == task["chosen"] else name
        if name == equal:
            text = f"{text} ({task[f'{ratio}_at_equal_accuracy']:.2f}x)"
        if name in (equal, task["chosen"]):
            axis.scatter([x], [y], **RING)
            important.append(Label(text, x, y, colours.get(name, "black"), True, 10))
        elif name not in colours or name == task["default"]:
            labels.append(Label(text, x, y, colours.get(name, "0.2")))
    for checkpoint, marker in markers.items():
        axis.scatter([], [], marker=marker, **POINT, label=f"model: {checkpoint}")
    if task["chosen"] is not None:
        axis.scatter([], [], **RING, label="best setting *, and best at the twin's accuracy")
    return important + labels


def _limits(scored: Sequence[Figures]) -> tuple[float, float]:
    """Returns the ends of the accuracy axis in per cent; it leaves out what lies far below most settings."""
    accuracies = [100 * setting["accuracy"] for setting in scored]
    if not accuracies:
        return 0, 100
    best, middle = max(accuracies), median(accuracies)
    lowest = min(y for y in accuracies if y >= middle - 2 * (best - middle) - 1)
    room = max(0.12 * (best - lowest), 0.5)
    return max(lowest - room, 0), best + room


def _place(axis: Any, labels: Sequence[Label]) -> None:
    """Writes labels beside their points, each where it hides as little as possible, with a line to its point."""
    left, bottom, right, top = axis.get_window_extent().extents
    lines = [line.get_transform().transform(line.get_xydata()) for line in axis.get_lines() if len(line.get_xydata())]
    points = [axis.transData.transform(each.get_offsets()) for each in axis.collections if len(each.get_offsets())]
    markers = np.concatenate([np.empty((0, 2)), *points])
    drawn = np.concatenate([np.empty((0, 2)), *(_between(a, b) for line in lines for a, b in pairwise(line))])
    placed = np.empty((0, 4))  # the labels written so far: left, bottom, right, top
    for label in labels:
        point = axis.transData.transform((label.x, label.y))
        style: Figures = dict(fontsize=FONT_SIZE, color=label.colour, weight="bold" if label.bold else "normal")
        text = axis.annotate(label.text, point, xycoords="figure pixels", ha="center", va="center", zorder=5, **style)
        half = np.array([text.get_window_extent().width, text.get_window_extent().height]) / 2 + (3, 1)
        centres = point + np.concatenate([(label.radius + radius + half) * DIRECTIONS for radius in RADII])
        boxes = np.concatenate([centres - half, centres + half], axis=1)
        outside = (boxes[:, :2] < (left, bottom)).any(1) | (boxes[:, 2:] > (right, top)).any(1)
        on_labels = ((boxes[:, None, :2] < placed[:, 2:]) & (boxes[:, None, 2:] > placed[:, :2])).all(2).sum(1)
        on_markers = _inside(markers, boxes[:, None]).sum(1)
        near_markers = _inside(markers, boxes[:, None] + (-8, -6, 8, 6)).sum(1)
        on_lines = _inside(drawn, boxes[:, None]).sum(1)
        ends = np.clip(point, boxes[:, :2], boxes[:, 2:])  # of the leaders, the lines from the labels to their point
        leaders = point + (ends - point)[:, None] * np.linspace(0.1, 1, 12)[:, None]
        crossed = _inside(leaders[:, :, None], placed).any(1).sum(1)
        hidden = 1e4 * outside + 300 * on_labels + 80 * crossed + 40 * on_markers + 8 * near_markers + 4 * on_lines
        best = int((np.repeat(RADII, len(DIRECTIONS)) + hidden).argmin())
        text.set_position(centres[best])
        if near_markers[best] > 1 or np.linalg.norm(ends[best] - point) > label.radius + RADII[1]:
            axis.annotate("", ends[best], point, xycoords="figure pixels", arrowprops=LEADER)
            drawn = np.concatenate([drawn, leaders[best]])
        placed = np.concatenate([placed, boxes[best][None]])


def _between(start: Array, end: Array) -> Array:
    """Returns points [N, 2] on a line, about six pixels apart."""
    count = int(np.linalg.norm(end - start) / 6) + 2
    return start + (end - start) * np.linspace(0, 1, count)[:, None]


def _inside(points: Array, boxes: Array) -> Any:
    """Returns whether points [..., 2] lie in boxes [..., 4], which are broadcast against each other."""
    return ((points > boxes[..., :2]) & (points < boxes[..., 2:])).all(-1)
