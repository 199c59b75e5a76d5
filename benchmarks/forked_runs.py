"""Runs of the command line in forks of one process that has imported everything: a second each instead of twenty.

A fork does what `python -m dllm_var` does, from the arguments to the exit status, in a session and a log file of its
own. `benchmarks/faults.py` kills such runs and resumes them.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("start-up", "training", "validation", "saving a checkpoint", "export and summary")
POLL = 0.002  # seconds between looks at a run
PR_SET_PDEATHSIG = 1  # of Linux' prctl
HANGS_AFTER = 300.0  # seconds after which a run that still lives is said to hang


@dataclass
class Attempt:
    """A run under way, of one process or several.

    Args:
        pids: Processes that have not been waited for, by rank.
        log: What they print.
        began: Moment of the start.
        phase: Shared with the processes; the first byte is the index of the phase, the second counts saves.
        statuses: Exit statuses so far, by rank; minus the number of the signal that ended it.
    """

    pids: dict[int, int]
    log: Path
    began: float
    phase: mmap.mmap
    statuses: dict[int, int]

    @property
    def now(self) -> str:
        """Name of the phase the first rank is in."""
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
        """Sends a signal to some or all ranks, and SIGKILL to all that they have started."""
        for rank, pid in self.pids.items():
            if ranks is None or rank in ranks:
                if number == signal.SIGKILL:
                    with suppress(ProcessLookupError):  # it has not made itself a group yet
                        os.killpg(pid, number)
                os.kill(pid, number)

    def end(self) -> None:
        """Makes sure that nothing is left; what still runs tells where it stands first."""
        if self.poll():
            self.kill(number=signal.SIGQUIT)
            time.sleep(0.2)
            self.kill()
        self.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def message(self) -> str:
        """The last line the run printed."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def warm_up() -> None:
    """Imports what runs import. Starts no thread: forks of a process with threads may hang."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
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
        arguments: What follows `python -m dllm_var`.
        ranks: Processes to train with, as torchrun starts them.
        before: Called in each process first, to prepare a fault.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    phase = mmap.mmap(-1, 2)
    number = len(list(folder.glob("*.log")))
    attempt = Attempt({}, folder / f"{number:03d}.log", time.monotonic(), phase, {})
    attempt.log.touch()
    port = _free_port() if ranks > 1 else 0
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _child(folder, attempt.log, list(arguments), rank, ranks, port, phase, before)
        attempt.pids[rank] = pid
    return attempt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(
    folder: Path,
    log: Path,
    arguments: list[str],
    rank: int,
    ranks: int,
    port: int,
    phase: mmap.mmap,
    before: Callable[[], None] | None,
) -> None:
    status = 1
    try:
        os.setsid()
        atexit._clear()  # what its parent would tidy up is not its own
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives whoever tests
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.register(signal.SIGQUIT)  # shows where a run hangs
        if ranks > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "faults"}
        if rank == 0:
            _mark_phases(phase)
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
    """Has this process note what it is doing."""
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
    from lightning.pytorch.loops.fit_loop import _FitLoop

    from dllm_var.callbacks import ExportWeights, RunSummary
    from dllm_var.training.checkpointing import Trainer

    @contextmanager
    def during(name: str) -> Iterator[None]:
        previous = phase[0]
        phase[0] = PHASES.index(name)
        if name == "saving a checkpoint":
            phase[1] = (phase[1] + 1) % 256
        yield
        phase[0] = previous

    def wrap(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with during(name):
                return original(*args, **kwargs)

        setattr(owner, method, marked)

    wrap(Trainer, "save_checkpoint", "saving a checkpoint")
    wrap(_EvaluationLoop, "run", "validation")
    wrap(_FitLoop, "run", "training")
    wrap(ExportWeights, "on_train_end", "export and summary")
    wrap(RunSummary, "on_train_end", "export and summary")
    wrap(RunSummary, "on_fit_end", "export and summary")
