"""Processes that train together: which one this is, and that none outlives the first one."""

import os
import threading
import time

_LAUNCHER = "DLLM_VAR_LAUNCHER"  # process id of the first process, for those it starts
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
POLL = 0.25  # seconds between looks
_parent: int | None = None


def enter() -> None:
    """Marks this process as the launcher of those it starts. A launched process exits when its launcher dies."""
    global _parent
    launcher, launched = os.environ.get(_LAUNCHER), int(os.environ.get("LOCAL_RANK") or 0) > 0
    if launched and launcher == str(os.getppid()):
        _parent = int(launcher)
        threading.Thread(target=_end_with_parent, args=(_parent,), daemon=True, name="end-with-parent").start()
    elif launched and launcher and "RANK" not in os.environ:  # by Lightning's launcher, not torchrun's, which sets RANK
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
