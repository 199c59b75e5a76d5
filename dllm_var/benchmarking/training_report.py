"""The result of a training benchmark as people read it; made from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dllm_var.benchmarking.report import MISSING, draw, headline
from dllm_var.benchmarking.training_clock import PHASES

Case = dict[str, Any]

HEADERS = ("tokens/s", "x plain", "MFU", "ms/step", *(f"{name.replace('_', ' ')}" for name in PHASES), "padding", "MB")
NOTE = (
    "tokens/s counts tokens of samples, not padding. x plain: over the plain loop, within each round. Phases in ms per "
    "step. MFU: FLOPs the task needs (forward and backward, pairs of tokens that attend, head where a loss is, nothing "
    "recomputed) over the fastest matrix product of the same round. MB: weights, gradients, optimizer state and "
    "activations at their peak."
)


def cells(case: Case, contender: dict[str, Any]) -> list[str]:
    """Returns a contender's row of the table, `-` for what was not measured."""
    ratio = case["over_plain_loop"].get(contender["name"], {}).get("tokens_per_second")
    memory = contender["peak_memory_bytes"]
    values: list[tuple[float | None, str]] = [
        (contender["tokens_per_second"], "{:,.0f}"),
        (ratio, "{:.2f}"),
        (contender["mfu"], "{:.0%}"),
        (1000 * contender["step_seconds"], "{:,.0f}"),
        *((1000 * contender["phase_seconds"][phase], "{:,.1f}") for phase in PHASES),
        (contender["padding_share"], "{:.0%}"),
        (None if memory is None else memory / 2**20, "{:,.0f}"),
    ]
    return [MISSING if value is None else form.format(value) for value, form in values]


def title(case: Case) -> str:
    """Returns what was trained, in a line."""
    peak = case["gemm_peak_flops"]
    return (
        f"{case['name']}: {case['parameters']:,} weights, vocabulary {case['vocab_size']:,}, "
        f"{case['batch_size']} x {case['context_length']} tokens per step"
        + (f", matrix products at {peak / 1e9:,.0f} GFLOP/s" if peak else "")
    )


def bar_lines(case: Case) -> list[str]:
    """Returns each bar with pass or fail."""
    lines = []
    for name, bar in case["bars"].items():
        verdict = {True: "pass", False: "FAIL", None: "not judged"}[bar["passed"]]
        form: Callable[[float], str] = "{:.0%}".format if name.startswith("mfu") else "{:.2f}x".format
        value = MISSING if bar["value"] is None else form(bar["value"])
        sign = ">=" if bar["direction"] == "at least" else "<="
        who = "" if name.startswith("mfu") else f" of {case['ours']} over the plain loop's"
        lines.append(f"{name}{who}: {value} ({sign} {form(bar['bar'])}: {verdict})")
    return lines


def text_report(result: dict[str, Any]) -> str:
    """Returns the tables as plain text, coloured and as wide as the terminal if stdout is one."""
    parts: list[RenderableType] = [Text(line, style="dim") for line in headline(result)]
    for case in result["trainings"]:
        parts.append(Text(f"\n{title(case)}", style="bold"))
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for header in HEADERS:
            table.add_column(header, justify="right", header_style="dim")
        for contender in case["contenders"]:
            style = "bold" if contender["name"] == case["ours"] else ""
            table.add_row(contender["name"], *cells(case, contender), style=style)
        parts.append(table)
        for line in bar_lines(case):
            style = "green" if line.endswith(": pass)") else "bold red" if line.endswith(": FAIL)") else ""
            parts.append(Text(line, style=style))
    return draw([*parts, Text(""), Text(NOTE, style="dim")])


def markdown_report(result: dict[str, Any]) -> str:
    """Returns the tables in Markdown."""
    lines = ["# Training measured", "", *(f"{line}  " for line in headline(result))]
    for case in result["trainings"]:
        lines += ["", f"## {title(case)}", "", f"| | {' | '.join(HEADERS)} |", f"|---|{'--:|' * len(HEADERS)}"]
        for contender in case["contenders"]:
            name = f"**{contender['name']}**" if contender["name"] == case["ours"] else contender["name"]
            lines.append(f"| {name} | {' | '.join(cells(case, contender))} |")
        lines += ["", *(f"- {line}" for line in bar_lines(case))]
    return "\n".join([*lines, "", NOTE, ""])
