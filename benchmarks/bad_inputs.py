"""Is every bad input refused in one line that names it, or used whole? A table of commands and outcomes.

    python benchmarks/bad_inputs.py                # all, some minutes
    python benchmarks/bad_inputs.py "fit --data"   # cases whose names begin so
    python benchmarks/bad_inputs.py --random 100   # more random damage

bad_inputs.yaml has good commands, and one thing at a time that is changed about them.
A traceback, a hang, a partial file under the name of an output, and a use of an input without sense are defects.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from short_runs import recipe, start, warm_up

HERE = Path(__file__).parent
RUN = Path("runs/recipe/version_0")
LAST = str(RUN / "checkpoints" / "last.ckpt")
TABLES: dict[str, Any] = yaml.safe_load((HERE / "bad_inputs.yaml").read_text())
GOOD: dict[str, list[str]] = {name: line.split() for name, line in TABLES["commands"].items()}
PATIENCE = 60.0  # seconds
MEMORY = 16 * 2**30  # bytes of address space
FILES: dict[str, Any] = {  # instead of a good file: its content, a function that makes it, or a name without a file
    **TABLES["absent"],
    **{kind: content.encode("latin-1") for kind, content in TABLES["contents"].items()},
    "deeply nested": b"[" * 100_000,
    "an object": lambda path: torch.save({"a": random.Random()}, path),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a loop of links": lambda path: path.symlink_to(path.name),
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
}


@dataclass(frozen=True)
class Case:
    """A command with one thing wrong."""

    name: str  # the command first
    arguments: list[str]
    named: tuple[str, ...] = ()  # words of which the message has one
    prepare: Callable[[Path], Any] = id  # spoils the working folder
    output: str = "figures.json"  # must be whole or absent
    usable: bool = False  # whether the input may be used

    @property
    def command(self) -> str:
        return self.name.split()[0].rstrip(",")


def write_inputs(folder: Path) -> None:
    """Writes the files that the commands read, but for the run."""
    settings = recipe(folder)
    settings["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
    settings["trainer"]["callbacks"][1]["init_args"]["every_n_steps"] = 2
    settings["trainer"]["callbacks"][4]["init_args"]["every_n_train_steps"] = 2
    (folder / "recipe.yaml").write_text(json.dumps(settings, indent=1))
    threshold = {"name": "threshold", "role": "default", "sampler": settings["sampler"]}
    source, model = settings["data"]["source"], str(RUN / "model")
    task = {"name": "tiny", "source": source, "checkpoint": model, "entries": [threshold]}
    (folder / "bench.yaml").write_text(json.dumps({"tasks": [task]}))
    (folder / "prompts.jsonl").write_text('{"prompt": "key"}\n{"prompt": "cat"}\n')
    (folder / "train.d").mkdir()
    (folder / "full").symlink_to("/dev/full")
    (folder / "loop").symlink_to("loop")


def make_base(folder: Path) -> None:
    """Makes a folder with a finished run, and the files that commands read beside it."""
    write_inputs(folder)
    run = start(folder, ["fit", "--config=recipe.yaml"])
    run.wait()
    assert run.statuses == {0: 0}, run.output


def entries(table: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the entries of a table: a command, and the words after it."""
    for entry in TABLES[table]:
        command, *rest = entry.split()
        yield command, rest


def changed(command: str, option: str, value: str) -> list[str]:
    """Returns the good command with one option replaced."""
    kept = [word for word in GOOD[command] if word.partition("=")[0] != option]
    if option == "--prompts-file":
        kept.remove("--prompt=key")
    return [*kept, f"{option}={value}"]


def spoil(name: Path | str, content: Any, folder: Path) -> None:
    """Puts something bad under a name."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)


def damage(pattern: str, seed: int, folder: Path) -> None:
    """Cuts, overwrites or flips bytes of one of the files at random places."""
    rng = random.Random(f"{pattern} {seed}")
    path = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
    data = bytearray(path.read_bytes())
    place, size = rng.randrange(len(data)), rng.choice((1, 8, 100, 4_000))
    way = rng.choice(("cut", "overwrite", "flip", "remove", "repeat"))
    if way == "cut":
        del data[place:]
    elif way == "overwrite":
        data[place : place + size] = rng.randbytes(size)
    elif way == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif way == "remove":
        del data[place : place + size]
    else:
        data[place:place] = data[place : place + size]
    path.write_bytes(data)


def bad_files() -> Iterator[Case]:
    """Yields bad files in place of inputs, of parts of a run, and of outputs."""
    for command, (option, *suffix) in entries("inputs"):
        for kind, content in FILES.items():
            if kind == "a pipe" and option == "--prompts-file":  # its writer is waited for
                continue
            without_file = isinstance(content, str)
            value = content.format(*suffix or [""]) if without_file else f"bad{''.join(suffix)}"
            named = (option.lstrip("-").rpartition(".")[2], "bad", "'nothing", "train split", "utf-8")
            prepare = id if without_file else partial(spoil, value, content)
            yield Case(" ".join([command, option, *suffix, kind]), changed(command, option, value), named, prepare)
    for command, (part,) in entries("parts"):
        for kind, content in FILES.items():
            if not isinstance(content, str):
                prepare, named = partial(spoil, RUN / part, content), (Path(part).name, "terminators", "'nothing")
                yield Case(f"{command} of a run whose {part} is {kind}", GOOD[command], named, prepare)
    for command, (option, name) in entries("outputs"):
        for kind, place in TABLES["places"].items():
            value = place.format(name if kind != "too long a name" else "x" * 300)
            named = (option.lstrip("-").rpartition(".")[2], value or "output", name)
            yield Case(f"{command} {option} {kind}", changed(command, option, value), named, output=value)


def bad_options() -> Iterator[Case]:
    """Yields numbers and settings without sense."""
    for command, options in entries("counted"):
        for option in options:
            word = option.lstrip("-").removeprefix("mc-").rpartition(".")[2]
            for value in TABLES["numbers"]:
                named = (word, word.replace("-", "_"))
                yield Case(f"{command} {option}={value}", changed(command, option, value), named)
    for command, settings in entries("settings"):
        for setting in settings:
            yield Case(f"{command} {setting}", [*GOOD[command], setting.replace("~", "\udcff")])


def random_damage(number: int) -> Iterator[Case]:
    """Yields files with damage at random places."""
    last = changed("generate", "--checkpoint", LAST)
    listed = changed("generate", "--prompts-file", "prompts.jsonl")
    for kind, pattern, command, arguments in (
        ("recipe", "recipe.yaml", "fit", GOOD["fit"]),
        ("tables", "cache/*/*", "fit", GOOD["fit"]),
        ("checkpoint", LAST, "resume", GOOD["resume"]),
        ("checkpoint", LAST, "generate", last),
        ("model", str(RUN / "model" / "*.*"), "generate", GOOD["generate"]),
        ("model", str(RUN / "model" / "*.*"), "export", GOOD["export"]),
        ("prompts", "prompts.jsonl", "generate", listed),
    ):
        for seed in range(number):
            prepare = partial(damage, pattern, seed)
            yield Case(f"{command}, damaged {kind} {seed}", arguments, prepare=prepare, usable=True)


def all_cases(number: int) -> list[Case]:
    """Returns all cases, `number` of each kind of random damage."""
    cases = [*bad_files(), *bad_options(), *random_damage(number)]
    return [case for case in cases if case.command != "evaluate" or find_spec("lm_eval")]


def is_whole(output: Path, succeeded: bool) -> bool:
    """Whether an output is whole, or absent after a failure."""
    if output.suffix == ".json" and os.path.isfile(output):
        try:
            return isinstance(json.loads(output.read_text()), dict)
        except ValueError:
            return False
    return succeeded or not (os.path.isfile(output) or (output.name == "exported" and os.path.isdir(output)))


def judge(case: Case, status: int | None, text: str, folder: Path) -> tuple[str, str]:
    """Returns the outcome of a case (`refused` and `used` are right), and its message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((index for index, line in enumerate(lines) if line.startswith("error: ")), len(lines))
    message = " / ".join(lines[said:] or lines[-3:])[:500]
    if any(mark in text for mark in ("Traceback (most recent call last)", "Exception ignored", "Exception in thread")):
        return "traceback", message
    if status is None:
        return "hang", message
    if not is_whole(folder / case.output, status == 0):
        return "partial", message
    if status == 0:
        return "used" if case.usable or case.name in TABLES["usable"] else "accepted", message
    if status not in (1, 2):
        return f"status {status}", message
    if said != len(lines) - 1:
        return "no single line", message
    unnamed = case.named and not any(name in message for name in case.named)
    return "unnamed" if unnamed else "refused", message


def attempt(case: Case, base: Path, folder: Path) -> tuple[str, str]:
    """Runs a case in a copy of the base; returns as `judge`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder / "work", symlinks=True)
    case.prepare(folder / "work")

    def before() -> None:
        os.chdir(folder / "work")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.environ |= {"DLLM_VAR_CACHE": str(folder / "work" / "cache"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

    run = start(folder, case.arguments, before=before)
    ended = run.wait(seconds=PATIENCE)
    run.end()
    return judge(case, run.statuses.get(0) if ended else None, run.output, folder / "work")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases whose name begins so")
    parser.add_argument("--random", type=int, default=10, help="cases of each kind of random damage")
    options = parser.parse_args()
    warm_up()
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="bad-") as name:
        base, folder = Path(name) / "base", Path(name) / "case"
        make_base(base)
        for case in all_cases(options.random):
            if options.names and not case.name.startswith(tuple(options.names)):
                continue
            if case.command not in counts:  # the good command must do
                result, message = attempt(Case(case.command, GOOD[case.command], usable=True), base, folder)
                assert result == "used", (case.command, result, message)
            result, message = attempt(case, base, folder)
            counts.setdefault(case.command, Counter())[result] += 1
            if result not in ("used", "refused"):
                print(f"{result:<10} {case.name[:120]!r}: {message}", flush=True)
    lines = ["| command | inputs | refused | used | defects |", "|---|--:|--:|--:|--:|"]
    for command, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        defects = count.total() - count["refused"] - count["used"]
        lines.append(f"| {command} | {count.total()} | {count['refused']} | {count['used']} | {defects} |")
    print("\n".join(lines))
    if not options.names:
        head = "# Bad inputs to every command\n\nRefused with one line that names the cause, or used whole.\n\n"
        (HERE / "results" / "bad_inputs.md").write_text(head + "\n".join(lines) + "\n")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
