"""Runs killed at random moments and resumed, again and again, until they are through."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked_runs import Attempt, start
from short_run import fingerprint, write_recipe

TWO_RANKS = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
THREE_BATCHES = ["--trainer.accumulate_grad_batches=3", "--data.batch_size=1", "--trainer.val_check_interval=7"]
KILLS_PER_RUN = 6  # before it is left to finish
CALLS = 40  # about as many system calls that settle a checkpoint in one run
SAVE_SECONDS = 0.05
ALONE_SECONDS = 60.0  # for the other rank to end by itself, before it is told to as torchrun and srun tell it at once


@dataclass
class Campaign:
    """What came of the kills.

    Args:
        ranks: Processes of each run.
        kills: How many processes, or groups of them, were killed.
        runs: Runs that went on to their end.
        phases: What they were doing when killed, and how often.
        survivors: How the other rank ended when one was killed, and how often.
        failures: Whatever should not be.
        seconds: How long it took.
    """

    ranks: int
    kills: int = 0
    runs: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    survivors: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kill_and_resume(
    folder: Path,
    kills: int,
    ranks: int,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
    settings: Sequence[str] = (),
) -> Campaign:
    """Kills runs until so many kills have been survived; each run must end with what an uninterrupted one ends with.

    A third of the kills come at a random moment of the whole life of a process, a third while a checkpoint is being
    written and a third right before or after one of the system calls that make it last (fsync, rename).

    Args:
        folder: Working folders go here.
        kills: How many.
        ranks: Processes of each run, of which one or all are killed.
        seed: Decides the moments.
        note: Told how far it has come.
        settings: Further settings of the runs.
    """
    rng = random.Random(seed)
    arguments = [*write_recipe(folder / "whole"), *(TWO_RANKS if ranks > 1 else []), *settings]
    began = time.monotonic()
    campaign = Campaign(ranks)
    whole = start(folder / "whole", arguments, ranks)
    whole.wait()
    life = time.monotonic() - began
    if not _is_through(whole, campaign, "uninterrupted"):
        return campaign
    expected = fingerprint(folder / "whole")
    while campaign.kills < kills:
        working = folder / str(campaign.runs)
        write_recipe(working)
        history: list[str] = []
        for number in range(KILLS_PER_RUN + 1):
            resume = ["--resume=auto"] if number else []
            where = _run_and_kill(
                working, [*arguments, *resume], campaign, rng, life if number < KILLS_PER_RUN else None
            )
            if where is None:
                break
            history.append(where)
        campaign.runs += 1
        campaign.seconds = time.monotonic() - began
        note(f"{campaign.kills} kills of {ranks} rank(s) survived in {campaign.runs} runs, {campaign.seconds:.0f} s")
        if (found := _fingerprint(working)) != expected:
            differing = [name for name in expected if found.get(name) != expected[name]]
            campaign.failures.append(f"{working}: {', '.join(differing)} differ after kills in {'; '.join(history)}")
        else:
            shutil.rmtree(working)
    return campaign


def _fingerprint(folder: Path) -> dict[str, str]:
    try:
        return fingerprint(folder)
    except (OSError, IndexError, ValueError):
        return {}


def _is_through(attempt: Attempt, campaign: Campaign, what: str) -> bool:
    if attempt.pids:
        attempt.end()
        campaign.failures.append(f"{attempt.log}: {what} run hung")
    elif any(attempt.statuses.values()):
        campaign.failures.append(f"{attempt.log}: {what} run ended with {attempt.statuses}: {attempt.message}")
    else:
        return True
    return False


def _run_and_kill(
    folder: Path, arguments: list[str], campaign: Campaign, rng: random.Random, life: float | None
) -> str | None:
    """Runs until a random moment and kills; returns where that was, or None when the run was through before."""
    if life is None:
        attempt = start(folder, arguments, campaign.ranks)
        attempt.wait()
        _is_through(attempt, campaign, "resumed")
        return None
    way = rng.choice(("moment", "saving", "call"))
    before = _kill_at_call(rng.randint(1, CALLS), rng.random() < 0.5) if way == "call" else None
    attempt = start(folder, arguments, campaign.ranks, before)
    if way == "moment":
        ended = attempt.wait(seconds=rng.uniform(0, life))
    elif way == "saving":
        saves = rng.randint(1, 6)
        ended = attempt.wait(lambda: attempt.phase[1] >= saves)
        time.sleep(rng.uniform(0, SAVE_SECONDS))
        ended = not attempt.poll()
    else:
        ended = attempt.wait(lambda: bool(attempt.statuses))
        ended = ended and not any(status == -signal.SIGKILL for status in attempt.statuses.values())
    if ended:
        _is_through(attempt, campaign, "resumed")
        return None
    where = attempt.now
    if campaign.ranks > 1 and (way == "call" or rng.random() < 0.5):
        _kill_one(attempt, campaign, rng)
    else:
        attempt.kill()
        attempt.wait()
    campaign.kills += 1
    campaign.phases[where] += 1
    return f"{where} ({attempt.log.name})"


def _kill_one(attempt: Attempt, campaign: Campaign, rng: random.Random) -> None:
    """Kills one rank, unless it did so itself, and sees how the other ends.

    There is no launcher here that would end it. One that waits for the first rank to appear does so for minutes.
    """
    if not any(status == -signal.SIGKILL for status in attempt.statuses.values()) and attempt.pids:
        attempt.kill([rng.choice(sorted(attempt.pids))])
    by_itself = attempt.wait(seconds=ALONE_SECONDS)
    if not by_itself:
        attempt.kill(number=signal.SIGTERM)
        if not attempt.wait(seconds=ALONE_SECONDS):
            attempt.end()
            campaign.failures.append(f"{attempt.log}: the other rank hangs, even when told to end")
            return
    others = [status for status in attempt.statuses.values() if status != -signal.SIGKILL]
    how = "by itself" if by_itself else "when told to, as launchers do"
    campaign.survivors.update(f"{how}, exit status {status}" for status in others)


def _kill_at_call(number: int, after: bool) -> Callable[[], None]:
    """Makes the process kill itself at one of the calls that settle a file on the disk."""

    def prepare() -> None:
        if int(os.environ.get("RANK", "0")):
            return
        left = number

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0 and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*args, **kwargs)
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in ("fsync", "replace", "rename", "unlink"):
            setattr(os, name, wrap(getattr(os, name)))

    return prepare
