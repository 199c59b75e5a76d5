"""Short runs that do all that long ones do, in forks of one process that has imported everything: a second for each.

A fork does what `python -m dllm_var` does, from the arguments to the exit status, in a session and a log file of its
own. faults.py kills such runs and resumes them.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import hashlib
import json
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
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dllm_var.datamodules import CmudictSource

STEPS = 24
POLL = 0.002  # seconds between looks at a run
HANGS_AFTER = 300.0  # seconds
PR_SET_PDEATHSIG = 1  # of Linux' prctl


@cache
def _records() -> dict[str, str]:
    """Some of CMUdict, as JSON Lines by split."""
    source = CmudictSource()
    return {
        split: "".join(json.dumps(record) + "\n" for record in islice(source.records(split), number))
        for split, number in (("train", 90), ("validation", 12), ("test", 8))
    }


def recipe(folder: Path, absolute: bool = False) -> dict[str, Any]:
    """Writes a run's data into its working folder and returns its settings, with `absolute` paths if so asked."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in _records().items():
        (folder / f"{split}.jsonl").write_text(lines)
    place = folder if absolute else Path()
    splits = {"path": "train", "validation_path": "validation", "test_path": "test"}
    paths = {setting: str(place / f"{split}.jsonl") for setting, split in splits.items()}
    sampler = {"class_path": "dllm_var.sampling.BlockDiffusionSampler", "init_args": {"max_new_tokens": 12}}
    kept = {"every_n_train_steps": 3, "save_last": True, "monitor": "train/loss", "save_top_k": 2, "filename": "{step}"}
    shown = {"sampler": sampler, "num_examples": 2, "num_shown": 1, "every_n_steps": 10}
    callbacks = {
        "dllm_var.callbacks.SpeedMonitor": {},
        "dllm_var.callbacks.SamplingCallback": shown,
        "dllm_var.callbacks.ExportWeights": {},
        "dllm_var.callbacks.RunSummary": {"sampler": sampler, "num_examples": 4},
        "lightning.pytorch.callbacks.ModelCheckpoint": kept,
    }
    return {
        "model": {
            "transformer": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
            "schedule": {"kind": "cosine", "warmup_steps": 3},
        },
        "data": {
            "source": {"class_path": "dllm_var.datamodules.JsonlSource", "init_args": paths},
            "tokenizer": CmudictSource.default_tokenizer,
            "batch_size": 4,
            "context_length": 48,
            "packing": "best_fit",
            "canvas": 4,
            "cache_dir": str(place / "cache"),
        },
        "sampler": sampler,
        "trainer": {
            **dict(accelerator="cpu", devices=1, max_steps=STEPS, gradient_clip_val=1.0, log_every_n_steps=2),
            **dict(val_check_interval=6, check_val_every_n_epoch=None, num_sanity_val_steps=0),
            **dict(enable_progress_bar=False, enable_model_summary=False),
            "callbacks": [{"class_path": name, "init_args": settings} for name, settings in callbacks.items()],
        },
    }


def fingerprint(folder: Path) -> dict[str, str]:
    """Returns hashes of the weights, the state and the figures of a run: the same however often it was interrupted."""
    run = max((folder / "runs" / "recipe").glob("version_*"), key=lambda run: int(run.name.rpartition("_")[2]))
    weights = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "PackedDataModule")
    best = [state.get("best_model_score") for state in checkpoint["callbacks"].values() if "best_model_score" in state]
    summary = json.loads((run / "summary.json").read_text())
    for name in ("tokens_per_second", "decode_seconds", "train_seconds", "checkpoint", "weights"):
        summary.pop(name)
    states = {name: _digest(checkpoint[name]) for name in kept}
    return {"weights": weights, "best": _digest(best), **states, "summary": _digest(summary)}


def _digest(value: Any) -> str:
    def tensor(value: torch.Tensor) -> list[Any]:
        content = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), content]

    return hashlib.sha256(json.dumps(value, default=tensor, sort_keys=True).encode()).hexdigest()


@dataclass
class Attempt:
    """A run of one process or several."""

    log: Path  # its output
    pids: dict[int, int] = field(default_factory=dict)  # processes that have not been waited for, by rank
    statuses: dict[int, int] = field(default_factory=dict)  # exit statuses by rank; minus the number of a signal

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
    attempt = Attempt(folder / f"{len(list(folder.glob('*.log'))):03d}.log")
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
            _child(folder, attempt.log, list(arguments), environment, before)
        attempt.pids[rank] = pid
    return attempt


def _child(
    folder: Path, log: Path, arguments: list[str], environment: dict[str, str], before: Callable[[], None] | None
) -> None:
    status = 1
    try:
        os.setsid()
        atexit._clear()  # the parent's files are not this process's to remove
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive the campaign
        os.chdir(folder)
        os.environ |= environment
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(target, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.register(signal.SIGQUIT)  # shows where a run hangs
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
