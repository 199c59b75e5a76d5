"""The quickstart of this tree against that of an earlier commit, in turn: training time and error, seed by seed.

    python benchmarks/quickstart.py --before 682dc90 --seeds 1 2 --output benchmarks/results/quickstart.json

682dc90 is the last commit before training was made faster. Each run takes two to four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.7  # of the time, at most
FIGURES = ("per", "wer", "train_seconds", "steps")


def train(tree: Path, seed: int) -> dict[str, Any]:
    """Runs a tree's quickstart in a folder of its own and returns what its summary says."""
    command = [sys.executable, "-m", "dllm_var", "fit", f"--config={tree / 'configs/quickstart.yaml'}"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*command, f"--seed_everything={seed}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        [summary] = Path(folder).glob("runs/*/*/summary.json")
        figures = json.loads(summary.read_text())
    return {name: figures[name] for name in FIGURES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="commit to compare with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="a pair of runs each")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "before"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", earlier, options.before], check=True)
        try:
            for number, seed in enumerate(options.seeds):
                trees = {"before": earlier, "now": ROOT}
                order = list(trees) if number % 2 == 0 else list(reversed(trees))
                pair = {name: train(trees[name], seed) for name in order}
                pairs.append(
                    {"seed": seed, **pair, "ratio": pair["now"]["train_seconds"] / pair["before"]["train_seconds"]}
                )
                for name in trees:
                    print(f"seed {seed} {name:6}  PER {pair[name]['per']:.2%}  {pair[name]['train_seconds']:.0f} s")
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", earlier], check=True)
    ratio = median(pair["ratio"] for pair in pairs)
    errors = {name: mean(pair[name]["per"] for pair in pairs) for name in ("before", "now")}
    print(f"mean PER {errors['before']:.2%} before, {errors['now']:.2%} now, in {ratio:.2f} times the time (median)")
    print(f"at most {BAR}: {'pass' if ratio <= BAR else 'missed'}")
    if options.output:
        result = {"before": options.before, "ratio": ratio, "per": errors, "pairs": pairs}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
