"""Does a run that is killed at any moment, and resumed, end like one that was left alone?

    python benchmarks/faults.py                    # 290 kills, half an hour
    python benchmarks/faults.py --kills 6 --only kills accumulation

A short run that trains, validates, samples, saves and exports is killed (-9) at random moments, or right before or
after one of the system calls that settle its files, and resumed until it is through: weights, optimizer, schedule, data
position and figures must be those of a run that was left alone. Single faults (signals, full disks, lost processes,
damaged checkpoints, other data) are tests: tests/training/test_endings.py and test_ranks.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from short_runs import Attempt, fingerprint, recipe, start, warm_up

TWO_RANKS = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
THREE_BATCHES = ["--trainer.accumulate_grad_batches=3", "--data.batch_size=1", "--trainer.val_check_interval=7"]
KILLS_PER_RUN = 6  # before it is left to finish
CALLS = ("fsync", "replace", "rename", "unlink")  # that settle a file on the disk
CALLS_PER_RUN = 40  # about as many
ALONE_SECONDS = 60.0  # for the other rank to end by itself, before it gets the SIGTERM that a launcher sends


@dataclass
class Campaign:
    """Kills of one kind of run, and what came of them."""

    arguments: Sequence[str] = ()
    ranks: int = 1
    kills: Counter[str] = field(default_factory=Counter)  # of one process or of all, by the way they came
    runs: int = 0  # that went on to their end
    survivors: Counter[str] = field(default_factory=Counter)  # ways in which the other rank ended when one was killed
    failures: list[str] = field(default_factory=list)  # whatever should not be

    def run(self, folder: Path, kills: int, rng: random.Random) -> None:
        """Kills runs, with working folders in `folder`, until so many kills have been survived."""
        arguments = [*(TWO_RANKS if self.ranks > 1 else []), *self.arguments]
        began = time.monotonic()
        if not self._ends_well(self._start(folder / "whole", arguments)):
            return
        life, expected = time.monotonic() - began, fingerprint(folder / "whole")
        while self.kills.total() < kills:
            working = folder / str(self.runs)
            for number in range(KILLS_PER_RUN + 1):
                resumed = [*arguments, *(["--resume=auto"] if number else [])]
                if number == KILLS_PER_RUN:
                    self._ends_well(self._start(working, resumed))
                elif not self._is_killed(working, resumed, life, rng):
                    break
            self.runs += 1
            try:
                found = fingerprint(working)
                wrong: Any = [name for name in expected if found[name] != expected[name]]
            except (OSError, ValueError) as error:
                wrong = error
            if wrong:
                self.failures.append(f"{working}: other than expected: {wrong}")
            else:
                shutil.rmtree(working)
            print(f"{self.kills.total()} kills of {self.ranks} rank(s) in {self.runs} runs", file=sys.stderr)

    def _start(self, folder: Path, arguments: Sequence[str], before: Callable[[], None] | None = None) -> Attempt:
        if not folder.exists():
            settings = recipe(folder)
            (folder / "recipe.yaml").write_text(json.dumps(settings))
        return start(folder, ["fit", "--config=recipe.yaml", *arguments], self.ranks, before)

    def _ends_well(self, attempt: Attempt) -> bool:
        if attempt.wait() and not any(attempt.statuses.values()):
            return True
        attempt.end()
        message = attempt.output.strip().rpartition("\n")[2]
        self.failures.append(f"{attempt.log}: ended with {attempt.statuses}: {message}")
        return False

    def _is_killed(self, folder: Path, arguments: Sequence[str], life: float, rng: random.Random) -> bool:
        """Runs until a moment of a whole `life`, or until one of `CALLS`; False when the run is through before."""
        at_call = rng.random() < 0.5
        before = _kill_at_call(rng.randint(1, CALLS_PER_RUN), rng.random() < 0.5) if at_call else None
        attempt = self._start(folder, arguments, before)
        if at_call:
            attempt.wait(lambda: bool(attempt.statuses))
        else:
            attempt.wait(seconds=rng.uniform(0, life))
        one_killed = -signal.SIGKILL in attempt.statuses.values()
        if not one_killed and (at_call or not attempt.pids):
            self._ends_well(attempt)
            return False
        self.kills["at a call" if at_call else "at a moment"] += 1
        if self.ranks == 1 or (not at_call and rng.random() < 0.5):
            attempt.kill()
            attempt.wait()
            return True
        if not one_killed:
            attempt.kill([rng.choice(sorted(attempt.pids))])
        self._see_the_other_end(attempt)
        return True

    def _see_the_other_end(self, attempt: Attempt) -> None:
        """Notes how the other rank ends, for which no launcher is there."""
        how = "by itself"
        if not attempt.wait(seconds=ALONE_SECONDS):
            how = "when told to, as launchers do"
            attempt.kill(number=signal.SIGTERM)
            if not attempt.wait(seconds=ALONE_SECONDS):
                attempt.end()
                self.failures.append(f"{attempt.log}: the other rank hangs, even when told to end")
                return
        others = [status for status in attempt.statuses.values() if status != -signal.SIGKILL]
        self.survivors.update(f"{how}, exit status {status}" for status in others)


def _kill_at_call(number: int, after: bool) -> Callable[[], None]:
    """Makes the first rank kill itself right before, or after, the given number of calls that settle a file."""

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

        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))

    return prepare


def main() -> int:
    both = "one or both of two processes"
    campaigns = {
        "kills": {"one process": Campaign()},
        "ranks": {both: Campaign(ranks=2)},
        "accumulation": {
            "one process, three batches a step": Campaign(THREE_BATCHES),
            f"{both}, three batches a step": Campaign(THREE_BATCHES, ranks=2),
        },
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=campaigns, default=list(campaigns), help="parts of it")
    parser.add_argument("--kills", type=int, default=200, help="kills of runs of one process; a seventh of all others")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    options = parser.parse_args()
    began = time.monotonic()
    warm_up()
    results: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "kills": {}}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        for part in options.only:
            for title, campaign in campaigns[part].items():
                kills = options.kills if part == "kills" else max(2, options.kills // 7)
                campaign.run(Path(name) / title.replace(" ", "-"), kills, random.Random(0))
                results["kills"][title] = vars(campaign)
    results["seconds"] = time.monotonic() - began
    text = json.dumps(results, indent=1)
    options.output.write_text(text + "\n")
    print(text)
    return 1 if any(campaign["failures"] for campaign in results["kills"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
