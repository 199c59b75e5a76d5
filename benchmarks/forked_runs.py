"""Runs of the command line in forks of one process that has imported everything: a second each instead of twenty.

A fork does what `python -m dllm_var` does, from the arguments to the exit status, in a session and a log file of its
own. faults.py kills such runs and resumes them; bad_inputs.py gives them bad arguments and files.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("start-up", "training", "saving a checkpoint")
POLL = 0.002  # seconds between looks at a run
PR_SET_PDEATHSIG = 1  # of Linux' prctl
HANGS_AFTER = 300.0  # seconds


@dataclass
class Attempt:
    """A run of one process or several.

    Args:
        log: Its output.
        phase: Memory shared with the processes: the index of the phase, and how many checkpoints were begun.
        pids: Processes that have not been waited for, by rank.
        statuses: Exit statuses so far, by rank; minus the number of the signal that ended it.
    """

    log: Path
    phase: mmap.mmap
    pids: dict[int, int] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def now(self) -> str:
        """Name of the phase of the first rank."""
        return PHASES[self.phase[0]]

    def poll(self) -> bool:
        """Whether any process still runs."""
        for rank, pid in list(self.pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.pids[rank]
                self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return bool(self.pids)

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = HANGS_AFTER) -> bool:
        """Waits for the end, a condition or a time; returns whether the run has ended."""
        deadline = time.monotonic() + seconds
        while self.poll():
            if until() or time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def kill(self, ranks: Sequence[int] | None = None, number: int = signal.SIGKILL) -> None:
        """Sends a signal to some or all ranks; SIGKILL also to all processes that they have started."""
        for rank, pid in self.pids.items():
            if ranks is None or rank in ranks:
                if number == signal.SIGKILL:
                    with suppress(ProcessLookupError):  # it has not made itself a group yet
                        os.killpg(pid, number)
                os.kill(pid, number)

    def end(self) -> None:
        """Kills the processes that still run; they write their stacks to the log first."""
        if self.poll():
            self.kill(number=signal.SIGQUIT)
            time.sleep(0.2)
            self.kill()
        self.wait()

    @property
    def output(self) -> str:
        """All that the run printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def warm_up() -> None:
    """Imports what runs import. It starts no thread: forks of a process with threads may hang."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    import torch.utils.tensorboard

    import dllm_var.__main__
    import dllm_var.callbacks
    import dllm_var.cli.fit
    import dllm_var.cli.generate  # noqa: F401

    torch.set_num_threads(1)
    assert threading.active_count() == 1


def start(folder: Path, arguments: Sequence[str], ranks: int = 1, before: Callable[[], None] | None = None) -> Attempt:
    """Begins a run.

    Args:
        folder: Its working folder.
        arguments: Arguments of `python -m dllm_var`.
        ranks: Processes to train with, as torchrun starts them.
        before: Called in each process first, to prepare a fault.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    attempt = Attempt(folder / f"{len(list(folder.glob('*.log'))):03d}.log", mmap.mmap(-1, 2))
    attempt.log.touch()
    environment: dict[str, str] = {}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        environment["TORCHELASTIC_RUN_ID"] = "faults"
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _child(folder, attempt, list(arguments), environment, before, marks=rank == 0)
        attempt.pids[rank] = pid
    return attempt


def _child(
    folder: Path,
    attempt: Attempt,
    arguments: list[str],
    environment: dict[str, str],
    before: Callable[[], None] | None,
    marks: bool,
) -> None:
    status = 1
    try:
        os.setsid()
        atexit._clear()  # the parent's files are not this process's to remove
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive the campaign
        os.chdir(folder)
        os.environ |= environment
        output = os.open(attempt.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(target, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.register(signal.SIGQUIT)  # shows where a run hangs
        if marks:
            _mark_phases(attempt.phase)
        if before is not None:
            before()
        from dllm_var.__main__ import main

        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _mark_phases(phase: mmap.mmap) -> None:
    """Makes this process note its phase: training from the first step on, and each save of a checkpoint."""
    from dllm_var.module import DiffusionLM
    from dllm_var.training.trainer import Trainer

    def wrap(owner: Any, method: str, index: int, saves: int, after: int) -> None:
        original = getattr(owner, method)

        def marked(*args: Any, **kwargs: Any) -> Any:
            phase[0], phase[1] = index, (phase[1] + saves) % 256
            result = original(*args, **kwargs)
            phase[0] = after
            return result

        setattr(owner, method, marked)

    wrap(DiffusionLM, "training_step", 1, 0, 1)
    wrap(Trainer, "save_checkpoint", 2, 1, 1)
