"""The result of a benchmark as people read it: tables for the terminal and in Markdown. Made from the JSON alone."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 130
MISSING = "-"

Column = tuple[str, Callable[[dict[str, Any]], Any], str]  # header, value in a setting's result, format


def _in(*path: str) -> Callable[[dict[str, Any]], Any]:
    def look(result: dict[str, Any]) -> Any:
        node: Any = result
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    return look


ANSWERS: tuple[Column, ...] = (
    ("accuracy", _in("accuracy"), "{:.1%}"),
    ("exact", _in("exact_match"), "{:.1%}"),
    ("ended by eos", _in("ended_by_eos"), "{:.1%}"),
    ("early", _in("premature"), "{:.1%}"),
    ("late", _in("overrun"), "{:.1%}"),
    ("length error", _in("length_error"), "{:.2f}"),
    ("hit limit", _in("hit_limit"), "{:.1%}"),
    ("prompts", _in("prompts"), "{:,}"),
)
SPEED: tuple[Column, ...] = (
    ("accuracy", _in("accuracy"), "{:.1%}"),
    ("NFE", _in("nfe"), "{:.1f}"),
    ("tok/fwd", _in("tokens_per_forward"), "{:.2f}"),
    ("tok/s", _in("single", "tokens_per_second"), "{:,.0f}"),
    ("ms/req", _in("ms_single"), "{:,.1f}"),
    ("overhead", _in("single", "sampler_overhead"), "{:.0%}"),
    ("MB", _in("memory_single"), "{:.1f}"),
    ("x AR", _in("over_autoregressive"), "{:.2f}"),
    ("x AR fwd", _in("forwards_over_autoregressive"), "{:.2f}"),
    ("tok/s", _in("batched", "tokens_per_second"), "{:,.0f}"),
    ("ms/req", _in("ms_batched"), "{:,.1f}"),
    ("MB", _in("memory_batched"), "{:.1f}"),
)
BAR_LABELS = {
    "over_fixed_length": "useful tokens/s over fixed-length diffusion",
    "over_autoregressive": "useful tokens/s over the autoregressive twin",
    "batch_32_over_1": "batched throughput over batch 1",
    "sampler_overhead": "time outside the model's forwards",
}
NOTE = (
    "The last three columns are for batches of {batch_size}, those before for batch 1. NFE: forwards per request, of "
    "all models. tok: useful tokens. MB: peak memory beyond the models. x AR: tokens/s over the autoregressive twin's; "
    "x AR fwd: the same where a forward costs the same whatever its width, which is a GPU's cost model."
)


def cells(columns: Sequence[Column], setting: dict[str, Any]) -> list[str]:
    """Returns a setting's row of a table, `-` for what was not measured."""
    memory = setting.get("peak_memory_bytes") or {}
    setting = {**setting, **{f"memory_{kind}": None if n is None else n / 2**20 for kind, n in memory.items()}}
    for kind in ("single", "batched"):
        if setting[kind]:
            setting[f"ms_{kind}"] = 1000 * setting[kind]["seconds_per_request"]
    values = [(value(setting), form) for _, value, form in columns]
    return [MISSING if value is None else form.format(value) for value, form in values]


def headline(result: dict[str, Any]) -> list[str]:
    """Returns where, when and how the figures were taken."""
    machine = result["machine"]
    marks = [word for word in ("partial", "quick") if result.get(word)]
    return [
        *([f"{' and '.join(marks)} run: not for comparison"] if marks else []),
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, device {machine['device']}, "
        f"torch {machine['torch']}, commit {machine['commit'] or 'unknown'}, {result['date']}",
        f"{result['repeats']} rounds in turn, medians; {result['seconds']:.0f} s in all: {result['command']}",
    ]


def footer(task: dict[str, Any]) -> list[str]:
    """Returns which setting is the best, how it was chosen, and each bar with pass or fail."""
    if task["chosen"] is None:
        return ["no entry has role default: no best setting is chosen and no ratio is taken"]
    lines = [f"* {task['chosen']}: {task['rule']}."]
    if task["accuracy_over_default"] is not None and task["chosen"] != task["default"]:
        points = 100 * task["accuracy_over_default"]
        lines.append(f"its accuracy on the {task['split']} split: {points:+.1f} points against {task['default']}")
    for name, bar in task["bars"].items():
        sign = ">=" if bar["direction"] == "at least" else "<="
        value, wanted = (_bar_value(name, number) for number in (bar["value"], bar["bar"]))
        verdict = {True: "pass", False: "FAIL", None: "not measured"}[bar["passed"]]
        lines.append(f"{BAR_LABELS[name]}: {value} ({sign} {wanted}: {verdict})")
    if task["credit"]:
        lines.append(task["credit"] + ".")
    forwards = [(label, task["ratios"].get(f"forwards_over_{name}")) for name, label in BASELINES.items()]
    model = [f"{value:.2f}x over {label}" for label, value in forwards if value is not None]
    if model:
        lines.append(f"where a forward costs the same whatever its width: {', '.join(model)}")
    default = task["default_ratios"]
    shown = [f"{_bar_value(name, default[name])} {BAR_LABELS[name]}" for name in BAR_LABELS if default.get(name)]
    if shown and task["default"] != task["chosen"]:
        lines.append(f"with {task['default']}: {'; '.join(shown)}")
    return lines


BASELINES = {"fixed_length": "fixed-length diffusion", "autoregressive": "the autoregressive twin"}


def _bar_value(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.0%}" if name == "sampler_overhead" else f"{value:.2f}x"


def curve_line(curve: dict[str, Any]) -> str:
    """Returns a sweep in one line: its area and its points."""
    if curve["aup"] is None:
        return f"{curve['name']}: not measured"
    points = [f"{p['value']}: {p['accuracy']:.1%} at {p['tokens_per_forward']:.2f}" for p in curve["points"]]
    return f"{curve['name']}: AUP {curve['aup']:.1f} (accuracy at tokens/forward: {'; '.join(points)})"


def forward_cells(task: dict[str, Any]) -> list[list[str]]:
    """Returns the cost of a forward by width, as the rows of a small table."""
    costs = task["per_forward"]
    return [
        ["tokens of a forward", *(str(cost["width"]) for cost in costs)],
        ["ms", *(f"{1000 * cost['seconds']:.2f}" for cost in costs)],
        ["over one token's", *(f"{cost['relative']:.2f}" for cost in costs)],
    ]


def _mark(task: dict[str, Any], setting: dict[str, Any]) -> str:
    return f"{setting['name']} *" if setting["name"] == task["chosen"] else setting["name"]


def text_report(result: dict[str, Any]) -> str:
    """Returns the tables as plain text, coloured and as wide as the terminal if stdout is one."""
    parts: list[RenderableType] = [Text(line, style="dim") for line in headline(result)]
    for task in result["tasks"]:
        title = f"\n{task['name']}: {task['checkpoint']}, {task['parameters']:,} weights, {task['split']} split"
        parts.append(Text(title, style="bold"))
        for columns in (ANSWERS, SPEED):
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
            table.add_column("", no_wrap=True)
            for header, _, _ in columns:
                table.add_column(header, justify="right", header_style="dim")
            for setting in task["settings"]:
                style = "bold" if setting["name"] == task["chosen"] else ""
                table.add_row(_mark(task, setting), *cells(columns, setting), style=style)
            parts.append(table)
        parts.append(Text(NOTE.format(**task), style="dim"))
        parts += [Text(line) for line in ["", *map(curve_line, task["curves"]), ""]]
        if task["per_forward"]:
            table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
            for row in forward_cells(task):
                table.add_row(*row)
            parts += [table, Text("")]
        for line in footer(task):
            style = "green" if line.endswith(": pass)") else "bold red" if line.endswith(": FAIL)") else ""
            parts.append(Text(line, style=style))
    return draw(parts)


def draw(parts: Sequence[RenderableType]) -> str:
    """Renders what rich can draw to a string, coloured only if stdout is a terminal."""
    colour = sys.stdout.isatty()
    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if colour else PLAIN_WIDTH
    console = Console(file=io.StringIO(), force_terminal=colour, width=width, legacy_windows=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def markdown_report(result: dict[str, Any], plots: dict[str, str]) -> str:
    """Returns the same tables in Markdown.

    Args:
        result: What the JSON file holds.
        plots: File name of each task's plot, where there is one.
    """
    lines = ["# Samplers side by side", "", *(f"{_escape(line)}  " for line in headline(result))]
    for task in result["tasks"]:
        lines += ["", f"## {task['name']}", ""]
        lines += [f"`{task['checkpoint']}`, {task['parameters']:,} weights, {task['split']} split.", ""]
        for columns in (ANSWERS, SPEED):
            lines += ["| " + " | ".join(["", *(header for header, _, _ in columns)]) + " |"]
            lines += ["|---|" + "--:|" * len(columns)]
            for setting in task["settings"]:
                lines.append("| " + " | ".join([_escape(_mark(task, setting)), *cells(columns, setting)]) + " |")
            lines.append("")
        lines += [NOTE.format(**task), "", *(f"- {_escape(line)}" for line in footer(task))]
        if task["curves"]:
            lines += ["", *(f"- {_escape(curve_line(curve))}" for curve in task["curves"])]
        if task["per_forward"]:
            head, *rows = forward_cells(task)
            lines += ["", "| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
        if task["name"] in plots:
            lines += ["", f"![accuracy and speed of {task['name']}]({plots[task['name']]})"]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    for character in "\\`*_<>|":
        text = text.replace(character, "\\" + character)
    return text
