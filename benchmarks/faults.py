"""Does a run that is killed at any moment, and resumed, end like one that was left alone?

    python benchmarks/faults.py                    # 290 kills, half an hour
    python benchmarks/faults.py --kills 6 --only kills accumulation

A short run that trains, validates, samples, saves and exports is killed (-9) at random moments, also while it writes a
checkpoint, and resumed until it is through: weights, optimizer, schedule, data position and figures must be those of a
run that was left alone. Single faults (signals, full disks, lost processes, damaged checkpoints, other data) are tests:
tests/training/test_endings.py and test_ranks.py.
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

from forked_runs import Attempt, start, warm_up
from short_run import fingerprint, write_recipe

RESULTS = Path(__file__).parent / "results"
TWO_RANKS = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
THREE_BATCHES = ["--trainer.accumulate_grad_batches=3", "--data.batch_size=1", "--trainer.val_check_interval=7"]
KILLS_PER_RUN = 6  # before it is left to finish
CALLS = 40  # about as many system calls that settle a checkpoint in one run
SAVE_SECONDS = 0.05
ALONE_SECONDS = 60.0  # for the other rank to end by itself, before it gets the SIGTERM that a launcher sends


@dataclass
class Campaign:
    """Kills of one kind of run, and what came of them.

    Args:
        arguments: Settings of the runs.
        ranks: Processes of each run.
        kills: How many processes, or groups of them, were killed.
        runs: Runs that went on to their end.
        phases: Phases in which they were killed, and how often.
        survivors: Ways in which the other rank ended when one was killed, and how often.
        failures: Whatever should not be.
    """

    arguments: Sequence[str] = ()
    ranks: int = 1
    kills: int = 0
    runs: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    survivors: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def run(self, folder: Path, kills: int, rng: random.Random) -> None:
        """Kills runs, with working folders in `folder`, until so many kills have been survived."""
        arguments = [*write_recipe(folder / "whole"), *(TWO_RANKS if self.ranks > 1 else []), *self.arguments]
        began = time.monotonic()
        whole = start(folder / "whole", arguments, self.ranks)
        whole.wait()
        life = time.monotonic() - began
        if not self._is_through(whole):
            return
        expected = fingerprint(folder / "whole")
        while self.kills < kills:
            working = folder / str(self.runs)
            write_recipe(working)
            history: list[str] = []
            for number in range(KILLS_PER_RUN + 1):
                resume = ["--resume=auto"] if number else []
                last = number == KILLS_PER_RUN
                where = self._run_and_kill(working, [*arguments, *resume], None if last else life, rng)
                if where is None:
                    break
                history.append(where)
            self.runs += 1
            try:
                found = fingerprint(working)
                wrong: Any = [name for name in expected if found[name] != expected[name]]
            except (OSError, IndexError, ValueError) as error:
                wrong = error
            if wrong:
                self.failures.append(f"{working}: other than expected: {wrong}; after kills in {'; '.join(history)}")
            else:
                shutil.rmtree(working)
            print(f"{self.kills} kills of {self.ranks} rank(s) in {self.runs} runs", file=sys.stderr, flush=True)

    def _is_through(self, attempt: Attempt) -> bool:
        if not attempt.pids and not any(attempt.statuses.values()):
            return True
        attempt.end()
        message = attempt.output.strip().rpartition("\n")[2]
        self.failures.append(f"{attempt.log}: ended with {attempt.statuses}: {message}")
        return False

    def _run_and_kill(self, folder: Path, arguments: list[str], life: float | None, rng: random.Random) -> str | None:
        """Runs until a random moment and kills; returns the phase, or None when the run was through before.

        A third of the kills come at a random moment of a run's whole `life` (None: none comes), a third while a
        checkpoint is being written, and a third right before or after one of the system calls that settle it.
        """
        way = rng.choice(("moment", "saving", "call")) if life is not None else "none"
        before = _kill_at_call(rng.randint(1, CALLS), rng.random() < 0.5) if way == "call" else None
        attempt = start(folder, arguments, self.ranks, before)
        if life is not None and way == "moment":
            ended = attempt.wait(seconds=rng.uniform(0, life))
        elif way == "saving":
            saves = rng.randint(1, 6)
            attempt.wait(lambda: attempt.phase[1] >= saves)
            time.sleep(rng.uniform(0, SAVE_SECONDS))
            ended = not attempt.poll()
        else:
            ended = attempt.wait(lambda: bool(attempt.statuses))
            ended = ended and -signal.SIGKILL not in attempt.statuses.values()
        if ended or way == "none":
            attempt.wait()
            self._is_through(attempt)
            return None
        where = attempt.now
        if self.ranks > 1 and (way == "call" or rng.random() < 0.5):
            self._kill_one(attempt, rng)
        else:
            attempt.kill()
            attempt.wait()
        self.kills += 1
        self.phases[where] += 1
        return f"{where} ({attempt.log.name})"

    def _kill_one(self, attempt: Attempt, rng: random.Random) -> None:
        """Kills one rank, unless it did so itself, and notes how the other ends, for which no launcher is there."""
        if -signal.SIGKILL not in attempt.statuses.values() and attempt.pids:
            attempt.kill([rng.choice(sorted(attempt.pids))])
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
    """Makes the first rank kill itself at one of the calls that settle a file on the disk."""

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


def as_markdown(results: dict[str, Any]) -> str:
    lines = ["# Faults tried, and what came of them", ""]
    lines += [f"`python benchmarks/faults.py`, {results['machine']}, {results['seconds']:.0f} s.", ""]
    for name, campaign in results["kills"].items():
        kills, runs, failures = campaign["kills"], campaign["runs"], campaign["failures"]
        lines += [
            f"## kill -9 of {name}",
            "",
            f"{kills} kills in {runs} runs, each resumed with `--resume`; {runs - len(failures)} runs ended with the "
            "weights, optimizer, schedule, data position and figures of a run that was left alone.",
            "",
            *(f"- killed during {phase}: {count}" for phase, count in campaign["phases"].most_common()),
            *(f"- the other rank ended {how}: {count}" for how, count in campaign["survivors"].most_common()),
            *(f"- FAILED: {failure}" for failure in failures),
            "",
        ]
    return "\n".join(lines)


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
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of faults.json and faults.md")
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
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "faults.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "faults.md").write_text(as_markdown(results))
    print(as_markdown(results))
    return 1 if any(campaign["failures"] for campaign in results["kills"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
