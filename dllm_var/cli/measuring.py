"""Shared by the benchmarks of samplers and of training: options, progress, ends by a signal, files written whole."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from dllm_var.benchmarking.instruments import command_line, describe_machine
from dllm_var.cli.settings import SettingsParser
from dllm_var.errors import UserError
from dllm_var.files import open_output

STATUS_BASE = 128  # of a process that a signal ended, as shells count


class Run(Protocol):
    """One entry of a config: measures itself, and keeps what it has when an exception ends it."""

    def run(self) -> None: ...


class Stopped(BaseException):
    """Ctrl-C or SIGTERM has ended the measurements.

    Lightning's Trainer leaves the process when it sees a KeyboardInterrupt, and nothing could be written then.

    Args:
        number: Of the signal.
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


def add_options(parser: SettingsParser) -> None:
    """Adds the options that every benchmark has.

    Args:
        parser: Gets them.
    """
    parser.add_argument("--output", type=str, help="JSON file to write; tables and plots go beside it")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each timing")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice when not given")
    parser.add_argument("--only", nargs="+", type=str, metavar="NAME", help="which of them, and which parts of them")
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds: little data, tiny models")


def check_counts(options: Any) -> None:
    """Raises UserError unless there is at least one round, and one thread."""
    for name in ("repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")


def prepare_device(threads: int | None) -> torch.device:
    """Returns where to measure, after setting torch's threads if a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(
    kind: str, runs: Sequence[Run], rounds: int, quick: bool, device: torch.device, progress: Progress
) -> tuple[dict[str, Any], int]:
    """Measures one run after the other, until the end, Ctrl-C or SIGTERM.

    Args:
        kind: What is measured.
        runs: All are built already, so that mistakes have shown.
        rounds: Of each timing.
        quick: Whether it is a smoke test.
        device: Where.
        progress: Is cleared at the end.

    Returns:
        The head of the result, `partial` when a signal ended it, and the exit status: 0, 130 or 143.
    """
    result: dict[str, Any] = {
        "kind": kind,
        "command": command_line(),
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
        status = STATUS_BASE + stopped.number
        say("interrupted: writing what has been measured")
    finally:
        progress.clear()
    result["seconds"] = time.perf_counter() - began
    return result, status


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
