"""A checkpoint as a folder of shards, which FSDP2 and other strategies write: each process its part."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from dllm_var.checkpoints.archive import UnusableCheckpoint, check_archive, load_archive, unreadable

_INDEX, _INDEX_CHECKSUM = ".metadata", ".metadata.sha256"  # torch.distributed.checkpoint's, and ours beside it
_TRAINER_STATE = "meta.pt"  # Lightning's
_DEEPSPEED = "latest"
_WEIGHTS = "state_dict."  # names of weights begin so
_INDEX_MODULE = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {
    *((_INDEX_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *((_INDEX_MODULE, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
    (_INDEX_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return any((path / name).exists() for name in (_INDEX, _TRAINER_STATE, _DEEPSPEED))


def write_index_checksum(folder: Path) -> None:
    """Adds the checksum of the index, as `sha256sum -c` reads it; shards and trainer state have theirs in them."""
    if (folder / _INDEX).is_file():
        text = f"{_digest(folder / _INDEX)}  {_INDEX}\n"
        (folder / _INDEX_CHECKSUM).write_text(text, encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Compares all checksums of a folder of shards and makes sure that loading them runs no code.

    Raises:
        UnusableCheckpoint: When parts are missing, damaged, or hold anything but plain values.
    """
    for path in folder.rglob("*.pt"):
        with open(path, "rb") as file:
            check_archive(file, path)
    if not (folder / _TRAINER_STATE).is_file() and not (folder / _INDEX).is_file():
        return  # DeepSpeed's
    for name in (_TRAINER_STATE, _INDEX):
        if not (folder / name).is_file():
            raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: {name} is missing")
    checksum = folder / _INDEX_CHECKSUM
    if checksum.is_file() and checksum.read_text(errors="replace").split()[:1] != [_digest(folder / _INDEX)]:
        raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: {_INDEX} does not match its checksum")
    read_trainer_state(folder)
    index = read_index(folder)
    for place in (index.storage_data or {}).values():
        _check_shard(folder, place)


def _check_shard(folder: Path, place: Any) -> None:
    """Checks one tensor or object of a shard, each of which is an archive by itself."""
    path = folder / place.relative_path
    if Path(place.relative_path).is_absolute() or ".." in path.parts[len(folder.parts) :]:
        raise UnusableCheckpoint(
            f"the checkpoint {folder} is damaged: it names {place.relative_path}, a file outside of it"
        )
    if not path.is_file():
        raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: {place.relative_path} is missing")
    with open(path, "rb") as file:
        file.seek(place.offset)
        value = io.BytesIO(file.read(place.length))
    check_archive(value, path)
    value.seek(0)
    load_archive(value, path)


class _IndexReader(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's index, a pickle of a handful of classes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"weights_only: Unsupported class {module}.{name}")


def read_index(folder: Path) -> Any:
    """Reads the index of a folder of shards; never runs code.

    Raises:
        UnusableCheckpoint: When it is damaged or holds anything but an index.
    """
    content = (folder / _INDEX).read_bytes()
    try:
        return _IndexReader(io.BytesIO(content)).load()
    except Exception as error:  # pickle raises many kinds
        raise unreadable(folder / _INDEX, error) from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Reads what a folder of shards holds besides weights and optimizer: counters, callbacks, data position."""
    return load_archive(folder / _TRAINER_STATE, folder / _TRAINER_STATE)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Puts the weights of a folder of shards together in this process, whatever the number that wrote them."""
    import torch.distributed.checkpoint as dcp  # slow to import

    weights = {
        name: torch.empty(info.size, dtype=info.properties.dtype, device="cpu")
        for name, info in read_index(folder).state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and hasattr(info, "properties")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(weights, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(_WEIGHTS): value for name, value in weights.items()}
