"""Everything that can go wrong, done on purpose: a table of faults and outcomes.

    python benchmarks/faults.py          # 290 kills (90 of two ranks or with accumulation), faults, memory
    python benchmarks/faults.py --quick  # some of each, in a few minutes
    python benchmarks/faults.py --only kills --kills 1000

A short run that trains, validates, samples, saves and exports is killed (-9) at random moments, also while it writes a
checkpoint, and resumed until it is through: weights, optimizer, schedule, data position and figures must be those of a
run that was left alone. Runs are forks of one process that has imported everything; some are real commands.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fault_cases import broken_parts, full_disk, signals, steady_memory
from fault_storage import broken_checkpoints, other_data, real_processes, shared_cache
from fault_tries import Case, Tries
from forked_runs import warm_up
from kills import THREE_BATCHES, Campaign, kill_and_resume

RESULTS = Path(__file__).parent / "results"
PARTS = ("kills", "ranks", "accumulation", "faults", "memory")
CASES = (signals, full_disk, broken_parts, broken_checkpoints, other_data, shared_cache, real_processes)
QUICK = (signals, broken_checkpoints)


def note(text: str) -> None:
    """Says how far it has come."""
    print(text, file=sys.stderr, flush=True)


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [*lines, *("| " + " | ".join(row) + " |" for row in cells), ""]


def as_markdown(results: dict[str, Any]) -> str:
    """What `results` holds, for readers."""
    lines = ["# Faults tried, and what came of them", ""]
    lines += [f"`python benchmarks/faults.py`, {results['machine']}, {results['seconds']:.0f} s.", ""]
    for name, campaign in results.get("kills", {}).items():
        lines += [f"## kill -9 of {name}", ""]
        lines.append(
            f"{campaign['kills']} kills in {campaign['runs']} runs, each resumed with `--resume`; "
            f"{campaign['runs'] - len(campaign['failures'])} runs ended with the weights, optimizer, schedule, data "
            "position and figures of a run that was left alone."
        )
        lines += ["", *table(("killed during", "times"), sorted(campaign["phases"].items(), key=lambda item: -item[1]))]
        if campaign["survivors"]:
            lines += table(("the other rank ended", "times"), list(campaign["survivors"].items()))
    if cases := results.get("cases"):
        lines += ["## Other faults", ""]
        rows = [(c["fault"], c["status"], f"`{c['message']}`" if c["message"] else "", c["after"]) for c in cases]
        lines += table(("fault", "exit status", "message", "then gone on with"), rows)
    if memory := results.get("memory"):
        lines += ["## Memory of a long run", ""]
        lines.append(
            f"{memory['steps']:,} steps with sampling, validation and a checkpoint every 50: "
            f"{memory['second_quarter_mb']} MB in the second quarter, {memory['last_quarter_mb']} MB in the last "
            f"({memory['growth']:+.2%})."
        )
        lines.append("")
    failures = failed(results)
    lines += ["## Failures", "", *(f"- {text}" for text in failures or ["none"]), ""]
    return "\n".join(lines)


def failed(results: dict[str, Any]) -> list[str]:
    """Everything that is not as it should be."""
    texts = [text for campaign in results.get("kills", {}).values() for text in campaign["failures"]]
    texts += [
        f"{case['fault']}: {case['status']}, {case['after']}" for case in results.get("cases", []) if not case["good"]
    ]
    if not results.get("memory", {"good": True})["good"]:
        texts.append("memory grows")
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some of each")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it; may be repeated")
    parser.add_argument("--kills", type=int, help="kills of runs of one process (200)")
    parser.add_argument("--rank-kills", type=int, help="kills of runs of two, and of those that accumulate (30)")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the kills")
    parser.add_argument("--output", type=Path, help="folder of faults.json and faults.md; results/ when all is run")
    arguments = parser.parse_args()
    parts = arguments.only or PARTS
    kills = arguments.kills or (6 if arguments.quick else 200)
    rank_kills = arguments.rank_kills or (2 if arguments.quick else 30)
    began = time.monotonic()
    warm_up()
    results: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "seed": arguments.seed}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        campaigns: dict[str, Campaign] = {}
        if "kills" in parts:
            campaigns["one process"] = kill_and_resume(folder / "one", kills, 1, arguments.seed, note)
        if "ranks" in parts:
            campaigns["one or both of two processes"] = kill_and_resume(
                folder / "two", rank_kills, 2, arguments.seed, note
            )
        if "accumulation" in parts:
            for ranks, title in ((1, "one process"), (2, "one or both of two processes")):
                campaigns[f"{title}, three batches a step"] = kill_and_resume(
                    folder / f"accumulating{ranks}", rank_kills, ranks, arguments.seed, note, THREE_BATCHES
                )
        results["kills"] = {title: dict(vars(campaign)) for title, campaign in campaigns.items()}
        if "faults" in parts:
            results["cases"] = [
                asdict(case) for case in try_cases(folder / "cases", QUICK if arguments.quick else CASES)
            ]
        if "memory" in parts:
            results["memory"] = steady_memory(folder / "memory", 400 if arguments.quick else 4_000)
            note(f"memory: {results['memory']}")
    results["seconds"] = time.monotonic() - began
    text = as_markdown(results)
    print(text)
    output = arguments.output or (RESULTS if set(parts) == set(PARTS) and not arguments.quick else None)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "faults.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "faults.md").write_text(text)
    return 1 if failed(results) else 0


def try_cases(folder: Path, groups: Any) -> list[Case]:
    """Tries single faults."""
    tries = Tries(folder)
    folder.mkdir()
    for group in groups:
        before = len(tries.cases)
        group(tries)
        for case in tries.cases[before:]:
            note(f"{'ok ' if case.good else 'BAD'} {case.fault}: {case.status}, {case.after}: {case.message}")
    return tries.cases


if __name__ == "__main__":
    sys.exit(main())
