"""Runs that meet one fault each: what they say, how they end, and whether they can be gone on with."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked_runs import Attempt, start
from kills import TWO_RANKS
from lightning.pytorch.callbacks import Callback
from short_run import fingerprint, write_recipe

from dllm_var.module import DiffusionLM


@dataclass
class Case:
    """What came of one fault.

    Args:
        fault: What was done.
        status: How the run ended.
        message: What it said.
        after: What became of it: ``same weights``, or what is wrong.
        good: Whether all is as it should be.
    """

    fault: str
    status: str
    message: str
    after: str
    good: bool


class FailAt(Callback):
    """A callback with a bug.

    Args:
        step: Where it shows.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("no such figure")


class Tries:
    """Working folders for faults, and what an uninterrupted run ends with.

    Args:
        folder: They go here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: list[Case] = []
        self.expected: dict[int, dict[str, str]] = {}

    def whole(self, ranks: int) -> dict[str, str]:
        """Fingerprint of a run without a fault."""
        if ranks not in self.expected:
            working = self.folder / f"whole-{ranks}"
            attempt = start(working, [*write_recipe(working), *(TWO_RANKS if ranks > 1 else [])], ranks)
            attempt.wait()
            assert not any(attempt.statuses.values()), attempt.output
            self.expected[ranks] = fingerprint(working)
        return self.expected[ranks]

    def begin(self, name: str, *more: str, ranks: int = 1, before: Callable[[], None] | None = None) -> Attempt:
        """Begins a run in a folder of its own."""
        working = self.folder / re.sub(r"\W+", "-", name)
        shutil.rmtree(working, ignore_errors=True)
        return start(working, [*write_recipe(working), *(TWO_RANKS if ranks > 1 else []), *more], ranks, before)

    def judge(self, fault: str, attempt: Attempt, statuses: set[int], said: str, ranks: int = 1) -> None:
        """Waits for the end, looks at what was said, goes on with --resume and compares.

        Args:
            fault: What was done.
            attempt: The run.
            statuses: How its processes may end.
            said: What the message must contain, a regular expression.
            ranks: Processes to go on with.
        """
        ended = attempt.wait()
        attempt.end()
        found = sorted(set(attempt.statuses.values()))
        message = last_word(attempt, said)
        good = ended and set(found) <= statuses and message is not None
        resumed = start(
            attempt.log.parent,
            ["fit", "--config", "recipe.yaml", *(TWO_RANKS if ranks > 1 else []), "--resume=auto"],
            ranks,
        )
        resumed.wait()
        resumed.end()
        after = "same weights"
        if any(resumed.statuses.values()):
            after = f"resuming failed: {resumed.message}"
        elif fingerprint(attempt.log.parent) != self.whole(ranks):
            after = "other weights"
        status = ", ".join(map(str, found)) if ended else "hangs"
        text = (message or attempt.message).replace(str(self.folder), "FOLDER")  # a temporary one
        self.cases.append(Case(fault, status, text, after, good and after == "same weights"))


def last_word(attempt: Attempt, said: str) -> str | None:
    """The line in which a run says what happened; none is needed when nothing is expected."""
    if not said:
        return attempt.message
    lines = [line.strip() for line in attempt.output.splitlines() if re.search(said, line)]
    return lines[-1].replace(str(attempt.log.parent) + "/", "")[:240] if lines else None


def in_training(attempt: Attempt) -> Attempt:
    """Waits until two checkpoints are there."""
    attempt.wait(lambda: attempt.phase[1] >= 2 and attempt.now == "training")
    return attempt


def limit_files(size: int) -> None:
    """Lets no file but the log grow beyond some bytes."""
    log = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert log.stdin is not None
    os.dup2(log.stdin.fileno(), 1)
    os.dup2(log.stdin.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def mount(folder: str, options: str, full: bool = False) -> None:
    """Mounts a disk in the working folder that goes with the process."""
    ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    Path(folder).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    if full:
        with suppress(OSError):
            Path(folder, "filler").write_bytes(bytes(2**20))


def after_step(step: int, work: Callable[[], Any]) -> None:
    """Has something happen after a step."""
    after = DiffusionLM.on_train_batch_end

    def on_train_batch_end(self: Any, *rest: Any) -> None:
        if self.trainer.global_step == step:
            work()
        after(self, *rest)

    DiffusionLM.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]


def redirect(path: str | None) -> None:
    """Opens a file in place of standard output; a pipe that nobody reads when None."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer if path is None else os.open(path, os.O_RDWR), 1)
