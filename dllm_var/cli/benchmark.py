"""The command `benchmark`: measures what a config lists, side by side, and writes tables, JSON and plots."""

import json
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from jsonargparse.typing import PositiveInt

from dllm_var.benchmarking.decoding import DecodingRun
from dllm_var.benchmarking.instruments import describe_machine
from dllm_var.benchmarking.plot import draw_task
from dllm_var.benchmarking.report import report
from dllm_var.benchmarking.results import sampler_ratios
from dllm_var.benchmarking.samplers import TaskRun
from dllm_var.benchmarking.settings import DecodingCase, Entry, Sweep, Task, TrainingCase, check_names
from dllm_var.cli.decoding_options import add_device_options, device_and_dtype
from dllm_var.errors import UserError
from dllm_var.files import open_output, write_text
from dllm_var.settings import SettingsParser

DESCRIPTION = """Measures what a config lists, side by side on one machine: a config with `tasks` compares samplers, one
with `trainings` (benchmarks/training.yaml) ways to train, and one with `decodings` (benchmarks/gpu.yaml) a device.

Writes FILE.json (--output) with every figure, FILE.md with the tables and, with matplotlib, a PNG file per task. Ctrl-C
and SIGTERM write what has been measured so far.
"""
Item = TypeVar("Item", Task, Any)


def main(command: str, arguments: list[str]) -> int:
    """Runs `benchmark` and returns its exit status: 0, 130 after Ctrl-C, 143 after SIGTERM."""
    options = build_parser(command).parse_args(arguments)
    if not options.config or not options.output:
        raise UserError("benchmark needs --config FILE, such as benchmarks/samplers.yaml, and --output FILE.json")
    output = Path(options.output)
    if output.suffix != ".json":
        raise UserError(f"--output must end in .json, got '{output}'; the tables go into the .md file beside it")
    tasks = wanted(read_tasks(options), options.only, options.quick)
    cases: list[Any] = [DecodingCase(**case.as_dict()) for case in options.decodings]
    cases = wanted(
        [*cases, *(TrainingCase(**case.as_dict()) for case in options.trainings)], options.only, options.quick
    )
    if bool(tasks) == bool(cases):
        raise UserError(f"{options.config[0]} must list either tasks or trainings to measure, and not both")
    if cases and options.dtype:
        raise UserError("--dtype is for tasks: a training has bf16-mixed precision on a GPU and float32 on a CPU")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot make its folder: {error.strerror}") from error
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with open_output(output) as file:  # before the work, which a mistake would lose
        result, status = measure(tasks, cases, options)
        file.write(json.dumps(result, indent=1) + "\n")
    title = "Samplers side by side" if tasks else "Training measured"
    if result.get("decodings"):
        title = f"Measured on {result['machine']['device']}"
    write_text(output.with_suffix(".md"), report(title, result, draw_plots(result, output)))
    print(report(title, result))
    say(f"wrote {output} and {output.with_suffix('.md')}")
    return status


def build_parser(command: str) -> SettingsParser:
    usage = "--config benchmarks/samplers.yaml --output FILE.json [options]"
    parser = SettingsParser.of_command(command, usage, DESCRIPTION)
    add = parser.add_argument
    add("--config", action="config", help="YAML file that lists what to measure; it has its comments")
    add("--tasks", type=list[Task], default=[], help="samplers to measure")
    add("--trainings", type=list[TrainingCase], default=[], help="trainings to measure")
    add("--decodings", type=list[DecodingCase], default=[], help="shapes to decode with")
    add("--minutes", type=PositiveInt, help="stop then, and write what has been measured")
    add("--output", type=str, help="JSON file to write; tables and plots go beside it")
    add("--repeats", type=PositiveInt, default=3, help="rounds of each timing")
    add("--threads", type=PositiveInt, help="torch's threads; its own choice when not given")
    add_device_options(parser)
    add("--only", nargs="+", type=str, metavar="NAME", help="tasks or trainings, and parts of them")
    add("--quick", action="store_true", help="a smoke test in seconds: little data, tiny models")
    return parser


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
        with_parts = [item for item in items if set(item.parts) & set(names)]
        named = [item for item in items if item.name in names] or with_parts
        items = [item.only(names) if item in with_parts else item for item in named]
    return [item.quick() for item in items] if quick else items


def measure(tasks: Sequence[Task], cases: Sequence[Any], options: Any) -> tuple[dict[str, Any], int]:
    """Measures tasks, or trainings and decodings, until the end, Ctrl-C, SIGTERM or `--minutes` are over.

    Returns the whole result, and the exit status: 0, 130 or 143, or 1 where something failed.
    """
    device, dtype = device_and_dtype(options)
    machine = describe_machine(device)  # the commit is that of the code that is measured
    began, date, status = time.perf_counter(), time.strftime("%Y-%m-%d %H:%M:%S"), 0
    begun: list[Any] = []
    with tempfile.TemporaryDirectory() as cache:
        if tasks:
            ratios: Any = sampler_ratios
            rounds = 1 if options.quick else options.repeats
            smaller: dict[str, Any] = dict(limit=8, widths=(1, 8, 32)) if options.quick else {}
            runs: list[Any] = [TaskRun(task, rounds, device, dtype, **smaller) for task in tasks]
        else:
            from dllm_var.benchmarking.training import TrainingRun, training_ratios  # imports Lightning

            ratios = training_ratios
            rounds = 2 if options.quick else options.repeats
            runs = [
                DecodingRun(case, device)
                if isinstance(case, DecodingCase)
                else TrainingRun(case, rounds, device, Path(cache))
                for case in cases
            ]
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if options.minutes else [])]
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            if options.minutes:
                signal.alarm(60 * options.minutes)
            for run in runs:
                begun.append(run)
                run.run()
        except Stopped as stopped:
            status = 128 + stopped.args[0]  # as shells count
            say("interrupted: writing what has been measured")
        finally:
            if options.minutes:
                signal.alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)
    measured = [run.result() for run in begun]
    decoded = [part for run, part in zip(begun, measured, strict=True) if isinstance(run, DecodingRun)]
    trained = [part for part in measured if part not in decoded]
    for case in (case for case in cases if isinstance(case, TrainingCase)):
        for part in (part for part in trained if part["name"] == case.name and part["gemm_peak_flops"]):
            part["planned"] = planned(case, part)
    partial, late = status > 0, status == 128 + signal.SIGALRM
    if any(part.get("failed") for part in measured) or late:
        status = 0 if late else 1
    if options.quick:  # so little is measured that no bar is judged
        for bar in (bar for part in measured for bar in part["bars"].values()):
            bar["passed"] = None
    result = {
        "kind": "samplers" if tasks else "training",
        "command": shlex.join(["python", "-m", "dllm_var", *sys.argv[1:]]),
        "date": date,
        "machine": machine,
        "quick": options.quick,
        "partial": partial,
        "repeats": rounds,
        "seconds": time.perf_counter() - began,
        **({"decodings": decoded} if decoded else {}),
        "tasks" if tasks else "trainings": trained,
        "ratios": ratios(measured),
    }
    return result, status


def planned(case: TrainingCase, measured: dict[str, Any]) -> dict[str, Any]:
    """Returns what `plan` says of a training on a device of the measured speed: seconds of a step, and bytes."""
    from dllm_var.cli.plan import MFU, plan  # imports Lightning

    settings: dict[str, Any] = {
        "model": {"init_args": {"transformer": {**case.transformer, "vocab_size": case.vocab_size}}},
        "data": {"init_args": {"batch_size": case.batch_size, "context_length": case.context_length}},
        "trainer": {"precision": measured["precision"]},
        "devices": 1,
        "device_tflops": measured["gemm_peak_flops"] / 1e12,
        "device_memory": 80.0,  # nothing depends on it
        "mfu": MFU,
        "supervised_share": case.answer_tokens / (case.prompt_tokens + case.answer_tokens),
    }
    settings["model"]["init_args"] |= {
        "objective": case.objective,
        "activation_checkpointing": case.activation_checkpointing,
    }
    result = plan(settings)
    memory = result["memory"][result["this_config"]["strategy"]]
    return {"seconds": result["step"]["seconds"], "mfu": MFU, "memory": memory["total"]}


class Stopped(BaseException):
    """A signal, whose number it has, ended the measurements; on KeyboardInterrupt Lightning would exit the process."""


def stop(number: int, frame: FrameType | None) -> None:
    """Handles a signal; Lightning's Trainer calls this handler of SIGTERM after its own."""
    raise Stopped(number)


def draw_plots(result: dict[str, Any], output: Path) -> list[str]:
    """Draws a plot per task beside the output; returns their file names, none without matplotlib."""
    if find_spec("matplotlib") is None:
        say('no plots: they need matplotlib: pip install "dllm-var[plots]"')
        return []
    names = []
    for task in result.get("tasks", []):
        safe_name = re.sub(r"[^\w.-]", "_", task["name"])
        names.append(f"{output.stem}_{safe_name}.png")
        draw_task(task).savefig(output.with_name(names[-1]), format="png")
    return names


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
