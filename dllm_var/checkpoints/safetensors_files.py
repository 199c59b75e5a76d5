"""Safetensors folders, read and written a tensor at a time: a model never has to fit into memory twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.files import publish, read_object, write_atomically, write_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of `model.safetensors`, or of the shards its index lists; each is read when it is asked for.

    Args:
        folder: The folder.

    Raises:
        UserError: When weights are missing, damaged, or pickled, which would run whatever code is in them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name_in_file: dict[str, str] = {}
        if (folder / INDEX).is_file():
            self._file_of = _read_index(folder / INDEX)
            self._files = {name: _open(folder / name) for name in sorted(set(self._file_of.values()))}
            there = {file: set(opened.keys()) for file, opened in self._files.items()}
            lost = next((name for name, file in self._file_of.items() if name not in there[file]), None)
            if lost is not None:
                raise UserError(f"{folder / self._file_of[lost]} lacks {lost}, which {INDEX} promises: fetch it again")
        else:
            if not (folder / WEIGHTS).is_file() and any(next(folder.glob(kind), None) for kind in PICKLED):
                raise UserError(
                    f"{folder} has pickled weights only, and a pickle can run code: convert them with transformers, "
                    "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
                )
            self._files = {WEIGHTS: _open(folder / WEIGHTS)}
            self._file_of = dict.fromkeys(self._files[WEIGHTS].keys(), WEIGHTS)

    def rename(self, names: dict[str, str]) -> None:
        """Gives tensors other names; `names` has the names in the files by the new ones."""
        for new, name in names.items():
            if name in self._file_of:
                self._file_of[new] = self._file_of.pop(name)
                self._name_in_file[new] = name

    @property
    def size(self) -> int:
        """Bytes that the files take."""
        return sum((self.folder / name).stat().st_size for name in self._files)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._file_of[name]].get_tensor(self._name_in_file.get(name, name))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # the inherited one would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _open(file: Path) -> Any:
    if not file.is_file():  # a pipe would be waited for
        raise UserError(f"cannot read {file}: there is no such file")
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _read_index(file: Path) -> dict[str, str]:
    try:
        names = dict(read_object(file)["weight_map"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    outside = next((name for name in names.values() if Path(str(name)).name != name), None)
    if outside is not None:
        raise UserError(f"{file} names {outside!r}, which is no file beside it")
    return names


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that is there whole or not at all.

    Raises:
        UserError: When it cannot be written.
    """
    try:
        with write_atomically(file) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file}: {error}") from error


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Writes tensors as `model.safetensors`, or as numbered shards with an index when one file would be too large.

    Args:
        folder: Where to; must exist.
        tensors: Names and values; at most `shard_bytes` and one tensor more are held at a time.
        shard_bytes: Bytes of one file, unless a single tensor is larger.
    """
    parts: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal shard, held
        if shard:
            parts.append((folder / f".part-{len(parts)}.safetensors", list(shard)))
            save_tensors(shard, parts[-1][0])
        shard, held = {}, 0

    for name, value in tensors:
        size = value.numel() * value.element_size()
        if shard and held + size > shard_bytes:
            flush()
        shard[name], held, total = value.detach().cpu().contiguous(), held + size, total + size
    flush()
    if len(parts) == 1:
        publish(parts[0][0], folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, (part, names) in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        publish(part, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
