"""The `dllm_var` entry of a checkpoint: its model and tokenizer, and the versions and git state that made it."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dllm_var import __version__
from dllm_var.checkpoints.archive import UnusableCheckpoint
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora, lora_settings
from dllm_var.text.tokenizer import Tokenizer

FORMAT = 2  # of a checkpoint's entries; 2 has weights under their published names
# Settings that may differ from the checkpoint's: for any use of it, and where its weights are measured, not trained on.
CHANGEABLE = {"initializer_range", "context_length"}
CHANGEABLE_WHEN_MEASURED = CHANGEABLE | {"rope_theta", "rope_scaling", "norm_eps"}
_PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
_EXACT = ("dllm-var", "torch", "lightning")  # another version of one of these may change the last bits of results


def identity(
    config: TransformerConfig, tokenizer: Tokenizer, lora: Lora | None, sampler: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what is needed to build the model without its config, as plain values.

    Args:
        config: Shape of the transformer.
        tokenizer: The run's.
        lora: Its adapters.
        sampler: Settings of the sampler to decode with.
    """
    return {
        "transformer": config.to_dict(),
        "tokenizer": tokenizer.to_dict(),
        "sampler": sampler,
        "lora": lora_settings(lora),
        "format": FORMAT,
        **provenance(),
    }


def check_identity(
    saved: Any,
    config: TransformerConfig,
    tokenizer: Tokenizer | None,
    lora: Lora | None,
    path: str,
    changeable: set[str],
) -> str | None:
    """Refuses a checkpoint of another model or tokenizer, naming the setting; returns a note on other versions.

    Args:
        saved: Its `dllm_var` entry.
        config: Shape of the run's transformer.
        tokenizer: The run's; not compared when None.
        lora: The run's adapters.
        path: Of the checkpoint, for the message.
        changeable: Settings of the transformer that may differ.

    Raises:
        UserError: When the run cannot go on with it.
    """
    if not isinstance(saved, dict):
        raise UserError(f"the checkpoint {path} was not written by dllm_var: it has no 'dllm_var' entry")
    check_format(saved, path)
    made_with, ours = saved.get("versions", {}), provenance()["versions"]
    changed = [name for name in _EXACT if name in made_with and made_with[name] != ours.get(name)]
    told = ", ".join(f"{name} {made_with[name]} (now {ours.get(name)})" for name in changed)
    theirs, settings = saved["transformer"], config.to_dict()
    for name, value in settings.items():
        if name in theirs and name not in changeable and theirs[name] != value:
            raise UserError(
                f"the checkpoint has model.transformer.{name}={theirs[name]}, the settings say {value}: "
                "use the settings it was trained with"
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
    return f"the checkpoint was made with {told}: results may differ in their last bits" if changed else None


def check_format(saved: dict[str, Any], path: str | Path) -> None:
    """Raises UnusableCheckpoint for a checkpoint whose `dllm_var` entry is of a format this version does not know."""
    if saved.get("format", FORMAT) != FORMAT:
        raise UnusableCheckpoint(
            f"the checkpoint {path} is of format {saved['format']}, this version of dllm-var reads format {FORMAT}: "
            "use the version that wrote it"
        )


@cache
def provenance() -> dict[str, Any]:
    """Returns `versions` by package, and `git`: the commit of this source tree and whether files differ from it.

    An installed package has no source tree; then it is the working directory's, where settings and data are likely to
    be. None outside of git.
    """
    versions = {"dllm-var": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[2]
    return {"versions": versions, "git": _git_state(root if (root / ".git").exists() else Path.cwd())}


def _git_state(folder: Path) -> dict[str, Any] | None:
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # a killed one leaves no lock
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
