"""Inputs that are broken in many ways, given to the same code that reads good ones.

    python benchmarks/malformed_inputs.py config 0 50     # the first fifty configs; prints those that went wrong
    python benchmarks/malformed_inputs.py config 7 8 -v   # one of them

Each input follows from its kind and a number. It must be refused with one line that names the cause, or be used whole.
`benchmarks/faults.py` tries more than a thousand of them, the test suite some of each kind.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malformed_data import Partial, jsonl, parquet
from malformed_models import checkpoint, config, prompt

from dllm_var.errors import UserError

SECONDS = 120  # an input that takes longer hangs
KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "jsonl": jsonl,
    "parquet": parquet,
    "config": config,
    "checkpoint": checkpoint,
    "prompt": prompt,
}


@dataclass
class Outcome:
    """What became of one input.

    Args:
        kind: Kind of input.
        number: Which one.
        result: ``refused`` (with a message) or ``used``; else ``crashed``, ``hung``, ``partial`` or ``unclear``.
        message: What the user is told, or the end of the traceback.
    """

    kind: str
    number: int
    result: str
    message: str

    @property
    def good(self) -> bool:
        return self.result in ("refused", "used")


class Hung(BaseException):
    """Took too long."""


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def attempt(kind: str, number: int, folder: Path) -> Outcome:
    """Gives one malformed input to the code that reads its kind.

    Args:
        kind: One of `KINDS`.
        number: Decides the input.
        folder: Emptied first, then used for files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(f"{kind} {number}")
    try:
        with _time_limit():
            KINDS[kind](rng, folder)
    except UserError as error:
        text = str(error)
        one_line = bool(text.strip()) and "\n" not in text.strip() and "Traceback" not in text
        return Outcome(kind, number, "refused" if one_line else "unclear", text)
    except Hung:
        return Outcome(kind, number, "hung", f"more than {SECONDS} s")
    except Partial as error:
        return Outcome(kind, number, "partial", str(error))
    except Exception:
        return Outcome(kind, number, "crashed", "".join(traceback.format_exc().splitlines(keepends=True)[-6:]))
    return Outcome(kind, number, "used", "")


def main() -> None:
    """Tries inputs of one kind: KIND FIRST LAST [-v]."""
    kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            outcome = attempt(kind, number, Path(folder) / "work")
            counts[outcome.result] += 1
            if "-v" in sys.argv or not outcome.good:
                print(f"{kind} {number}: {outcome.result}: {outcome.message}", flush=True)
    print(kind, dict(counts))


if __name__ == "__main__":
    main()
