"""The command `benchmark`: measures what a config lists, side by side, and writes tables, JSON and plots."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from dllm_var.benchmarking.instruments import describe_machine
from dllm_var.benchmarking.report import plot_task, report
from dllm_var.benchmarking.results import sampler_ratios
from dllm_var.benchmarking.samplers import Effort, TaskRun
from dllm_var.benchmarking.settings import Entry, Sweep, Task, TrainingCase, check_names
from dllm_var.errors import UserError
from dllm_var.files import open_output, write_text
from dllm_var.settings import SettingsParser

DESCRIPTION = """Measures what a config lists, side by side on one machine: a config with `tasks` compares samplers, one
with `trainings` (benchmarks/training.yaml) ways to train.

Writes FILE.json (--output) with every figure, FILE.md with the tables and, with matplotlib, a PNG file per task. Ctrl-C
and SIGTERM write what has been measured so far.
"""
Item = TypeVar("Item", Task, TrainingCase)


def main(command: str, arguments: list[str]) -> int:
    """Runs `benchmark` and returns its exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: For a bad config, checkpoint or output file.
    """
    options = build_parser(command).parse_args(arguments)
    if not options.config:
        raise UserError("benchmark needs --config FILE, such as benchmarks/samplers.yaml")
    output = check_output(options.output)
    for name in ("repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    tasks = wanted(read_tasks(options), options.only, options.quick)
    cases = [TrainingCase(**case.as_dict()) for case in options.trainings]
    cases = wanted(cases, options.only, options.quick)
    if tasks and cases:
        raise UserError("a benchmark has tasks or trainings, not both: measure them one after the other")
    if not tasks and not cases:
        raise UserError(f"{options.config[0]} says nothing to measure: give it a list of tasks, or one of trainings")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result, status = measure(tasks, cases, options)
    write_text(output, json.dumps(result, indent=1) + "\n")
    title = "Samplers side by side" if tasks else "Training measured"
    write_text(output.with_suffix(".md"), report(title, result, draw_plots(result, output)))
    print(report(title, result))
    say(f"wrote {output} and {output.with_suffix('.md')}")
    return status


def build_parser(command: str) -> SettingsParser:
    """Returns the parser of the options."""
    parser = SettingsParser(prog=f"python -m dllm_var {command}", description=DESCRIPTION)
    parser.usage = f"python -m dllm_var {command} --config benchmarks/samplers.yaml --output FILE.json [options]"
    parser.add_argument("--config", action="config", help="YAML file that lists what to measure; it has its comments")
    parser.add_argument("--tasks", type=list[Task], default=[], help="samplers to measure")
    parser.add_argument("--trainings", type=list[TrainingCase], default=[], help="trainings to measure")
    parser.add_argument("--output", type=str, help="JSON file to write; tables and plots go beside it")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each timing")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice when not given")
    parser.add_argument("--only", nargs="+", type=str, metavar="NAME", help="tasks or trainings, and parts of them")
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds: little data, tiny models")
    return parser


def check_output(name: str | None) -> Path:
    """Returns the JSON file to write, whose folder is made."""
    if name is None:
        raise UserError("benchmark needs --output FILE.json")
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(f"--output must end in .json, got '{name}'; the tables go into the .md file beside it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write into '{path.parent}': {error.strerror}") from error
    open_output("--output", name).abandon()
    return path


def read_tasks(options: Any) -> list[Task]:
    """Returns the config's tasks; `instantiate` would also build what stands as a dictionary with a class path."""
    tasks = []
    for values in (task.as_dict() for task in options.tasks):
        values["entries"] = [Entry(**entry) for entry in values["entries"]]
        values["sweeps"] = [Sweep(**sweep) for sweep in values["sweeps"]]
        tasks.append(Task(**values))
    return tasks


def wanted(items: list[Item], names: Sequence[str] | None, quick: bool) -> list[Item]:
    """Returns the tasks or trainings to run, made small when `quick`.

    `names` are names of items and of their parts (entries, sweeps, contenders): an item that is named is taken whole
    unless some of its parts are named, too; where no item is named, all are taken that have a named part. None: all.
    """
    check_names([item.name for item in items], "benchmark")
    if names and items:
        known = dict.fromkeys([*(item.name for item in items), *(part for item in items for part in item.parts)])
        for name in names:
            if name not in known:
                raise UserError(f"--only: nothing is called '{name}'; there are {'; '.join(known)}")
        named = [item for item in items if item.name in names]
        with_parts = [item for item in items if set(item.parts) & set(names)]
        items = [item.only(names) if item in with_parts else item for item in named or with_parts]
    return [item.quick() for item in items] if quick else items


def measure(tasks: Sequence[Task], cases: Sequence[TrainingCase], options: Any) -> tuple[dict[str, Any], int]:
    """Measures one task or training after the other, until the end, Ctrl-C or SIGTERM.

    Returns:
        The whole result, `partial` when a signal ended it, and the exit status: 0, 130 or 143.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    effort = Effort(1, limit=8, widths=(1, 8, 32)) if options.quick else Effort(options.repeats)
    runs: list[Any] = [TaskRun(task, effort, device) for task in tasks]
    rounds, status = effort.repeats, 0
    result: dict[str, Any] = {
        "kind": "samplers" if tasks else "training",
        "command": shlex.join(["python", "-m", "dllm_var", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": describe_machine(device),
        "quick": options.quick,
        "partial": False,
    }
    ratios: Callable[[list[dict[str, Any]]], dict[str, Any]] = sampler_ratios
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        if cases:
            from dllm_var.benchmarking.training import TrainingRun, training_ratios  # imports Lightning

            rounds, ratios = 2 if options.quick else options.repeats, training_ratios
            runs = [TrainingRun(case, rounds, device, Path(cache)) for case in cases]
        try:
            with stopped_by_signals():
                for run in runs:
                    run.run()
        except Stopped as stopped:
            status = 128 + stopped.number  # as shells count
            result["partial"] = True
            say("interrupted: writing what has been measured")
    measured = [run.result() for run in runs if run.has_begun]
    if options.quick:  # so little is measured that no bar is judged
        for bar in (bar for part in measured for bar in part["bars"].values()):
            bar["passed"] = None
    figures = {"repeats": rounds, "seconds": time.perf_counter() - began, "tasks" if tasks else "trainings": measured}
    return {**result, **figures, "ratios": ratios(measured)}, status


class Stopped(BaseException):
    """Ctrl-C or SIGTERM has ended the measurements.

    It is no KeyboardInterrupt: on one of these Lightning's Trainer exits the process, and nothing would be written.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raises `Stopped` on Ctrl-C and SIGTERM; Lightning's Trainer calls this handler of SIGTERM after its own."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_plots(result: dict[str, Any], output: Path) -> list[str]:
    """Draws a plot per task beside the output; returns their file names, none without matplotlib."""
    names = []
    try:
        for task in result.get("tasks", []):
            name = re.sub(r"[^\w.-]", "_", task["name"])
            path = output.with_name(f"{output.stem}_{name}.png")
            plot_task(task, path)
            names.append(path.name)
    except UserError as error:
        say(f"no plots: {error}")
    return names


def say(text: str) -> None:
    """Prints a line on standard error."""
    print(text, file=sys.stderr, flush=True)
