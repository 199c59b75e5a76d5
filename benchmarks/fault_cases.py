"""Faults of processes, of the disk under them and of their parts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_tries import Case, Tries, in_training, last_word
from forked_runs import start
from short_run import fingerprint, recipe

FAIL_AT = 8  # step


def signals(tries: Tries) -> None:
    """Signals to one process and to two."""
    for name, number, statuses, said in (
        ("Ctrl-C", signal.SIGINT, {130}, "stopped at step"),
        ("SIGTERM", signal.SIGTERM, {143}, "stopped at step"),
        ("SIGUSR1", signal.SIGUSR1, {0}, "saved .* at step"),
    ):
        attempt = in_training(tries.begin(name))
        attempt.kill(number=number)
        tries.judge(name, attempt, statuses, said)
    attempt = in_training(tries.begin("SIGTERM two ranks", ranks=2))
    attempt.kill([1], signal.SIGTERM)
    tries.judge("SIGTERM to the second of two ranks", attempt, {143}, "stopped at step", ranks=2)
    attempt = tries.begin("SIGTERM start")
    attempt.wait(seconds=0.3)
    attempt.kill(number=signal.SIGTERM)
    tries.judge("SIGTERM while starting", attempt, {143, -15, 0}, "")


def full_disk(tries: Tries) -> None:
    """No room for a checkpoint, at once and after some."""

    def limit_at_save(saves: int) -> Callable[[], None]:
        def prepare() -> None:
            from dllm_var.training.checkpointing import Trainer

            original, left = Trainer.save_checkpoint, saves

            def save(*args: Any, **kwargs: Any) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                original(*args, **kwargs)

            Trainer.save_checkpoint = save  # type: ignore[method-assign]

        return prepare

    for saves, when in ((1, "the first"), (4, "a later")):
        attempt = tries.begin(f"disk {when}", before=limit_at_save(saves))
        tries.judge(f"no room for {when} checkpoint (file size limit)", attempt, {2}, "cannot write")
    if os.geteuid() == 0:
        small = tries.folder / "small"
        small.mkdir()
        if (
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], capture_output=True).returncode
            == 0
        ):
            try:
                attempt = tries.begin("disk full", f"--trainer.logger.init_args.save_dir={small}")
                attempt.wait()
                attempt.end()
                message = last_word(attempt, "cannot write|No space left") or attempt.message
                status = attempt.statuses.get(0)
                subprocess.run(["mount", "-o", "remount,size=50m", small], check=True)
                more = [f"--trainer.logger.init_args.save_dir={small}", "--resume=auto"]
                resumed = start(attempt.log.parent, ["fit", "--config", "recipe.yaml", *more])
                resumed.wait()
                runs = attempt.log.parent / "runs"
                shutil.rmtree(runs, ignore_errors=True)
                shutil.copytree(small, runs)
                after = "same weights" if fingerprint(attempt.log.parent) == tries.whole(1) else "other weights"
                good = status == 2 and "No space left" in message and after == "same weights"
                tries.cases.append(
                    Case("disk full (tmpfs of 300 KB), then room made", str(status), message, after, good)
                )
            finally:
                subprocess.run(["umount", small], check=False)


def broken_parts(tries: Tries) -> None:
    """A loader's process, a callback, a rank."""
    attempt = in_training(tries.begin("worker", "--data.num_workers=1", "--trainer.max_steps=24"))
    for child in children(attempt.pids.get(0, 0)):
        os.kill(child, signal.SIGKILL)
    tries.judge("the data loader's process killed", attempt, {2}, "DataLoader worker")

    failing = f"--trainer.callbacks+={{class_path: fault_tries.FailAt, init_args: {{step: {FAIL_AT}}}}}"
    attempt = tries.begin("callback", failing)
    tries.judge("exception in a callback", attempt, {1}, "KeyError|no such figure")
    text = attempt.output
    case = tries.cases[-1]
    case.good &= "go on with --resume" in text
    attempt = in_training(tries.begin("callback two ranks", failing, ranks=2))
    tries.judge("exception in a callback, two ranks", attempt, {1, 2}, "KeyError|no such figure", ranks=2)
    attempt = in_training(tries.begin("rank", ranks=2))
    attempt.kill([1])
    tries.judge("the second of two ranks killed", attempt, {1, 2, -signal.SIGKILL}, "lost contact|rank 1", ranks=2)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def steady_memory(folder: Path, steps: int) -> dict[str, Any]:
    """Memory of a long run with sampling, validation and checkpoints.

    Args:
        folder: Working folder.
        steps: How long; the first quarter is warm-up.

    Returns:
        Megabytes in the second quarter and in the last, and the growth between them.
    """
    settings = recipe(folder)
    settings["trainer"] |= {"max_steps": steps, "val_check_interval": 50}
    settings["trainer"]["callbacks"][1]["init_args"]["every_n_steps"] = 50
    settings["trainer"]["callbacks"][4]["init_args"]["every_n_train_steps"] = 50
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    attempt = start(folder, ["fit", "--config", "recipe.yaml"])
    seen: list[tuple[float, float]] = []
    page = resource.getpagesize() / 2**20

    def look() -> bool:
        try:
            resident = int(Path(f"/proc/{attempt.pids[0]}/statm").read_text().split()[1]) * page
        except (OSError, IndexError, KeyError):
            return False
        if attempt.now != "start-up" and (not seen or time.monotonic() - seen[-1][0] > 0.2):
            seen.append((time.monotonic(), resident))
        return False

    ended = attempt.wait(look, seconds=3_600)
    attempt.end()
    sizes = [size for _, size in seen]
    quarter = len(sizes) // 4
    early, late = (sorted(part)[len(part) // 2] for part in (sizes[quarter : 2 * quarter], sizes[-quarter:]))
    growth = late / early - 1
    return {
        "steps": steps,
        "second_quarter_mb": round(early, 1),
        "last_quarter_mb": round(late, 1),
        "growth": round(growth, 4),
        "good": ended and attempt.statuses == {0: 0} and abs(growth) < 0.02,
    }
