"""Processes that train together and end together: none is left waiting for one that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dllm_var.errors import UserError

_LAUNCHER = "DLLM_VAR_LAUNCHER"  # process id of the first process, for those it starts
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# What Lightning, torchrun and SLURM read as numbers.
_COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
_NUMBERS = (*_RANKS, *_COUNTS, "MASTER_PORT", "SLURM_LOCALID", "SLURM_NODEID")
POLL = 0.25  # seconds between looks
GRACE = 5.0  # seconds a process has to end by itself
_parent: int | None = None


def enter() -> None:
    """Marks this process as the launcher of those it starts. A launched process exits when its launcher dies.

    Runs before anything heavy is imported, so that a launcher that dies meanwhile leaves no process behind.

    Raises:
        UserError: When a variable of the environment that says the process reads as a number is none.
    """
    global _parent
    for name in _NUMBERS:
        value = os.environ.get(name)
        if value and not value.isdigit():
            raise UserError(f"the environment variable {name} must be a number, got '{value}': unset it, or mend it")
    launcher, started = os.environ.get(_LAUNCHER), int(os.environ.get("LOCAL_RANK") or 0) > 0
    if started and launcher == str(os.getppid()):
        _parent = int(launcher)
        threading.Thread(target=_end_with_parent, args=(_parent,), daemon=True, name="end-with-parent").start()
    elif started and launcher and "RANK" not in os.environ:  # by Lightning's launcher, not torchrun's, which sets RANK
        os._exit(1)
    else:
        os.environ[_LAUNCHER] = str(os.getpid())


def is_launched_child() -> bool:
    """Whether the first process of the run, on this machine, has started this one."""
    return _parent is not None


def is_first() -> bool:
    """Whether this is the first process of its run, by what Lightning's launcher, torchrun, SLURM and LSF set."""
    return not any(int(os.environ.get(name) or 0) for name in _RANKS)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


class Children:
    """The processes that Lightning's launcher has started, watched from the first one.

    Lightning's own watch kills the first process without a word when another has failed; this one takes its place.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[Any]] = []
        self.explain: Callable[[str], str] = str
        self._ending = threading.Event()
        self._lost: str | None = None

    def take_over(self, launcher: Any, explain: Callable[[str], str]) -> None:
        """Begins to watch.

        Args:
            launcher: The strategy's; has started its processes.
            explain: Makes the message of what befell one of them.
        """
        started = getattr(launcher, "procs", None)
        if not started:
            return
        self.processes, self.explain = list(started), explain
        started.clear()  # Lightning's observer has the same list
        threading.Thread(target=self._watch, daemon=True, name="watch-ranks").start()

    def _watch(self) -> None:
        while not self._ending.wait(POLL):
            if self.lost() is not None and not self._ending.wait(GRACE):
                print(f"error: {self.explain(self.lost() or '')}", file=sys.stderr, flush=True)
                self.kill()
                os._exit(1)

    def lost(self) -> str | None:
        """Says which process was seen to fail first, and how; None when all are well."""
        for rank, process in enumerate(self.processes, 1):
            status = process.poll()
            if status and self._lost is None:  # those killed because of it are not the cause
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                self._lost = f"rank {rank} of {len(self.processes) + 1} (process {process.pid}) {how}"
        return self._lost

    def end(self, failed: bool) -> str | None:
        """Waits for the processes to end, and ends those that do not.

        Args:
            failed: Whether this process ends with an error, so that the others may be waiting for it in vain.

        Returns:
            Which of them had failed before.
        """
        self._ending.set()
        deadline = time.monotonic() + (GRACE / 2 if failed else 2 * GRACE)
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            if failed and self.lost():
                break
            time.sleep(POLL / 5)
        lost = self.lost()
        self.kill()
        return lost

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
