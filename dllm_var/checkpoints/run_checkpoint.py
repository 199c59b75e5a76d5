"""Checkpoints of a run: which one is the newest, which model and tokenizer one is of, and what made it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Container
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dllm_var import __version__
from dllm_var.checkpoints.archive import UnusableCheckpoint, check, read_state
from dllm_var.errors import UserError
from dllm_var.files import PARTIAL, PREVIOUS, discard, put_back, set_aside
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora, lora_settings
from dllm_var.text.tokenizer import Tokenizer

SAVING = ".saving"  # behind the name of what a strategy is writing
FORMAT = 2  # of a checkpoint's entries; 2 has weights under their published names
# Settings that may differ from the checkpoint's: for any use of it, and where its weights are measured, not trained on.
CHANGEABLE = {"initializer_range", "context_length"}
CHANGEABLE_WHEN_MEASURED = CHANGEABLE | {"rope_theta", "rope_scaling", "norm_eps"}
_PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
_EXACT = ("dllm-var", "torch", "lightning")  # another version of one of these may change the last bits of results

# -- the newest --------------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int | None:
    """Returns how many steps a checkpoint has been trained; None when that cannot be read."""
    try:
        step = read_state(path)["global_step"]
    except (UnusableCheckpoint, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, those of later steps first; links that lead nowhere are left out.

    Among checkpoints of one step the one written last comes first. One whose step cannot be read has its place by the
    time of writing, so that damage to it is told and not passed over.
    """
    found: list[tuple[int | None, int, Path]] = []
    for path in [*folder.glob("*.ckpt"), *set_aside(folder).values()]:
        with suppress(OSError):
            found.append((step_of(path), path.stat().st_mtime_ns, path))

    def place(entry: tuple[int | None, int, Path]) -> tuple[int, int, str]:
        step, written, path = entry
        if step is None:
            step = max((other for other, before, _ in found if other is not None and before <= written), default=-1)
        return step, written, path.name

    return [path for *_, path in sorted(found, key=place, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of the latest step, or None."""
    return next(iter(newest_first(folder)), None)


def newest_usable(folder: Path, but: Container[Path] = ()) -> Path | None:
    """Returns the newest checkpoint of a folder that passes `check`, or None."""
    for path in newest_first(folder):
        if path not in but:
            with suppress(UnusableCheckpoint):
                check(path)
                return path
    return None


def check_or_offer(path: Path, option: str = "") -> None:
    """Checks a checkpoint, and names the one to take in its place when it cannot be used.

    Args:
        path: The checkpoint.
        option: What stands before the other one's path on the command line, such as `--resume=`.

    Raises:
        UnusableCheckpoint: Says what is wrong with it, and gives the newest good one beside it.
    """
    try:
        check(path)
    except UnusableCheckpoint as error:
        other = newest_usable(path.parent, {path})
        offer = f"the newest good one is {option}{other}"
        if other is None:
            offer = f"no other one in {path.parent} can be used: give a checkpoint of another run, or start a new run"
        raise UnusableCheckpoint(f"{error}; {offer}") from None


def clear_leftovers(folder: Path) -> None:
    """Puts back or removes what a process that was killed while saving has left; none may be saving now."""
    put_back(folder)
    for suffix in (PARTIAL, PREVIOUS, SAVING):
        for leftover in folder.glob(f"*.ckpt{suffix}"):
            discard(leftover)


# -- the model and tokenizer of a checkpoint ---------------------------------------------------------------------------


def identity(
    config: TransformerConfig, tokenizer: Tokenizer, lora: Lora | None, sampler: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the `dllm_var` entry of a checkpoint: what builds the model without its config, as plain values."""
    return {
        "transformer": config.to_dict(),
        "tokenizer": tokenizer.to_dict(),
        "sampler": sampler,
        "lora": lora_settings(lora),
        "format": FORMAT,
        **provenance(),
    }


def read_identity(checkpoint: Any, path: str | Path) -> dict[str, Any]:
    """Returns the `dllm_var` entry of a checkpoint.

    Raises:
        UserError: When it has none, or one in a format that this version does not know.
    """
    saved = checkpoint.get("dllm_var") if isinstance(checkpoint, dict) else None
    if not isinstance(saved, dict):
        raise UserError(f"the checkpoint {path} was not written by dllm_var: it has no 'dllm_var' entry")
    if saved.get("format", FORMAT) != FORMAT:
        raise UnusableCheckpoint(
            f"the checkpoint {path} is of format {saved['format']}, this version of dllm-var reads format {FORMAT}: "
            "use the version that wrote it"
        )
    return saved


def check_identity(
    saved: dict[str, Any],
    config: TransformerConfig,
    tokenizer: Tokenizer | None,
    lora: Lora | None,
    changeable: set[str],
) -> str | None:
    """Compares a run with the entry of a checkpoint; returns a note when other versions made it.

    Args:
        saved: The entry.
        config: Shape of the run's transformer.
        tokenizer: The run's; not compared when None.
        lora: The run's adapters.
        changeable: Settings of the transformer that may differ.

    Raises:
        UserError: When the checkpoint is of another model or tokenizer; names the setting.
    """
    for name, value in config.to_dict().items():
        theirs = saved["transformer"].get(name, value)
        if theirs != value and name not in changeable:
            raise UserError(
                f"the checkpoint has model.transformer.{name}={theirs}, the settings say {value}: use the settings it "
                "was trained with"
            )
    if saved.get("lora") != lora_settings(lora):
        raise UserError(
            f"the checkpoint has model.lora {saved.get('lora')}, the settings say {lora_settings(lora)}: use "
            "the settings it was trained with, or start a new run from it with model.init_from"
        )
    if tokenizer is not None and Tokenizer.from_dict(saved["tokenizer"]).fingerprint != tokenizer.fingerprint:
        raise UserError(
            "the checkpoint was trained with another tokenizer than data.tokenizer: set it back, or go on all the "
            "same with --data.check_resume=false"
        )
    then, now = saved.get("versions", {}), provenance()["versions"]
    changed = [
        f"{name} {then[name]} (now {now.get(name)})" for name in _EXACT if then.get(name, now[name]) != now[name]
    ]
    note = f"the checkpoint was made with {', '.join(changed)}: results may differ in their last bits"
    return note if changed else None


@cache
def provenance() -> dict[str, Any]:
    """Returns `versions` by package, and `git`: the commit of this source tree and whether files differ from it.

    An installed package has no source tree; then it is the working directory's, where settings and data are likely to
    be. None outside of git.
    """
    versions = {"dllm-var": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    root = Path(__file__).resolve().parents[2]
    git = _git_state(root if (root / ".git").exists() else Path.cwd())
    return {"versions": versions, "git": git}


def _git_state(folder: Path) -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # a killed one leaves no lock
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}
