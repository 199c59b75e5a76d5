"""A checkpoint as a folder of shards (FSDP2 and other strategies that save in parts), with a list of checksums."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from dllm_var.checkpoints.run_files import FORMAT, UnusableCheckpoint, check_format, unreadable
from dllm_var.files import fits

SEAL = "seal.json"
_METADATA, _TRAINER_STATE = ".metadata", "meta.pt"  # torch.distributed.checkpoint's and Lightning's
_WEIGHTS = "state_dict."  # names of weights begin so
_CHUNK = 2**22
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {  # what the index of torch.distributed.checkpoint consists of
    *((_METADATA_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *((_METADATA_MODULE, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def checksums(folder: Path, rank: int, ranks: int) -> dict[str, str]:
    """Writes this rank's part of a folder through to the disk.

    Args:
        folder: Just written by all ranks.
        rank: This one; the files `__RANK_*` are its own, the first rank has all others too.
        ranks: How many there are.

    Returns:
        The SHA-256 of each of its files, by name.
    """
    others = tuple(f"__{number}_" for number in range(ranks) if number != rank)
    own = f"__{rank}_"
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        mine = path.name.startswith(own) or (rank == 0 and not path.name.startswith(others))
        if mine:
            found[str(path.relative_to(folder))] = _digest(path, sync=True)
    return found


def _digest(path: Path, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def write_seal(folder: Path, digests: dict[str, str]) -> None:
    """Adds the list of checksums, which makes the folder a checkpoint."""
    text = json.dumps({"format": FORMAT, "files": digests}, sort_keys=True)
    with open(folder / SEAL, "w", encoding="utf-8") as file:
        file.write(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())


def check_folder(folder: Path) -> None:
    """Compares every file with its checksum and makes sure that loading them runs no code; unlisted folders too.

    Raises:
        UnusableCheckpoint: When files are missing, damaged, of another format, or hold anything but plain values.
    """
    try:
        if (folder / SEAL).is_file():
            _check_seal(folder)
        if (folder / _METADATA).is_file():
            _check_plain(folder)
    except OSError as error:
        raise UnusableCheckpoint(f"cannot read the checkpoint {folder}: {error.strerror or error}") from error


def _check_seal(folder: Path) -> None:
    text, _, digest = (folder / SEAL).read_text(encoding="utf-8", errors="replace").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest.strip():
        raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: {SEAL} does not match its checksum")
    seal = json.loads(text)
    check_format(seal.get("format"), folder)
    if not fits(seal.get("files"), dict[str, str]):
        raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: {SEAL} lists no files")
    for name, expected in seal["files"].items():
        if not _part(folder, name).is_file():
            raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: {name} is missing")
        if _digest(folder / name) != expected:
            raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: {name} does not match its checksum")


def _part(folder: Path, name: str) -> Path:
    """Returns the file that a checkpoint means; one outside it is refused."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnusableCheckpoint(f"the checkpoint {folder} is damaged: it names {name}, a file outside of it")
    return folder / name


class _MetadataReader(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's index, a pickle of a handful of classes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"weights_only: Unsupported class {module}.{name}")


def read_metadata(folder: Path) -> Any:
    """Reads the index of a folder of shards; never runs code.

    Raises:
        UnusableCheckpoint: When it is damaged or holds anything but an index.
    """
    path = folder / _METADATA
    try:
        return _MetadataReader(io.BytesIO(path.read_bytes())).load()
    except OSError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error


def _check_plain(folder: Path) -> None:
    """Loads what torch and Lightning would unpickle without restriction, restricted."""
    metadata = read_metadata(folder)
    if (folder / _TRAINER_STATE).is_file():
        read_trainer_state(folder)
    for index, info in (metadata.storage_data or {}).items():
        path = _part(folder, info.relative_path)
        if type(metadata.state_dict_metadata.get(index.fqn)).__name__ != "BytesStorageMetadata":
            continue  # tensors are loaded restricted anyway
        with open(path, "rb") as file:
            file.seek(info.offset)
            value = io.BytesIO(file.read(info.length))
        try:
            torch.load(value, weights_only=True)
        except Exception as error:
            raise unreadable(path, error) from error


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Reads what a folder of shards holds besides weights and optimizer: counters, callbacks, data position."""
    path = folder / _TRAINER_STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Puts the weights of a folder of shards together in this process, whatever the number that wrote them.

    Raises:
        UnusableCheckpoint: When it is damaged or holds anything but plain values.
    """
    import torch.distributed.checkpoint as dcp  # slow to import

    check_folder(folder)
    weights = {
        name: torch.empty(info.size, dtype=info.properties.dtype, device="cpu")
        for name, info in read_metadata(folder).state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and hasattr(info, "properties")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(weights, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(_WEIGHTS): value for name, value in weights.items()}
