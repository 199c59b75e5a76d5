"""The newest checkpoint of a folder, by the step it holds, and whether it can be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dllm_var.checkpoints.run_files import UnusableCheckpoint, check_file, read_file, set_aside
from dllm_var.checkpoints.shards import SEAL, check_folder, read_trainer_state

_SHARD_MARKS = ("meta.pt", "latest")  # what Lightning's sharded strategies and DeepSpeed leave in a checkpoint folder


def is_sharded(path: Path) -> bool:
    """Whether a folder is a checkpoint in parts."""
    return path.is_dir() and any((path / name).exists() for name in (SEAL, *_SHARD_MARKS))


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint (a file, or a folder of shards) of the latest step, or None."""
    return next(iter(newest_first(folder)), None)


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, those of later steps first; links that lead nowhere are left out.

    Among checkpoints of one step the one written last comes first. One whose step cannot be read (it is damaged, or no
    checkpoint of ours) has its place by the time of writing, so that the damage is told and not passed over.
    """
    found: list[tuple[int | None, int, Path]] = []
    for path in [*folder.glob("*.ckpt"), *set_aside(folder).values()]:
        try:
            found.append((step_of(path), written_at(path), path))
        except OSError:
            continue
    known = [(step, written) for step, written, _ in found if step is not None]

    def place(entry: tuple[int | None, int, Path]) -> tuple[int, int, str]:
        step, written, path = entry
        if step is None:
            step = max((other for other, before in known if before <= written), default=-1)
        return step, written, path.name

    return [path for *_, path in sorted(found, key=place, reverse=True)]


def step_of(path: Path) -> int | None:
    """Returns the step a checkpoint holds, without reading its tensors or running code; None when it cannot be read."""
    try:
        if path.is_dir():
            step = read_trainer_state(path)["global_step"]
        elif not path.is_file():  # a pipe would be waited for
            return None
        else:
            step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # torch raises many kinds; `check` will say what is wrong
        return None
    return step if isinstance(step, int) else None


def written_at(path: Path) -> int:
    """Returns when a checkpoint was finished, in nanoseconds."""
    return (path / SEAL if (path / SEAL).is_file() else path).stat().st_mtime_ns


def check(path: Path) -> None:
    """Reads all of a checkpoint and compares its checksums.

    Raises:
        UnusableCheckpoint: When it is damaged, of another format, or no checkpoint.
    """
    if path.is_dir():
        check_folder(path)
    elif not check_file(path):
        read_file(path)  # nothing else tells whether it can be loaded without running code


def check_or_offer(path: Path, option: str) -> None:
    """Checks a checkpoint, and finds the one to take in its place when it cannot be used.

    Args:
        path: The checkpoint.
        option: Under which the user would name another, such as `--resume`.

    Raises:
        UnusableCheckpoint: Says what is wrong with it, and gives the option with the newest good one beside it.
    """
    try:
        check(path)
    except UnusableCheckpoint as error:
        raise UnusableCheckpoint(f"{error}; {offer(path, option)}") from None


def offer(path: Path, option: str) -> str:
    """Says with which option to go on in place of a checkpoint that cannot be used."""
    other = newest_usable(path.parent, {path})
    if other is None:
        return f"no other checkpoint in {path.parent} can be used: start anew, or use one of another run"
    return f"the newest good one is {option}={other}"


def newest_usable(folder: Path, but: Any = ()) -> Path | None:
    """Returns the newest checkpoint of a folder that passes `check`, or None."""
    for path in newest_first(folder):
        if path in but:
            continue
        try:
            check(path)
        except UnusableCheckpoint:
            continue
        return path
    return None
