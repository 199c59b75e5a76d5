"""A short run that does everything a long one does, and a fingerprint of its end."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dllm_var.datamodules import CmudictSource

STEPS = 24


def write_recipe(folder: Path) -> list[str]:
    """Writes data and settings of a short run that does everything a long one does; returns its arguments."""
    (folder / "recipe.yaml").write_text(json.dumps(recipe(folder), indent=1))
    return ["fit", "--config", "recipe.yaml"]


@cache
def _records() -> dict[str, str]:
    """Some of CMUdict, as JSON Lines by split."""
    source = CmudictSource()
    return {
        split: "".join(json.dumps(record) + "\n" for record in islice(source.records(split), number))
        for split, number in (("train", 90), ("validation", 12), ("test", 8))
    }


def recipe(folder: Path, absolute: bool = False) -> dict[str, Any]:
    """Writes the run's data into its working folder and returns its settings, with `absolute` paths if so asked."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in _records().items():
        (folder / f"{split}.jsonl").write_text(lines)
    sampler = {"class_path": "dllm_var.sampling.BlockDiffusionSampler", "init_args": {"max_new_tokens": 12}}
    place = folder if absolute else Path()
    splits = {"path": "train", "validation_path": "validation", "test_path": "test"}
    paths = {setting: str(place / f"{split}.jsonl") for setting, split in splits.items()}
    shown = {"sampler": sampler, "num_examples": 2, "num_shown": 1, "every_n_steps": 10}
    kept = {"every_n_train_steps": 3, "save_last": True, "monitor": "train/loss", "save_top_k": 2, "filename": "{step}"}
    callbacks = {
        "dllm_var.callbacks.SpeedMonitor": {},
        "dllm_var.callbacks.SamplingCallback": shown,
        "dllm_var.callbacks.ExportWeights": {},
        "dllm_var.callbacks.RunSummary": {"sampler": sampler, "num_examples": 4},
        "lightning.pytorch.callbacks.ModelCheckpoint": kept,
    }
    return {
        "model": {
            "transformer": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
            "schedule": {"kind": "cosine", "warmup_steps": 3},
        },
        "data": {
            "source": {"class_path": "dllm_var.datamodules.JsonlSource", "init_args": paths},
            "tokenizer": CmudictSource.default_tokenizer,
            "batch_size": 4,
            "context_length": 48,
            "packing": "best_fit",
            "canvas": 4,
            "cache_dir": str(place / "cache"),
        },
        "sampler": sampler,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "val_check_interval": 6,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 2,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": name, "init_args": settings} for name, settings in callbacks.items()],
        },
    }


def runs_of(folder: Path) -> list[Path]:
    """The numbered runs in a working folder, the newest last."""
    return sorted((folder / "runs" / "recipe").glob("version_*"), key=lambda run: int(run.name.rpartition("_")[2]))


def fingerprint(folder: Path) -> dict[str, str]:
    """Returns hashes of the weights, the state and the figures of a run: the same however often it was interrupted."""
    run = runs_of(folder)[-1]
    weights = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "PackedDataModule")
    best = [state.get("best_model_score") for state in checkpoint["callbacks"].values() if "best_model_score" in state]
    states = {name: _digest(checkpoint[name]) for name in kept}
    summary = json.loads((run / "summary.json").read_text())
    for name in ("tokens_per_second", "decode_seconds", "train_seconds", "checkpoint", "weights"):
        summary.pop(name)
    return {"weights": weights, "best": _digest(best), **states, "summary": _digest(summary)}


def _digest(value: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}]".encode())
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()
