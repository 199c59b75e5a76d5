"""How long does `fit` take until its first step begins, on cached data, and how much of it is not torch and Lightning?

    python benchmarks/start_up.py

Each round is a new process that imports torch and Lightning, notes the time, and goes on with the quickstart's command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def child(began: float) -> None:
    """Runs the command as far as its first step, and prints the seconds of the imports and of all."""
    import lightning.pytorch as lightning
    import torch  # noqa: F401

    imported = time.time()

    class FirstStep(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            times = {"imports": imported - began, "first step": time.time() - began, "ours": time.time() - imported}
            print("\n" + json.dumps(times), flush=True)
            os._exit(0)

    sys.modules["first_step"] = module = type(sys)("first_step")
    module.FirstStep = FirstStep
    FirstStep.__module__, FirstStep.__qualname__ = "first_step", "FirstStep"
    from dllm_var.__main__ import main as command

    config = ROOT / "configs" / "quickstart.yaml"
    sys.argv = ["dllm_var", "fit", f"--config={config}", "--trainer.callbacks+=first_step.FirstStep"]
    command()
    raise SystemExit("the first step never came")


def measure(folder: str) -> dict[str, float]:
    """Starts a process and returns its seconds."""
    command = [sys.executable, __file__, "--child", repr(time.time())]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes, after one that fills the cache")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
    with tempfile.TemporaryDirectory() as folder:
        measure(folder)
        rounds = [measure(folder) for _ in range(options.repeats)]
    for name in rounds[0]:
        print(f"{name:10} {median(one[name] for one in rounds):5.2f} s")


if __name__ == "__main__":
    main()
