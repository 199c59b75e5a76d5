"""The picture of a benchmark's task, made from its JSON alone: every setting's accuracy over its speed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt

from dllm_var.benchmarking.results import EQUAL

Figures = dict[str, Any]

TWIN_COLOUR = "crimson"  # of all that its model decodes
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:cyan")  # of the other models
OTHERS = "0.5"  # of models for which no colour is left
FONT_SIZE = 9.5
ALL_NAMED = 8  # settings up to which each is named
STEP = 1.1  # times the speed of the last named setting of the frontier that the next one has at least
RADII = (0, 4, 9, 15, 23, 33, 45, 60, 76, 95, 120, 150)  # tried distances of a label from its point, in pixels
DIRECTIONS = np.array([(math.cos(angle), math.sin(angle)) for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False)])
LEADER: Figures = dict(arrowstyle="-", linewidth=0.6, color="0.4", shrinkA=0, shrinkB=3)  # from a label to its point
Array = npt.NDArray[np.float64]


@dataclass
class Label:
    """A text that belongs to a point of the picture."""

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False
    radius: int = 8  # of the point's marker, in pixels


def draw_task(task: Figures) -> Any:
    """Returns a matplotlib figure of a task: a point for each timed setting, names for those that matter."""
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    figure.suptitle(f"{task['name']}: accuracy over speed, {task['split']} split")
    axis.set(xlabel="useful tokens/s at batch 1 (equal distances are equal ratios)", ylabel="accuracy (%)")
    timed = [one for one in task["settings"] if "accuracy" in one and one["single"].get("tokens_per_second")]
    if timed:
        labels = _draw(axis, task, timed)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        figure.draw_without_rendering()  # from here on the layout is final: labels are placed in pixels
        figure.set_layout_engine("none")
        _place(axis, labels)
    return figure


def frontier(settings: Sequence[Figures]) -> list[Figures]:
    """Returns the settings for which no other is both faster and at least as accurate, from the slowest."""
    found: list[Figures] = []
    for one in sorted(settings, key=lambda one: (-one["single"]["tokens_per_second"], -one["accuracy"])):
        if not found or one["accuracy"] > found[-1]["accuracy"]:
            found.append(one)
    return found[::-1]


def named(task: Figures, timed: Sequence[Figures]) -> set[str]:
    """Returns the settings whose names the picture shows: baselines, best ones, and the frontier in steps."""
    if len(timed) <= ALL_NAMED:
        return {one["name"] for one in timed}
    shown = {task["chosen"], task["default"], task.get("at_equal_accuracy", {}).get("over_autoregressive")}
    shown |= {one["name"] for one in timed if one["role"] in ("autoregressive", "fixed_length")}
    last = 0.0
    for one in frontier(timed):
        if one["single"]["tokens_per_second"] >= STEP * last:
            last = one["single"]["tokens_per_second"]
            shown.add(one["name"])
    return shown


def _draw(axis: Any, task: Figures, timed: Sequence[Figures]) -> list[Label]:
    """Draws the points; returns the labels of those that are named."""
    place = {one["name"]: (one["single"]["tokens_per_second"], 100 * one["accuracy"]) for one in timed}
    axis.set_xscale("log", subs=(1.5, 2, 3, 4, 5, 7))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.2, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    models = dict.fromkeys(one["checkpoint"] for one in timed if one["checkpoint"] != "autoregressive")
    colours = dict(zip(models, [*COLOURS, *[OTHERS] * len(models)], strict=False)) | {"autoregressive": TWIN_COLOUR}
    best = [place[one["name"]] for one in frontier(timed)]
    axis.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=1, label="no other is faster and as accurate")
    equal, shown = task.get("at_equal_accuracy", {}).get("over_autoregressive"), named(task, timed)
    labels: list[Label] = []
    for one in timed:
        name, colour = one["name"], colours[one["checkpoint"]]
        x, y = place[name]
        if one["role"] == "autoregressive":
            axis.scatter([x], [y], marker="*", s=300, color=colour, zorder=4, label=f"{name}: the twin")
            band: Figures = dict(color=colour, alpha=0.12, linewidth=0)
            axis.axhspan(y - 100 * EQUAL, y, **band, label="as accurate as the twin: half a point less at most")
            axis.axvline(x, color=colour, linestyle=":", linewidth=1)
            labels.insert(0, Label(f"{name} (the twin)", x, y, colour, bold=True, radius=14))
        elif name in shown:
            axis.scatter([x], [y], s=45, color=colour, zorder=3)
            gain = f": {task['over_autoregressive_at_equal_accuracy']:.1f}x the twin" if name == equal else ""
            labels.append(Label(name + gain, x, y, colour, bold=bool(gain)))
        else:
            axis.scatter([x], [y], s=18, color=colour, alpha=0.35, linewidth=0, zorder=2)
    paths = {"diffusion": task["checkpoint"], "autoregressive": task["autoregressive_checkpoint"]}
    for model, colour in colours.items():
        if any(one["checkpoint"] == model and one["role"] != "autoregressive" for one in timed):
            axis.scatter([], [], s=45, color=colour, label=f"model {Path(paths.get(model) or model).name}")
    if not shown.issuperset(place):
        axis.scatter([], [], s=18, color="0.5", alpha=0.5, label="small: other settings, named in the tables")
    _limit(axis, place, shown)
    return labels


def _limit(axis: Any, place: dict[str, tuple[float, float]], shown: Iterable[str]) -> None:
    """Sets the accuracy axis to the named settings; the title names what lies below it."""
    accuracies = [y for name, (_, y) in place.items() if name in shown]
    room = max(0.12 * (max(accuracies) - min(accuracies)), 1)
    bottom = min(accuracies) - room
    axis.set_ylim(bottom, max(max(y for _, y in place.values()), max(accuracies)) + room)
    slowest, fastest = (end(x for x, _ in place.values()) for end in (min, max))
    margin = 1.1 * (fastest / slowest) ** 0.08
    axis.set_xlim(slowest / margin, fastest * margin)
    if below := [f"{name} ({y:.0f}%)" for name, (_, y) in place.items() if y < bottom]:
        axis.set_title(fill(f"below the picture: {'; '.join(below)}", 115), fontsize=FONT_SIZE)


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
