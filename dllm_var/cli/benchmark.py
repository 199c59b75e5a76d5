"""Measures what a config lists, side by side on one machine, and writes tables, JSON and plots."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_var.benchmarking.measure import Effort, TaskRun
from dllm_var.benchmarking.plots import plot_task
from dllm_var.benchmarking.report import markdown_report, text_report
from dllm_var.benchmarking.results import task_result
from dllm_var.benchmarking.settings import Entry, Sweep, Task, check_names, read_task
from dllm_var.cli import measuring
from dllm_var.cli.settings import SettingsParser, config_files, read_settings
from dllm_var.errors import UserError
from dllm_var.files import write_text

DESCRIPTION = """Measures what a config lists, side by side on one machine: a config with `tasks` compares samplers, one
with `trainings` (benchmarks/training.yaml) ways to train.

Writes FILE.json (--output) with every figure, FILE.md with the tables and, with matplotlib, a PNG file per task. Ctrl-C
and SIGTERM write what has been measured so far.
"""
KINDS = ("tasks", "trainings")  # the key that says what a config measures
QUICK: dict[str, Any] = dict(prompts=4, selection_prompts=4, single_prompts=1, batched_prompts=4, batch_size=4)


def main(command: str, arguments: list[str]) -> int:
    """Runs `benchmark` and returns its exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        command: `benchmark`.
        arguments: Its options, as `--help` lists them.

    Raises:
        UserError: For a bad config, checkpoint or output file.
    """
    if kind_of(arguments) == "trainings":
        from dllm_var.cli import benchmark_training

        return benchmark_training.main(command, arguments)
    options = build_parser(command).parse_args(arguments)
    check_kind(options.config)
    output = measuring.check_output(options.output)
    tasks: list[Task] = chosen_tasks(options)
    device = measuring.prepare_device(options.threads)
    effort = Effort(repeats=1, limit=8, widths=(1, 8, 32)) if options.quick else Effort(repeats=options.repeats)
    progress = measuring.Progress()
    runs = [TaskRun(task, effort, device, progress.show) for task in tasks]
    result, status = measuring.measure("samplers", runs, effort.repeats, options.quick, device, progress)
    result["tasks"] = [task_result(run) for run in runs if run.seconds]
    result["ratios"] = top_ratios(result["tasks"])
    write(result, output)
    print(text_report(result))
    measuring.say(f"wrote {output} and {output.with_suffix('.md')}")
    return status


def build_parser(command: str) -> SettingsParser:
    """Returns the parser of the options.

    Args:
        command: Name to show.
    """
    parser = SettingsParser(prog=f"python -m dllm_var {command}", description=DESCRIPTION)
    parser.usage = f"python -m dllm_var {command} --config benchmarks/samplers.yaml --output FILE.json [options]"
    parser.add_argument("--config", action="config", help="YAML file that lists what to measure; it has its comments")
    parser.add_argument("--tasks", type=list[Task], default=[], help="what to measure")
    measuring.add_options(parser)
    return parser


def kind_of(arguments: Sequence[str]) -> str | None:
    """Returns the first of `KINDS` that a config among the arguments has, None when none has one."""
    keys = {key for path in config_files(arguments) for key in read_settings(path)}
    return next((kind for kind in KINDS if kind in keys), None)


def check_kind(configs: Sequence[Any] | None) -> None:
    """Raises UserError unless there is a config and it has a key that says what to measure."""
    if not configs:
        raise UserError("benchmark needs --config FILE, such as benchmarks/samplers.yaml")
    files = [Path(str(config)) for config in configs if config is not None]
    if not any(set(KINDS) & set(read_settings(file)) for file in files):
        raise UserError(f"{files[0]} says nothing to measure: give it a list of {' or '.join(KINDS)}")


def chosen_tasks(options: Any) -> list[Task]:
    """Returns the tasks to run: what --only names of them, made small by --quick."""
    measuring.check_counts(options)
    tasks = [read_task(task.as_dict()) for task in options.tasks]
    check_names([task.name for task in tasks], "tasks")
    if options.only is not None:
        tasks = only(tasks, options.only)
    if not tasks:
        raise UserError("nothing to measure: the list of tasks is empty")
    if options.quick:
        small: dict[str, Any] = dict.fromkeys(("prompts", "single_prompts", "batched_prompts"))
        tasks = [replace(task, **QUICK, entries=[replace(e, **small) for e in task.entries]) for task in tasks]
    return tasks


def only(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """Returns the tasks named, whole unless some of their entries or sweeps are named, too.

    Args:
        tasks: All tasks.
        names: Names of tasks, entries and sweeps.
    """
    parts = [name for task in tasks for name in (*_names(task.entries), *_names(task.sweeps))]
    known = [*(task.name for task in tasks), *parts]
    for name in names:
        if name not in known:
            raise UserError(f"--only: nothing is called '{name}'; there are {', '.join(dict.fromkeys(known))}")
    named = [task for task in tasks if task.name in names]
    kept = []
    for task in named or tasks:
        entries = [entry for entry in task.entries if entry.name in names]
        sweeps = [sweep for sweep in task.sweeps if sweep.name in names]
        if entries or sweeps:
            kept.append(replace(task, entries=entries, sweeps=sweeps))
        elif named:
            kept.append(task)
    return kept


def _names(parts: Sequence[Entry] | Sequence[Sweep]) -> list[str]:
    return [part.name for part in parts]


def top_ratios(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the ratios of the first task, and below `tasks` those of each."""
    each = {task["name"]: {**task["ratios"], "chosen": task["chosen"], "bars": task["bars"]} for task in tasks}
    return {**(tasks[0]["ratios"] if tasks else {}), "tasks": each}


def write(result: dict[str, Any], output: Path) -> None:
    """Writes the JSON file, the Markdown file and the plots; says so when there can be no plots."""
    write_text(output, json.dumps(result, indent=1) + "\n")
    plots = {}
    try:
        for task in result["tasks"]:
            name = re.sub(r"[^\w.-]", "_", task["name"])
            path = output.with_name(f"{output.stem}_{name}.png")
            plot_task(task, path)
            plots[task["name"]] = path.name
    except UserError as error:
        measuring.say(f"no plots: {error}")
    write_text(output.with_suffix(".md"), markdown_report(result, plots))
