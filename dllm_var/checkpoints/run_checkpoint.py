"""The checkpoints of a run, files or folders of shards: which is the newest, and whether it can be used."""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dllm_var.checkpoints.archive import UnusableCheckpoint, check_archive, load_archive
from dllm_var.checkpoints.sharded import check_folder, read_trainer_state
from dllm_var.files import PARTIAL, PREVIOUS, discard, put_back, set_aside

SAVING = ".saving"  # behind the name of what a strategy is writing

# -- reading -----------------------------------------------------------------------------------------------------------


def check(path: Path) -> None:
    """Reads all of a checkpoint, compares its checksums, and makes sure that loading it runs no code.

    A file that has passed is not read again by this process, unless it was written again.

    Raises:
        UnusableCheckpoint: When it is damaged or no checkpoint.
    """
    try:
        if path.is_dir():
            check_folder(path)
            return
        state = path.stat()
        _check_file(path, state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError as error:
        raise UnusableCheckpoint(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


@cache
def _check_file(path: Path, *version: int) -> None:
    if not path.is_file():  # a pipe would be waited for
        raise UnusableCheckpoint(f"{path} is not a checkpoint")
    with open(path, "rb") as file:
        check_archive(file, path)
    load_archive(path, path, mmap=True)  # its values; tensors stay on the disk


def read_state(path: Path) -> Any:
    """Reads the values of a checkpoint: from a file with its tensors, which stay on the disk until they are used; from
    a folder all but weights and optimizer.

    Raises:
        UnusableCheckpoint: When it cannot be read.
    """
    try:
        if path.is_dir():
            return read_trainer_state(path)
        if path.exists() and not path.is_file():
            raise UnusableCheckpoint(f"{path} is not a checkpoint")
        return load_archive(path, path, mmap=True)
    except OSError as error:
        raise UnusableCheckpoint(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


def step_of(path: Path) -> int | None:
    """Returns how many steps a checkpoint has been trained; None when that cannot be read."""
    try:
        step = read_state(path)["global_step"]
    except (UnusableCheckpoint, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


# -- which one ---------------------------------------------------------------------------------------------------------


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, those of later steps first; links that lead nowhere are left out.

    Among checkpoints of one step the one written last comes first. One whose step cannot be read has its place by the
    time of writing, so that damage to it is told and not passed over.
    """
    found: list[tuple[int | None, int, Path]] = []
    for path in [*folder.glob("*.ckpt"), *set_aside(folder).values()]:
        with suppress(OSError):
            found.append((step_of(path), path.stat().st_mtime_ns, path))
    known = [(step, written) for step, written, _ in found if step is not None]

    def place(entry: tuple[int | None, int, Path]) -> tuple[int, int, str]:
        step, written, path = entry
        if step is None:
            step = max((other for other, before in known if before <= written), default=-1)
        return step, written, path.name

    return [path for *_, path in sorted(found, key=place, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of the latest step, or None."""
    return next(iter(newest_first(folder)), None)


def newest_usable(folder: Path, but: Container[Path] = ()) -> Path | None:
    """Returns the newest checkpoint of a folder that passes `check`, or None."""
    for path in newest_first(folder):
        if path not in but:
            with suppress(UnusableCheckpoint):
                check(path)
                return path
    return None


def check_or_offer(path: Path, option: str) -> None:
    """Checks a checkpoint, and finds the one to take in its place when it cannot be used.

    Args:
        path: The checkpoint.
        option: With which the user would name another, such as `--resume`.

    Raises:
        UnusableCheckpoint: Says what is wrong with it, and gives the option with the newest good one beside it.
    """
    try:
        check(path)
    except UnusableCheckpoint as error:
        other = newest_usable(path.parent, {path})
        offer = f"the newest good one is {option}={other}"
        if other is None:
            offer = f"no other checkpoint in {path.parent} can be used: start anew, or use one of another run"
        raise UnusableCheckpoint(f"{error}; {offer}") from None


def clear_leftovers(folder: Path) -> None:
    """Puts back or removes what a process that was killed while saving has left; none may be saving now."""
    put_back(folder)
    for suffix in (PARTIAL, PREVIOUS, SAVING):
        for leftover in folder.glob(f"*.ckpt{suffix}"):
            discard(leftover)
