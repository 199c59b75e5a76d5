"""Measures what a config lists, side by side on one machine, and writes tables, JSON and plots."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dllm_var.benchmarking.instruments import command_line, describe_machine
from dllm_var.benchmarking.measure import Effort, TaskRun
from dllm_var.benchmarking.plots import plot_task
from dllm_var.benchmarking.report import markdown_report, text_report
from dllm_var.benchmarking.results import task_result
from dllm_var.benchmarking.settings import Entry, Sweep, Task, check_names, read_task
from dllm_var.errors import UserError
from dllm_var.settings import SettingsParser, read_settings

DESCRIPTION = """Measures what a config lists, side by side on one machine: a config with `tasks` compares samplers, one
with `trainings` (benchmarks/training.yaml) ways to train.

Writes FILE.json (--output) with every figure, FILE.md with the tables and, with matplotlib, a PNG file per task. Ctrl-C
writes what has been measured so far.
"""
KINDS = ("tasks", "trainings")  # the key that says what a config measures
QUICK: dict[str, Any] = dict(prompts=4, selection_prompts=4, single_prompts=1, batched_prompts=4, batch_size=4)


def main(command: str, arguments: list[str]) -> int:
    """Runs `benchmark` and returns its exit status, 130 when it was interrupted.

    Args:
        command: `benchmark`.
        arguments: Its options, as `--help` lists them.

    Raises:
        UserError: For a bad config, checkpoint or output file.
    """
    if kind_of(arguments) == "trainings":
        from dllm_var.commands import benchmark_training

        return benchmark_training.main(command, arguments)
    options = build_parser(command).parse_args(arguments)
    check_kind(options.config)
    output = check_output(options.output)
    tasks: list[Task] = chosen_tasks(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    effort = Effort(repeats=1, limit=8, widths=(1, 8, 32)) if options.quick else Effort(repeats=options.repeats)
    result: dict[str, Any] = {
        "kind": "samplers",
        "command": command_line(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": describe_machine(device),
        "repeats": effort.repeats,
        "quick": options.quick,
        "partial": True,
    }
    began = time.perf_counter()
    progress = Progress()
    # All of them are built before anything is measured, so that mistakes show at once.
    runs = [TaskRun(task, effort, device, progress.show) for task in tasks]
    try:
        for run in runs:
            run.run()
        result["partial"] = False
    except KeyboardInterrupt:
        say("interrupted: writing what has been measured")
    finally:
        progress.clear()
    result["seconds"] = time.perf_counter() - began
    result["tasks"] = [task_result(run) for run in runs if run.seconds]
    result["ratios"] = top_ratios(result["tasks"])
    write(result, output)
    print(text_report(result))
    say(f"wrote {output} and {output.with_suffix('.md')}")
    return 130 if result["partial"] else 0


def build_parser(command: str) -> SettingsParser:
    """Returns the parser of the options.

    Args:
        command: Name to show.
    """
    parser = SettingsParser(prog=f"python -m dllm_var {command}", description=DESCRIPTION)
    parser.usage = f"python -m dllm_var {command} --config benchmarks/samplers.yaml --output FILE.json [options]"
    parser.add_argument("--config", action="config", help="YAML file that lists what to measure; it has its comments")
    parser.add_argument("--tasks", type=list[Task], default=[], help="what to measure")
    parser.add_argument("--output", type=str, help="JSON file to write; tables and plots go beside it")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each timing")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice when not given")
    parser.add_argument("--only", nargs="+", type=str, metavar="NAME", help="tasks, entries and sweeps to run")
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds: few prompts, short answers")
    return parser


def kind_of(arguments: Sequence[str]) -> str | None:
    """Returns the first of `KINDS` that a config among the arguments has, null when none has one."""
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    named += [following for option, following in pairwise(arguments) if option == "--config"]
    keys = {key for name in named if Path(name).is_file() for key in read_settings(Path(name))}
    return next((kind for kind in KINDS if kind in keys), None)


def check_kind(configs: Sequence[Any] | None) -> None:
    """Raises UserError unless there is a config and it has a key that says what to measure."""
    if not configs:
        raise UserError("benchmark needs --config FILE, such as benchmarks/samplers.yaml")
    files = [Path(str(config)) for config in configs if config is not None]
    if not any(set(KINDS) & set(read_settings(file)) for file in files):
        raise UserError(f"{files[0]} says nothing to measure: give it a list of {' or '.join(KINDS)}")


def check_output(name: str | None) -> Path:
    """Returns the JSON file to write, whose folder is made."""
    if name is None:
        raise UserError("benchmark needs --output FILE.json")
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(f"--output must end in .json, got '{name}'; the tables go into the .md file beside it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "no permission")
    except OSError as error:
        raise UserError(f"--output: cannot write into '{path.parent}': {error.strerror}") from error
    return path


def chosen_tasks(options: Any) -> list[Task]:
    """Returns the tasks to run: what --only names of them, made small by --quick."""
    for name in ("repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    tasks = [read_task(task.as_dict()) for task in options.tasks]
    check_names([task.name for task in tasks], "tasks")
    if options.only is not None:
        tasks = only(tasks, options.only)
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
        say(f"no plots: {error}")
    write_text(output.with_suffix(".md"), markdown_report(result, plots))


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Progress:
    """One line on standard error that moves on a terminal; elsewhere a line per phase."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._phase = ""

    def show(self, task: str, phase: str, item: str) -> None:
        """Tells what is being measured."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'{task}: {phase} {item}'[:width]}", end="", file=sys.stderr, flush=True)
        elif f"{task} {phase}" != self._phase:
            self._phase = f"{task} {phase}"
            say(f"{task}: {phase}")

    def clear(self) -> None:
        """Removes the line."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Tells on standard error what is going on."""
    print(text, file=sys.stderr, flush=True)
