"""Faults of what runs leave on the disk and share there."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fault_tries import Case, Tries, in_training
from forked_runs import start
from short_run import fingerprint, runs_of, write_recipe

from dllm_var.checkpoints import run_files as files


def broken_checkpoints(tries: Tries) -> None:
    """A last checkpoint that cannot be used: it is named, and the previous one offered and taken."""
    half = tries.begin("half")
    half.wait(lambda: half.phase[1] >= 4 and half.now == "training")
    half.kill()
    half.wait()
    rng = random.Random(0)

    def other_version(path: Path) -> None:
        known, files.FORMAT = files.FORMAT, files.FORMAT + 1
        try:
            files.write_file({"a": 1}, path)
        finally:
            files.FORMAT = known

    def flipped(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    def pickled(path: Path) -> None:
        torch.save({"state_dict": Path("x"), "run": os.system}, path)

    damages: dict[str, Callable[[Path], Any]] = {
        "cut short": lambda path: path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)]),
        "one bit flipped": flipped,
        "empty": lambda path: path.write_bytes(b""),
        "of another version": other_version,
        "pickled objects in it": pickled,
        "a text file": lambda path: path.write_text("not a checkpoint"),
    }
    for name, damage in damages.items():
        working = tries.folder / re.sub(r"\W+", "-", f"last {name}")
        shutil.copytree(half.log.parent, working)
        last = runs_of(working)[-1] / "checkpoints" / "last.ckpt"
        time.sleep(0.02)
        damage(last)
        refused = start(working, ["fit", "--config", "recipe.yaml", "--resume"])
        refused.wait()
        refused.end()
        message = refused.message.replace(f"{working}/", "")
        offered = re.search(r"(--resume=\S+)$", message)
        after = "no other checkpoint is offered"
        if offered:
            taken = start(working, ["fit", "--config", "recipe.yaml", shlex.split(offered[1])[0]])
            taken.wait()
            taken.end()
            after = f"the one that is offered does not do: {taken.message}"
            if not any(taken.statuses.values()):
                after = "same weights" if fingerprint(working) == tries.whole(1) else "other weights"
        good = refused.statuses == {0: 2} and "last.ckpt" in message and after == "same weights"
        tries.cases.append(Case(f"last checkpoint {name}", str(refused.statuses.get(0)), message, after, good))


def other_data(tries: Tries) -> None:
    """Resuming on other data."""
    attempt = in_training(tries.begin("data"))
    attempt.kill()
    attempt.wait()
    data = attempt.log.parent / "train.jsonl"
    original = data.read_text()
    data.write_text(original.replace("a", "e"))
    refused = start(attempt.log.parent, ["fit", "--config", "recipe.yaml", "--resume"])
    refused.wait()
    refused.end()
    data.write_text(original)
    message = refused.message.replace(f"{attempt.log.parent}/", "")
    tries.judge(
        "(its own data again)", start(attempt.log.parent, ["fit", "--config", "recipe.yaml", "--resume"]), {0}, ""
    )
    own = tries.cases.pop()
    good = refused.statuses == {0: 2} and "data" in message and own.good
    tries.cases.append(
        Case("resumed on other data, then on its own", str(refused.statuses.get(0)), message, own.after, good)
    )


def shared_cache(tries: Tries) -> None:
    """Two runs build one cache of tokenized data at once, one of them is killed."""
    working = tries.folder / "shared"
    arguments = write_recipe(working)
    words = (working / "train.jsonl").read_text().splitlines()
    (working / "train.jsonl").write_text("\n".join(words * 300) + "\n")
    first, second = start(working, arguments), start(working, [*arguments, "--trainer.logger=false"])
    first.wait(lambda: any((working / "cache").glob(".*/tokens.bin")) if (working / "cache").exists() else False)
    first.kill()
    second.wait()
    second.end()
    after = "the other one trained to its end" if second.statuses == {0: 0} else second.message
    again = start(working, arguments)
    again.wait()
    good = second.statuses == {0: 0} and again.statuses == {0: 0}
    tries.cases.append(Case("killed while it and another run build one cache", "-9", "", after, good))


def real_processes(tries: Tries) -> None:
    """The command itself, as a user runs it: the same weights as in a fork, and the same after kills."""
    working = tries.folder / "command"
    command = [sys.executable, "-m", "dllm_var", *write_recipe(working)]
    rng = random.Random(0)
    for number in range(3):
        run = subprocess.Popen(
            [*command, "--resume=auto"], cwd=working, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        began = time.monotonic()
        saved = rng.choice((1, 3, 5))
        while run.poll() is None and time.monotonic() - began < 120:
            if len(list(working.glob("runs/recipe/*/checkpoints/*.ckpt"))) + number >= saved:
                break
            time.sleep(0.01)
        run.kill()
        run.communicate()
    run = subprocess.Popen([*command, "--resume=auto"], cwd=working, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, errors = run.communicate(timeout=300)
    same = run.returncode == 0 and fingerprint(working) == tries.whole(1)
    after = "same weights" if same else errors.decode()[-300:]
    fault = "python -m dllm_var killed three times, resumed; against the forks"
    tries.cases.append(Case(fault, str(run.returncode), "", after, same))
