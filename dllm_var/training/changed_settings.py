"""Settings that changed since the checkpoint a run goes on from: which may, and which make it another run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from dllm_var.checkpoints.shards import read_trainer_state
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.settings import load_yaml

# Of the Trainer's settings these decide what is learned; the others say where it runs, how long, and what is kept.
_TRAINER = {
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("overfit_batches", "limit_train_batches"),
}
_NOT_SHOWN = {"callbacks", "logger", "plugins", "profiler"}  # of the others
# Of the model's and the data's settings these may change, all others may not.
_FREE = {"model.compile", "model.activation_checkpointing", "model.init_from", "model.loss_guard"}
_FREE |= {"data.num_workers", "data.cache_dir", "data.check_resume"}
# Compared by what they come to when the checkpoint is loaded, not by their text: `check_identity` of model and data.
_BY_CONTENT = {"model.transformer", "model.lora"}
_BY_CONTENT_OF_DATA = {"data.source", "data.tokenizer", "data.mask_token", "data.terminators"}
_ROWS = {"data.batch_size", "trainer.accumulate_grad_batches"}


class Change(NamedTuple):
    """A setting with its values in the checkpoint and now."""

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.was)} -> {_short(self.now)}"


def check_changes(path: Path, text: str, trainer: L.Trainer, datamodule: Any) -> None:
    """Says which settings have changed since a checkpoint was written; refuses those that make it another run.

    With `data.check_resume=false` they are said and not refused here. An optimizer refuses the state of another.

    Args:
        path: The checkpoint.
        text: The run's resolved settings as YAML.
        trainer: The run's.
        datamodule: The run's.

    Raises:
        UserError: Names all of the settings, with both values, and the remedy.
    """
    recorded, rows_then = _recorded(path)
    if not recorded:
        rank_zero_info(f"{path} does not hold the settings it was made with: they cannot be compared with the present")
        return
    rows = Change("rows of a step, over all devices", rows_then, rows_per_step(trainer, datamodule))
    compared = None not in rows
    apart = _BY_CONTENT | (_BY_CONTENT_OF_DATA if isinstance(datamodule, PackedDataModule) else set())
    apart |= _ROWS if compared else set()
    refused = [rows] if compared and rows.was != rows.now else []
    for change in _changes(recorded, load_yaml(text)):
        if _is_among(change.name, apart):
            continue
        if _is_free(change.name):
            rank_zero_info(f"changed since the checkpoint: {change}")
        else:
            refused.append(change)
    told = ", ".join(map(str, refused))
    if refused and getattr(datamodule, "check_resume", True):
        raise UserError(
            f"changed since {path} was written: {told}; set it back, start a new run with model.init_from, or "
            "go on all the same with --data.check_resume=false"
        )
    for change in refused:
        kept = " (the optimizer keeps what the checkpoint has)" if change.name.startswith("model.optimizer.") else ""
        rank_zero_info(f"changed since the checkpoint, which makes it another run: {change}{kept}")


def _recorded(path: Path) -> tuple[dict[str, Any], Any]:
    """Returns the settings that a checkpoint holds, none if it holds none, and the rows of its steps."""
    try:
        if path.is_dir():
            checkpoint = read_trainer_state(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        settings = load_yaml(checkpoint["config"])
        return (settings if isinstance(settings, dict) else {}), checkpoint.get("rows_per_step")
    except Exception:  # torch and YAML raise many kinds; what else is wrong is said when the checkpoint is loaded
        return {}, None


def rows_per_step(trainer: L.Trainer, datamodule: Any) -> int | None:
    """Returns how many rows an optimizer step is of, over all devices; None where the data has no `batch_size`."""
    batch_size = getattr(datamodule, "batch_size", None)
    if not isinstance(batch_size, int):
        return None
    groups = trainer.num_devices * trainer.num_nodes // getattr(trainer.strategy, "tensor_parallel_size", 1)
    return batch_size * groups * trainer.accumulate_grad_batches


def _changes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    for section in ("model", "data", "trainer"):
        for change in _different(section, was.get(section), now.get(section)):
            if change.name.split(".")[1] not in _NOT_SHOWN:
                yield change


def _different(name: str, was: Any, now: Any) -> Iterator[Change]:
    """Compares two values of a setting; settings that only one version of the package knows are left out."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != now:
            yield Change(name, was, now)
    elif was.get("class_path") != now.get("class_path"):
        yield Change(name, was.get("class_path"), now.get("class_path"))
    else:
        for key in was:
            if key in now:
                yield from _different(name if key == "init_args" else f"{name}.{key}", was[key], now[key])


def _is_among(name: str, settings: set[str]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def _is_free(name: str) -> bool:
    section, _, rest = name.partition(".")
    return rest.split(".")[0] not in _TRAINER if section == "trainer" else _is_among(name, _FREE)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = value["class_path"]
    text = "null" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
