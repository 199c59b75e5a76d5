"""Checkpoints of a run on the disk: written whole, checked to the last byte, read without running code.

A checkpoint is a file, the archive of `torch.save`. Under FSDP2 and other strategies it is a folder of shards, to which
each process writes its part.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import torch

from dllm_var.errors import UserError
from dllm_var.files import write_atomically

_FIRST_BYTES = b"PK\x03\x04"
_SEAL = b"dllm-var sha256="  # begins the archive's comment; the checksum of all that stands before the comment follows
_SEAL_BYTES = len(_SEAL) + 64
_CHUNK = 2**22
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


class CannotSave(UserError):
    """A checkpoint could not be written; the one that was there before is untouched."""


class UnusableCheckpoint(UserError):
    """A checkpoint is damaged, of another format, or no checkpoint at all; the message says which."""


# -- either ------------------------------------------------------------------------------------------------------------


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return any((path / name).exists() for name in (_INDEX, _TRAINER_STATE, _DEEPSPEED))


def check(path: Path) -> None:
    """Reads all of a checkpoint, compares its checksums, and makes sure that loading it runs no code.

    A file that has passed is not read again by this process, unless it was written again.

    Raises:
        UnusableCheckpoint: When it is damaged or no checkpoint.
    """
    try:
        if path.is_dir():
            _check_folder(path)
            return
        state = path.stat()
        _check_file(path, state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError as error:
        raise UnusableCheckpoint(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


def read_state(path: Path) -> Any:
    """Reads a checkpoint: all of a file, whose tensors stay on the disk until they are used; of a folder, all values
    but weights and optimizer.

    Raises:
        UnusableCheckpoint: When it cannot be read.
    """
    if path.is_dir():
        return load_archive(path / _TRAINER_STATE, path / _TRAINER_STATE)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UnusableCheckpoint(f"{path} is not a checkpoint")
    return load_archive(path, path, mmap=True)


# -- files -------------------------------------------------------------------------------------------------------------


def write_archive(checkpoint: Any, path: Path) -> None:
    """Writes a checkpoint as one file: the zip archive of `torch.save`, with a checksum of it in the archive's comment.

    torch notes a checksum of every tensor, but not of the list that says where each of them begins.

    Raises:
        OSError: When it cannot be written, as on a full disk; what was at `path` before is still there.
    """
    with write_atomically(path) as partial, open(partial, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(checkpoint, cast(IO[bytes], hashed))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch raises an error of its own on top of it
                raise error.__context__ from None
            raise
        file.seek(-2, os.SEEK_END)  # an archive without a comment ends with the comment's length, 0
        file.write(_SEAL_BYTES.to_bytes(2, "little") + _SEAL + hashed.digest.hexdigest().encode())


class _HashedFile:
    """Passes on what `torch.save` writes, and computes its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


@cache
def _check_file(path: Path, *version: int) -> None:
    if not path.is_file():  # a pipe would be waited for
        raise UnusableCheckpoint(f"{path} is not a checkpoint")
    with open(path, "rb") as file:
        check_archive(file, path)
    load_archive(path, path, mmap=True)  # its values; tensors stay on the disk


def check_archive(file: IO[bytes], path: Path) -> None:
    """Reads an archive to its end and compares its checksum; those of its tensors if another program wrote it.

    Raises:
        UnusableCheckpoint: When it is damaged or no archive; names `path`.
    """
    first = file.read(len(_FIRST_BYTES))
    if not first:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it is empty")
    if first != _FIRST_BYTES:
        raise UnusableCheckpoint(f"{path} is not a checkpoint")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _SEAL_BYTES, 0))
    seal = file.read()
    if seal.startswith(_SEAL):
        file.seek(0)
        digest, left = hashlib.sha256(), size - _SEAL_BYTES - 2
        while part := file.read(min(left, _CHUNK)):
            digest.update(part)
            left -= len(part)
        length = file.read(2)
        digest.update(bytes(2))
        if length != _SEAL_BYTES.to_bytes(2, "little") or digest.hexdigest().encode() != seal[len(_SEAL) :]:
            raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it does not match its checksum")
        return
    try:
        with zipfile.ZipFile(file) as archive:
            comment, damaged = archive.comment, archive.testzip()
            # torch sets none of these, and does not read an entry whose attributes make a folder of it.
            listed = all(not entry.external_attr and not entry.compress_type for entry in archive.infolist())
    except Exception as error:  # zipfile raises many kinds
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it is cut short or changed ({error})") from error
    if comment.startswith(_SEAL) or (_SEAL.startswith(comment) and seal[-2:] != bytes(2)):  # a part of the seal is left
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: it is cut short")
    if damaged is not None:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: {damaged} does not match its checksum")
    if not listed:
        raise UnusableCheckpoint(f"the checkpoint {path} is damaged: its list of contents was overwritten")


def load_archive(file: Path | IO[bytes], path: Path, **options: Any) -> Any:
    """Loads an archive with `torch.load`: tensors, on the CPU when `options` do not say otherwise, and plain values.

    Raises:
        UnusableCheckpoint: When it cannot be read, or holds anything else, which could run code; names `path`.
    """
    try:
        return torch.load(file, weights_only=True, **{"map_location": "cpu", **options})
    except OSError as error:
        raise UnusableCheckpoint(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds
        objects = _objects_in(file)
        raise (_holds_objects(path, objects[0]) if objects else _cannot_read(path, error)) from error


def _objects_in(file: Path | IO[bytes]) -> list[str]:
    """Returns the names of what is neither tensor nor plain value in an archive; nothing is loaded."""
    if not isinstance(file, Path):
        file.seek(0)
    with suppress(Exception):  # no archive at all
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    return []


def _holds_objects(path: Path, name: str) -> UnusableCheckpoint:
    return UnusableCheckpoint(
        f"the checkpoint {path} holds Python objects ({name}) beyond tensors and plain values: it is not loaded, "
        "because that could run code hidden in it"
    )


def _cannot_read(path: Path, error: Exception) -> UnusableCheckpoint:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UnusableCheckpoint(f"the checkpoint {path} cannot be read: {line[:200]}")


# -- folders of shards -------------------------------------------------------------------------------------------------


def write_index_checksum(folder: Path) -> None:
    """Adds the checksum of the index, as `sha256sum -c` reads it; shards and trainer state have theirs in them."""
    if (folder / _INDEX).is_file():
        text = f"{_digest(folder / _INDEX)}  {_INDEX}\n"
        (folder / _INDEX_CHECKSUM).write_text(text, encoding="utf-8")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_folder(folder: Path) -> None:
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
    read_state(folder)
    for place in (_read_index(folder).storage_data or {}).values():
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

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        raise _holds_objects(self.path, f"{module}.{name}")


def _read_index(folder: Path) -> Any:
    try:
        return _IndexReader(folder / _INDEX).load()
    except UnusableCheckpoint:
        raise
    except Exception as error:  # pickle raises many kinds
        raise _cannot_read(folder / _INDEX, error) from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Puts the weights of a folder that `check` has passed together, whatever the number of processes that wrote them.

    Raises:
        UnusableCheckpoint: When they cannot be read.
    """
    import torch.distributed.checkpoint as dcp  # slow to import

    weights = {
        name: torch.empty(info.size, dtype=info.properties.dtype, device="cpu")
        for name, info in _read_index(folder).state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and hasattr(info, "properties")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        try:
            dcp.load(weights, checkpoint_id=folder, no_dist=True)
        except Exception as error:  # torch raises many kinds
            raise _cannot_read(folder, error) from error
    return {name.removeprefix(_WEIGHTS): value for name, value in weights.items()}
