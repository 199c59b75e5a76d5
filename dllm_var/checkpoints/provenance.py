"""What made a checkpoint: versions and git state, as plain values."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dllm_var import __version__

PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
EXACT = ("dllm-var", "torch", "lightning")  # another version of one of these may change the last bits of results


@cache
def provenance() -> dict[str, Any]:
    """Returns `versions` by package and `git`: the commit and whether files differ from it, of this source tree.

    An installed package has no source tree; then it is that of the working directory, where settings and data are
    likely to be. None outside of git.
    """
    versions = {"dllm-var": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[2]
    return {"versions": versions, "git": git_state(root if (root / ".git").exists() else Path.cwd())}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns the commit a folder is at and whether tracked files were changed since; None where git knows nothing."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # a killed one leaves no lock
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def other_versions(saved: dict[str, Any]) -> str | None:
    """Says which versions a checkpoint was made with, where another one may change the last bits of results."""
    theirs, ours = saved.get("versions", {}), provenance()["versions"]
    changed = [name for name in EXACT if name in theirs and theirs[name] != ours.get(name)]
    if not changed:
        return None
    return "the checkpoint was made with " + ", ".join(
        f"{name} {theirs[name]} (now {ours.get(name)})" for name in changed
    )
