"""The command `benchmark`: measures what a config lists, side by side, and writes tables, JSON and plots."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from dllm_var.benchmarking import Scorer
from dllm_var.benchmarking.instruments import describe_machine
from dllm_var.benchmarking.report import plot_task, report
from dllm_var.benchmarking.results import sampler_ratios, task_result
from dllm_var.benchmarking.samplers import Effort, TaskRun
from dllm_var.benchmarking.settings import (
    COMPILED,
    COUNTS,
    FULL,
    Entry,
    Sweep,
    Task,
    TrainingCase,
    check_names,
    expand,
)
from dllm_var.datamodules import Source
from dllm_var.errors import UserError
from dllm_var.files import open_output, write_text
from dllm_var.sampling import Sampler
from dllm_var.settings import SettingsParser, build, merged, read_settings

DESCRIPTION = """Measures what a config lists, side by side on one machine: a config with `tasks` compares samplers, one
with `trainings` (benchmarks/training.yaml) ways to train.

Writes FILE.json (--output) with every figure, FILE.md with the tables and, with matplotlib, a PNG file per task. Ctrl-C
and SIGTERM write what has been measured so far.
"""
QUICK_TASK: dict[str, Any] = dict(prompts=4, selection_prompts=4, single_prompts=1, batched_prompts=4, batch_size=4)
QUICK_TRAINING: dict[str, Any] = dict(
    transformer={"hidden_size": 32, "num_layers": 1, "num_heads": 2},
    context_length=64,
    batch_size=2,
    steps=1,
    prompt_tokens=6,
    answer_tokens=10,
)
QUICK_VOCABULARY, QUICK_ROUNDS = 512, 2
Item = TypeVar("Item", Task, TrainingCase)
Show = Callable[[str, str, str], None]


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
    tasks, cases = chosen_tasks(options), chosen_cases(options)
    if tasks and cases:
        raise UserError("a benchmark has tasks or trainings, not both: measure them one after the other")
    if not tasks and not cases:
        raise UserError(f"{options.config[0]} says nothing to measure: give it a list of tasks, or one of trainings")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result, status = measure_tasks(tasks, options, device) if tasks else measure_trainings(cases, options, device)
    if options.quick:  # so little is measured that no bar is judged
        for part in (*result.get("tasks", []), *result.get("trainings", [])):
            for bar in part["bars"].values():
                bar["passed"] = None
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
    open_output("--output", name).abandon(keep=False)
    return path


def chosen_tasks(options: Any) -> list[Task]:
    """Returns the tasks to run: those that --only names, made small by --quick, their samplers' settings read."""
    tasks = []
    for values in (task.as_dict() for task in options.tasks):
        entries = [Entry(**entry) for entry in values["entries"]]
        sweeps = [Sweep(**sweep) for sweep in values["sweeps"]]
        tasks.append(Task(**{**values, "entries": entries, "sweeps": sweeps}))
    check_names([task.name for task in tasks], "tasks")
    for task in tasks:
        for part in task.parts:
            part.sampler = sampler_settings(part)

    def keep(task: Task, names: Sequence[str]) -> Task:
        entries = [entry for entry in task.entries if entry.name in names]
        return replace(task, entries=entries, sweeps=[sweep for sweep in task.sweeps if sweep.name in names])

    tasks = only(tasks, options.only, lambda task: [part.name for part in task.parts], keep)
    if options.quick:
        no_counts: dict[str, Any] = dict.fromkeys(COUNTS)
        tasks = [replace(task, **QUICK_TASK, entries=[replace(e, **no_counts) for e in task.entries]) for task in tasks]
    return tasks


def chosen_cases(options: Any) -> list[TrainingCase]:
    """Returns the trainings to run: those that --only names, with tiny models and nothing compiled by --quick."""
    cases = [TrainingCase(**case.as_dict()) for case in options.trainings]
    check_names([case.name for case in cases], "trainings")

    def keep(case: TrainingCase, names: Sequence[str]) -> TrainingCase:
        return replace(case, contenders=[name for name in case.contenders if name in names])

    cases = only(cases, options.only, lambda case: case.contenders, keep)
    if options.quick:
        cases = [
            replace(
                case,
                **QUICK_TRAINING,
                vocab_size=min(case.vocab_size, QUICK_VOCABULARY),
                contenders=[name for name in case.contenders if name not in (COMPILED, FULL)],
            )
            for case in cases
        ]
    return cases


def only(
    items: list[Item],
    names: Sequence[str] | None,
    parts: Callable[[Item], list[str]],
    keep: Callable[[Item, Sequence[str]], Item],
) -> list[Item]:
    """Returns the items that are named, or all when none is; each whole unless some of its parts are named, too.

    Args:
        items: Tasks or trainings.
        names: Names of items and of parts; None for everything.
        parts: Gives the names of an item's parts.
        keep: Gives the item with nothing but the named parts.
    """
    if names is None or not items:
        return items
    known = dict.fromkeys([*(item.name for item in items), *(part for item in items for part in parts(item))])
    for name in names:
        if name not in known:
            raise UserError(f"--only: nothing is called '{name}'; there are {'; '.join(known)}")
    named = [item for item in items if item.name in names]
    chosen = [keep(item, names) if set(parts(item)) & set(names) else item for item in named or items]
    return chosen if named else [item for item in chosen if set(parts(item)) <= set(names)]


def sampler_settings(part: Entry | Sweep) -> dict[str, Any]:
    """Returns `class_path` and `init_args` of an entry's sampler, which may be a YAML file, its arguments put over."""
    settings: Any = part.sampler
    if isinstance(settings, str) and Path(settings).suffix in (".yaml", ".yml", ".json"):
        settings = read_settings(Path(settings))
        settings = settings.get("sampler") or settings
    if isinstance(settings, str):
        settings = {"class_path": settings}
    if "class_path" not in settings:
        raise UserError(f"{part.name}: the sampler has no class_path")
    return {"init_args": {}, **merged(settings, {"init_args": part.arguments} if part.arguments else {})}


def task_run(task: Task, effort: Effort, device: torch.device, show: Show) -> TaskRun:
    """Builds a task's source, scorer, samplers and models.

    Raises:
        UserError: When one of them cannot be built.
    """
    where = f"task {task.name}"
    samplers = [(one, build(Sampler, "sampler", one.sampler, f"{where}, {one.name}")) for one in expand(task)]
    source = build(Source, "source", task.source, where)
    scorer = build(Scorer, "scorer", task.scorer, where)
    return TaskRun(task, source, scorer, samplers, effort, device, show)


def measure_tasks(tasks: Sequence[Task], options: Any, device: torch.device) -> tuple[dict[str, Any], int]:
    """Measures samplers; returns the whole result and the exit status."""
    effort = Effort(repeats=1, limit=8, widths=(1, 8, 32)) if options.quick else Effort(repeats=options.repeats)
    progress = Progress()
    runs = [task_run(task, effort, device, progress.show) for task in tasks]
    result, status = measure("samplers", runs, effort.repeats, options.quick, device, progress)
    result["tasks"] = [task_result(run) for run in runs if run.seconds]
    result["ratios"] = sampler_ratios(result["tasks"])
    return result, status


def measure_trainings(cases: Sequence[TrainingCase], options: Any, device: torch.device) -> tuple[dict[str, Any], int]:
    """Measures trainings; returns the whole result and the exit status."""
    from dllm_var.benchmarking.training import TrainingRun, training_ratios  # imports Lightning

    rounds = QUICK_ROUNDS if options.quick else options.repeats
    progress = Progress()
    with tempfile.TemporaryDirectory() as cache, quiet("lightning.pytorch"):
        runs = [TrainingRun(case, rounds, device, Path(cache), progress.show) for case in cases]
        result, status = measure("training", runs, rounds, options.quick, device, progress)
    result["trainings"] = [run.result() for run in runs if run.peaks]
    result["ratios"] = training_ratios(result["trainings"])
    return result, status


def measure(
    kind: str, runs: Sequence[Any], rounds: int, quick: bool, device: torch.device, progress: Progress
) -> tuple[dict[str, Any], int]:
    """Measures one run after the other, until the end, Ctrl-C or SIGTERM.

    Returns:
        The head of the result, `partial` when a signal ended it, and the exit status: 0, 130 or 143.
    """
    result: dict[str, Any] = {
        "kind": kind,
        "command": shlex.join(["python", "-m", "dllm_var", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": describe_machine(device),
        "repeats": rounds,
        "quick": quick,
        "partial": True,
    }
    began, status = time.perf_counter(), 0
    try:
        with stopped_by_signals():
            for run in runs:
                run.run()
        result["partial"] = False
    except Stopped as stopped:
        status = 128 + stopped.number  # as shells count
        say("interrupted: writing what has been measured")
    finally:
        progress.clear()
    result["seconds"] = time.perf_counter() - began
    return result, status


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


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Lets a logger say warnings alone; its level is put back after."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


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


class Progress:
    """One line on standard error that moves on a terminal; elsewhere a line per phase."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._phase = ""

    def show(self, task: str, phase: str, item: str) -> None:
        """Shows the current measurement."""
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
    """Prints a line on standard error."""
    print(text, file=sys.stderr, flush=True)
