"""Checkpoints of a run: which one is the newest, which model and tokenizer one is of, and what made it."""

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dllm_var import __version__
from dllm_var.checkpoints.adapters import read_lora
from dllm_var.checkpoints.archive import UnusableCheckpoint, check, read_state
from dllm_var.errors import UserError
from dllm_var.files import PARTIAL, PREVIOUS, discard, put_back
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora
from dllm_var.text.tokenizer import Tokenizer

SAVING = ".saving"  # behind the name of what a strategy is writing
FORMAT = 2  # of a checkpoint's entries; 2 has weights under their published names
# Settings that may differ from the checkpoint's: for any use of it, and where its weights are measured, not trained on.
_CHANGEABLE = {"initializer_range", "context_length"}
_CHANGEABLE_WHEN_MEASURED = _CHANGEABLE | {"rope_theta", "rope_scaling", "norm_eps"}
_PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def step_of(path: Path) -> int | None:
    """Returns how many steps a checkpoint has been trained; None when that cannot be read."""
    try:
        step = read_state(path)["global_step"]
    except (UnusableCheckpoint, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, those of later steps first, and of one step that which was written last.

    One whose step cannot be read counts as of the latest step before it was written, so that damage to it is told.
    """
    aside = [path for path in folder.glob(f"*.ckpt{PREVIOUS}") if not os.path.lexists(path.with_suffix(""))]
    found = [path for path in [*folder.glob("*.ckpt"), *aside] if path.exists()]  # a link may lead nowhere
    placed, latest = [], -1
    for written, path in sorted((path.stat().st_mtime_ns, path) for path in found):
        step = step_of(path)
        step = latest if step is None else step
        latest = max(latest, step)
        placed.append((step, written, path))
    return [path for *_, path in sorted(placed, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of the latest step, or None."""
    return next(iter(newest_first(folder)), None)


def newest_usable(folder: Path, but: Path | None = None) -> Path | None:
    """Returns the newest checkpoint of a folder that passes `check`, or None; one that is known not to is left out."""
    for path in newest_first(folder):
        with suppress(UnusableCheckpoint):
            if path != but:
                check(path)
                return path
    return None


def check_or_offer(path: Path, option: str = "") -> None:
    """Checks a checkpoint; of a damaged one the error offers the newest good one, behind an option like `--resume=`."""
    try:
        check(path)
    except UnusableCheckpoint as error:
        other = newest_usable(path.parent, but=path)
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


def identity(
    config: TransformerConfig,
    tokenizer: Tokenizer,
    lora: Lora | None,
    sampler: dict[str, Any] | None,
    chat: bool = False,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Returns the `dllm_var` entry of a checkpoint: what builds the model without its config, as plain values.

    `chat` says that it was trained on conversations in the tokenizer's chat template, which prompts then need, too;
    `quantize`, what the matrices below its adapters are.
    """
    return {
        "transformer": config.to_dict(),
        "tokenizer": tokenizer.to_dict(),
        "sampler": sampler,
        "chat": chat,
        "lora": None if lora is None else asdict(lora),
        "quantize": quantize,
        "format": FORMAT,
        **provenance(),
    }


def read_identity(checkpoint: Any, path: str | Path) -> dict[str, Any]:
    """Returns the `dllm_var` entry of a checkpoint; raises UserError without one of a format that is known here."""
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
    trained_on: bool,
    quantize: str | None = None,
) -> None:
    """Compares a run with the entry of a checkpoint; raises UserError, which names the setting, when they do not fit.

    The tokenizer is not compared when it is None.
    """
    if tokenizer is not None and Tokenizer.from_dict(saved["tokenizer"]).fingerprint != tokenizer.fingerprint:
        raise UserError(
            "the checkpoint was trained with another tokenizer than data.tokenizer: set it back, or go on all the "
            "same with --data.check_resume=false"
        )
    changeable = _CHANGEABLE if trained_on else _CHANGEABLE_WHEN_MEASURED
    theirs = saved["transformer"]
    pairs = {f"transformer.{name}": (theirs.get(name, ours), ours) for name, ours in config.to_dict().items()}
    pairs["lora"] = (read_lora(saved.get("lora"), "the checkpoint"), lora)
    pairs["quantize"] = (saved.get("quantize"), quantize)
    for name, (known, ours) in pairs.items():
        if known != ours and name.removeprefix("transformer.") not in changeable:
            raise UserError(
                f"the checkpoint has model.{name}={known}, the settings say {ours}: use the settings it was trained "
                "with, or start a new run from it with model.init_from"
            )


@cache
def provenance() -> dict[str, Any]:
    """Returns `versions` by package, and `git`: the commit, and whether files differ from it; None outside of git.

    It is that of this source tree, or that of the working directory when the package is installed elsewhere.
    """
    versions = {"dllm-var": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    root = Path(__file__).resolve().parents[2]
    tree = root if (root / ".git").exists() else Path.cwd()
    describe = ["git", "--no-optional-locks", "-C", str(tree), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        run = subprocess.run([*describe, "--exclude=*"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {"versions": versions, "git": None}
    commit, _, changed = run.stdout.strip().partition("-")
    return {"versions": versions, "git": {"commit": commit, "changed": bool(changed)}}
