"""Checkpoints of a run on the disk: written whole, checked to the last byte, read without running code.

A checkpoint is a file, the archive of `torch.save`. Under FSDP2 and other strategies it is a folder of shards, to which
each process writes its part.
"""

import hashlib
import io
import os
import pickle
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import torch

from dllm_var.errors import UserError
from dllm_var.files import write_atomically

_FIRST_BYTES = b"PK\x03\x04"
_SEAL = b"dllm-var sha256="  # begins the archive's comment; the checksum of all before the comment follows
_SEAL_BYTES = len(_SEAL) + 64
_CHUNK = 2**22
_INDEX, _INDEX_CHECKSUM = ".metadata", ".metadata.sha256"  # torch.distributed.checkpoint's, and ours beside it
_TRAINER_STATE = "meta.pt"  # Lightning's
_DEEPSPEED = "latest"
_WEIGHTS = "state_dict."  # names of weights begin so
_INDEX_CLASSES = {  # what an index is made of, beside data types; by module
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


class CannotSave(UserError):
    """A checkpoint could not be written; the one that was there before is untouched."""


class UnusableCheckpoint(UserError):
    """A checkpoint is damaged, of another format, or no checkpoint at all; the message says which."""


def is_shard_folder(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return any((path / name).exists() for name in (_INDEX, _TRAINER_STATE, _DEEPSPEED))


def check(path: Path) -> None:
    """Reads all of a checkpoint, compares its checksums, and makes sure that loading it runs no code.

    A file that has passed is not read again by this process, unless it was written again.
    """
    try:
        if path.is_dir():
            _check_folder(path)
        else:
            _refuse_pipe(path)
            state = path.stat()
            _check_file(path, state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError as error:
        raise _cannot_read(path, error) from error


def read_state(path: Path) -> Any:
    """Reads a file, whose tensors stay on the disk until they are used; of a folder all but weights and optimizer."""
    file = path / _TRAINER_STATE if path.is_dir() else path
    return load_archive(file, file, mmap=True)


def write_archive(checkpoint: Any, path: Path) -> None:
    """Writes a checkpoint as one file: the zip archive of `torch.save`, with a checksum of it in the archive's comment.

    Raises OSError when the file cannot be written, as on a full disk; what was at `path` before is still there.
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
    with open(path, "rb") as file:
        check_archive(file, path)
    load_archive(path, path, mmap=True)


def check_archive(file: IO[bytes], path: Path) -> None:
    """Reads an archive to its end and compares its checksum; those of its tensors if another program wrote it."""
    if file.read(len(_FIRST_BYTES)) != _FIRST_BYTES:
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
        digest.update(bytes(2))  # the comment's length before there was one
        whole = length == _SEAL_BYTES.to_bytes(2, "little")
        intact = whole and digest.hexdigest().encode() == seal.removeprefix(_SEAL)
    else:
        try:
            with zipfile.ZipFile(file) as archive:
                intact = seal.endswith(bytes(2)) and archive.testzip() is None  # torch writes no comment
        except Exception as error:  # zipfile raises many kinds
            raise _damaged(path, f"it is cut short or changed ({error})") from error
    if not intact:
        raise _damaged(path, "it does not match its checksum")


def load_archive(file: Path | IO[bytes], path: Path, **options: Any) -> Any:
    """Loads an archive with `torch.load`: tensors, on the CPU when `options` do not say otherwise, and plain values."""
    _refuse_pipe(path)
    try:
        return torch.load(file, weights_only=True, **{"map_location": "cpu", **options})
    except Exception as error:  # torch raises many kinds
        raise _cannot_read(path, error) from error


def _refuse_pipe(path: Path) -> None:
    if path.is_fifo():  # whoever reads it waits for its writer
        raise UnusableCheckpoint(f"{path} is not a checkpoint: it is a pipe")


def _cannot_read(path: Path, error: Exception) -> UnusableCheckpoint:
    more = ""
    if isinstance(error, pickle.UnpicklingError):
        more = "; only tensors and plain values are loaded, because anything else could run code"
        error = cast(Exception, error.__context__ or error)  # torch's own names the object, and then gives advice
    reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    return UnusableCheckpoint(f"the checkpoint {path} cannot be read: {reason.split('. ')[0][:200]}{more}")


def _damaged(path: Path, how: str) -> UnusableCheckpoint:
    return UnusableCheckpoint(f"the checkpoint {path} is damaged: {how}")


def write_index_checksum(folder: Path) -> None:
    """Adds the checksum of the index, as `sha256sum -c` reads it; shards and trainer state have theirs in them."""
    if (folder / _INDEX).is_file():
        (folder / _INDEX_CHECKSUM).write_text(_index_checksum(folder), encoding="utf-8")


def _index_checksum(folder: Path) -> str:
    return f"{hashlib.sha256((folder / _INDEX).read_bytes()).hexdigest()}  {_INDEX}\n"


def _check_folder(folder: Path) -> None:
    for path in folder.rglob("*.pt"):
        with open(path, "rb") as file:
            check_archive(file, path)
    names = os.listdir(folder)
    if _TRAINER_STATE not in names and _INDEX not in names:
        return  # DeepSpeed's
    for name in (_TRAINER_STATE, _INDEX):
        if name not in names:
            raise _damaged(folder, f"{name} is missing")
    if _INDEX_CHECKSUM in names and (folder / _INDEX_CHECKSUM).read_bytes() != _index_checksum(folder).encode():
        raise _damaged(folder, f"{_INDEX} does not match its checksum")
    read_state(folder)
    for place in (_read_index(folder).storage_data or {}).values():
        if place.relative_path not in names:  # nor is a file outside of the folder read
            raise _damaged(folder, f"{place.relative_path} is missing")
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            value = io.BytesIO(file.read(place.length))  # a tensor or an object, each of which is an archive by itself
        check_archive(value, folder / place.relative_path)
        value.seek(0)
        load_archive(value, folder / place.relative_path)


class _IndexReader(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's index, a pickle of a handful of classes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


def _read_index(folder: Path) -> Any:
    try:
        with open(folder / _INDEX, "rb") as file:
            return _IndexReader(file).load()
    except Exception as error:  # pickle raises many kinds
        raise _cannot_read(folder / _INDEX, error) from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Puts together the weights of a folder that `check` has passed, however many processes wrote them."""
    import torch.distributed.checkpoint as dcp  # slow to import

    weights = {
        name: torch.empty(info.size, dtype=info.properties.dtype, device="cpu")
        for name, info in _read_index(folder).state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and hasattr(info, "properties")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(weights, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(_WEIGHTS): value for name, value in weights.items()}
