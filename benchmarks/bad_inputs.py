"""Bad inputs to every command: each must be refused with one line that names the cause, or be used whole.

    python benchmarks/bad_inputs.py                      # all; writes results/bad_inputs.md
    python benchmarks/bad_inputs.py "generate --output"  # those whose name begins so; prints what went wrong
    python benchmarks/bad_inputs.py -v export            # prints all of them

A case is a good command with one thing changed, most by bad_inputs.yaml. It runs in a fork of a process that has
imported everything, in a copy of a folder with a finished run. A refusal is an exit status of 1 or 2 and one `error:`
line that names the option, setting or file; what then lies under the name of the output is whole. Full and read-only
disks need root, `evaluate` needs lm-eval.
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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from fault_tries import after_step, limit_files, mount, redirect
from forked_runs import start, warm_up
from malformed_data import damaged_checkpoint, damaged_file, damaged_recipe, jsonl, parquet, read_data
from short_run import LAST, MODEL, RUN, make_base

HERE = Path(__file__).parent
TABLES: dict[str, Any] = yaml.safe_load((HERE / "bad_inputs.yaml").read_text())
GOOD: dict[str, list[str]] = {name: line.split() for name, line in TABLES["commands"].items()}
PATIENCE = 10.0  # seconds beyond what the good command takes
MEMORY = 16 * 2**30  # bytes of address space
DOUBLED = b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 64))
FILES: dict[str, Any] = {  # instead of a good file: its content, what makes it, or a name under which there is none
    "missing": "bad{}", "empty": b"", "a folder": Path.mkdir, "a pipe": os.mkfifo, "zeros": bytes(1_000),
    "a loop of links": lambda path: path.symlink_to(path.name), "below a file": "recipe.yaml/bad{}",
    "too long a name": "bad" * 100 + "{}", "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
    "not UTF-8": b"\xff\xfe\x00caf\xe9: [", "broken": b'{"a": [1, \n- b: }', "a number": b"3", "a list": b"[1, 2]",
    "deeply nested": b"[" * 100_000, "a name of half characters": "bad\udcff{}", "foreign": b'{"nothing": {"a": 1}}',
    "a bomb of aliases": b"a0: &a0 [1, 1]\n" + DOUBLED,
}  # fmt: skip
CHECKPOINTS: dict[str, Any] = {  # of others
    "Lightning's": {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, "a list": [1], "a tensor": torch.ones(3),
    "an object": {"a": random.Random()}, "empty": {"dllm_var": {}, "state_dict": {}}, "half of one": {"dllm_var": 3},
    "without weights": {"dllm_var": {"transformer": {"hidden_size": 16}}, "state_dict": {"a": torch.ones(1)}},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command with one thing wrong.

    Args:
        name: The command, and what is wrong.
        arguments: What follows `python -m dllm_var`.
        named: Of these the message names one; none is asked for when empty.
        prepare: Spoils the working folder.
        before: Spoils the process.
        output: Is whole or not there.
        usable: Whether it may be used.
    """

    name: str
    arguments: list[str]
    named: tuple[str, ...] = ()
    prepare: Callable[[Path], Any] = id
    before: Callable[[], Any] = int
    output: str = "figures.json"
    usable: bool = False

    @property
    def command(self) -> str:
        return self.name.split()[0].rstrip(",")


def entries(table: str) -> Iterator[tuple[str, list[str]]]:
    """The entries of a table: command, and what follows it."""
    for entry in TABLES[table]:
        command, *rest = entry.split()
        yield command, rest


def changed(command: str, option: str, value: str) -> list[str]:
    """The good command with one option, or its argument, replaced."""
    kept = [word for word in GOOD[command] if word.partition("=")[0] != option]
    if option == "--prompts-file":
        kept.remove("--prompt=key")
    return [kept[0], value] if option == "RUN" else [*kept, f"{option}={value}"]


def spoil(name: Path | str, content: Any, folder: Path) -> None:
    """Puts something bad under a name."""
    if not isinstance(content, str):
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)


PLACES = {
    "on a full disk": partial(mount, "small", "size=8k", full=True),
    "on a read-only disk": partial(mount, "sealed", "ro"),
    "beyond a limit": partial(limit_files, 1),
}


def from_tables() -> Iterator[Case]:
    """Bad files, outputs, numbers, settings, variables and streams."""
    for command, (option, *suffix) in entries("inputs"):
        for kind, content in FILES.items():
            if kind == "a pipe" and option == "--prompts-file":  # its writer is waited for
                continue
            value = content.format(*suffix or [""]) if isinstance(content, str) else f"bad{''.join(suffix)}"
            named = (option.lstrip("-").rpartition(".")[2], "bad", "'nothing", "train split", "utf-8")
            name = " ".join([command, option, *suffix, kind])
            yield Case(name, changed(command, option, value), named, partial(spoil, value, content))
    for command, (part,) in entries("parts"):
        for kind, content in FILES.items():
            prepare = partial(spoil, RUN / part, Path.touch if kind == "missing" else content)
            if not isinstance(content, str):
                named = (Path(part).name, "terminators", "'nothing")
                yield Case(f"{command} of a run whose {part} is {kind}", GOOD[command], named, prepare)
    for command, (option, name) in entries("outputs"):
        for kind, place in TABLES["places"].items():
            value = place.format(name if kind != "too long a name" else "x" * 300)
            named = (option.lstrip("-").rpartition(".")[2], value or "output", name)
            case = partial(Case, f"{command} {option} {kind}", changed(command, option, value), named, output=value)
            yield case(before=PLACES.get(kind, int))
    for command, options in entries("counted"):
        for option in options:
            word = option.lstrip("-").removeprefix("mc-").rpartition(".")[2]
            for value in TABLES["numbers"]:
                named = (word, word.replace("-", "_"))
                yield Case(f"{command} {option}={value}", changed(command, option, value), named)
    for command, settings in entries("settings"):
        for setting in settings:
            yield Case(f"{command} {setting}", [*GOOD[command], setting.replace("~", "\udcff")])
    for command, settings in entries("environment"):
        for setting in settings:
            name, _, value = setting.partition("=")
            before = partial(os.environ.__setitem__, name, value)
            yield Case(f"{command} with {setting}", GOOD[command], (name,), before=before, usable=True)
    for command, arguments in GOOD.items():
        yield Case(f"{command}, output full", arguments, before=partial(redirect, "/dev/full"), usable=True)
        yield Case(f"{command}, reader gone", arguments, before=partial(redirect, None), usable=True)
        yield Case(f"{command}, no streams", arguments, before=partial(os.closerange, 0, 3), usable=True)
        yield Case(f"{command}, folder gone", arguments, before=lambda: shutil.rmtree(Path.cwd()))
    for command, option in (("resume", "--resume"), ("generate", "--checkpoint"), ("fit", "--model.init_from")):
        for kind, content in CHECKPOINTS.items():
            prepare = partial(spoil, "bad.ckpt", partial(torch.save, content))
            yield Case(f"{command} {option} {kind}", changed(command, option, "bad.ckpt"), ("bad.ckpt",), prepare)


def in_mid_run() -> Iterator[Case]:
    """Runs whose folder goes, or whose disk fills up, on the way."""
    for place, name in {"runs": "run folder", "cache": "cache", ".": "working folder"}.items():
        before = partial(after_step, 1, lambda place=place: shutil.rmtree(Path(place).resolve()))
        yield Case(f"fit whose {name} goes in mid-run", GOOD["fit"], before=before, usable=place == "cache")
    for size in (100, 10_000):
        yield Case(f"predict, files of {size} bytes", GOOD["predict"], before=partial(limit_files, size), usable=True)
        for step in (1, 2):
            before = partial(after_step, step, partial(limit_files, size))
            yield Case(f"fit, files of {size} bytes from step {step} on", GOOD["fit"], ("write",), before=before)
    for size in (16, 60, 120, 180, 240):
        arguments = changed("fit", "--trainer.logger.init_args.save_dir", "small")
        before = partial(mount, "small", f"size={size}k")
        yield Case(f"fit on a disk of {size} KB", arguments, ("write", "small"), before=before, usable=True)


def at_random(number: int) -> Iterator[Case]:
    """Damage at random places."""
    last = changed("generate", "--checkpoint", str(LAST))
    listed = changed("generate", "--prompts-file", "prompts.jsonl")
    for seed in range(number):
        for kind, command, arguments, work in (
            ("recipe", "fit", GOOD["fit"], damaged_recipe),
            ("tables", "fit", GOOD["fit"], partial(damaged_file, "cache/*/*")),
            ("state", "resume", GOOD["resume"], partial(damaged_checkpoint, LAST)),
            ("state", "generate", last, partial(damaged_checkpoint, LAST)),
            ("bytes", "generate", last, partial(damaged_file, LAST)),
            ("model", "generate", GOOD["generate"], partial(damaged_file, MODEL / "*.*")),
            ("model", "export", GOOD["export"], partial(damaged_file, MODEL / "*.*")),
            ("prompts", "generate", listed, partial(damaged_file, "prompts.jsonl")),
        ):
            rng = random.Random(f"{kind} {seed}")
            yield Case(f"{command}, damaged {kind} {seed}", arguments, prepare=partial(work, rng), usable=True)
        for kind, reader in (("jsonl", jsonl), ("parquet", parquet)):
            before = partial(read_data, reader, random.Random(f"{kind} {seed}"))
            yield Case(f"data, damaged {kind} {seed}", ["--help"], before=before, usable=True)


def is_whole(output: Path, succeeded: bool) -> bool:
    """Whether what lies under the name of an output is whole, or nothing does after a failure."""
    if not os.path.isfile(output):
        return succeeded or output.name != "exported" or not os.path.isdir(output)
    if output.suffix != ".json":
        return succeeded
    try:
        return isinstance(json.loads(output.read_text()), dict)
    except ValueError:
        return False


def judge(case: Case, status: int | None, text: str, folder: Path) -> tuple[str, str]:
    """What became of a case (`refused` and `used` are right), and what was said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((index for index, line in enumerate(lines) if line.startswith("error: ")), len(lines))
    message = " / ".join(lines[said:] or lines[-3:])[:500]
    result = "refused"
    if any(mark in text for mark in ("Traceback (most recent call last)", "Exception ignored", "Exception in thread")):
        result = "traceback"
    elif status is None:
        result = "hang"
    elif not is_whole(folder / case.output, status == 0):
        result = "partial"
    elif status == 0:
        result = "used" if case.usable or case.name in TABLES["usable"] else "accepted"
    elif status not in (1, 2):
        result = f"status {status}"
    elif not case.name.endswith(("no streams", "reader gone")):  # nobody would read it
        if said != len(lines) - 1:
            result = "no single line"
        elif case.named and not any(name in message for name in case.named):
            result = "unnamed"
    return result, message


def attempt(case: Case, base: Path, folder: Path, seconds: float) -> tuple[str, str]:
    """Runs a case in a copy of the base; as `judge`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder / "work", symlinks=True)
    case.prepare(folder / "work")

    def before() -> None:
        os.chdir(folder / "work")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.environ |= {"DLLM_VAR_CACHE": str(folder / "work" / "cache"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        case.before()

    run = start(folder, case.arguments, before=before)
    ended = run.wait(seconds=seconds)
    run.end()
    return judge(case, run.statuses.get(0) if ended else None, run.output, folder / "work")


def all_cases(number: int) -> list[Case]:
    """All cases, `number` of each kind of random damage."""
    cases = [*from_tables(), *in_mid_run(), *at_random(number)]
    return [case for case in cases if case.command != "evaluate" or find_spec("lm_eval")]


def as_markdown(counts: dict[str, Counter[str]], defects: list[str], seconds: float) -> str:
    """The table of what became of the cases."""
    lines = ["# Bad inputs to every command", "", f"`python benchmarks/bad_inputs.py`, {seconds:.0f} s.", ""]
    lines += ["Refused with one line that names the cause, or used whole.", ""]
    lines += ["| command | inputs | refused | used | defects |", "|---|--:|--:|--:|--:|"]
    for command, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        good = count["refused"] + count["used"]
        lines.append(f"| {command} | {count.total()} | {count['refused']} | {count['used']} | {count.total() - good} |")
    return "\n".join([*lines, "", *(f"- {defect}" for defect in defects), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases whose name begins so")
    parser.add_argument("-v", action="store_true", help="print all")
    parser.add_argument("--random", type=int, default=10, help="cases of each kind of random damage")
    options = parser.parse_args()
    began = time.monotonic()
    warm_up()
    counts: dict[str, Counter[str]] = {}
    defects: list[str] = []
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bad-") as name:
        base, folder = Path(name) / "base", Path(name) / "case"
        make_base(base)
        for case in all_cases(options.random):
            command = case.command
            if options.names and not case.name.startswith(tuple(options.names)):
                continue
            if command in GOOD and command not in times:
                before = time.monotonic()
                result, message = attempt(Case(command, GOOD[command], usable=True), base, folder, 600)
                assert result == "used", (command, result, message)
                times[command] = time.monotonic() - before
            result, message = attempt(case, base, folder, times.get(command, 0) + PATIENCE)
            counts.setdefault(command, Counter())[result] += 1
            if result not in ("used", "refused"):
                defects.append(f"{result}: `{case.name[:120]!r}`")
            if options.v or result not in ("used", "refused"):
                print(f"{result:<10} {case.name[:120]!r}: {message}", flush=True)
    text = as_markdown(counts, defects, time.monotonic() - began)
    print(text)
    if not options.names:
        (HERE / "results" / "bad_inputs.md").write_text(text)
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
