"""Findings about data that take a reading of all of it, kept in the cache of tokenized data.

The contents of a large file are kept under its path, size, time and inode, and found again when one of these changes.
Only the content goes into a fingerprint, so that data may be moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllm_var.errors import UserError
from dllm_var.files import write_atomically

LARGE = 2**24  # bytes from which on a file's contents are kept in the cache
CHUNK = 2**20  # bytes read at a time
STRIDE = 4_096  # records between the places that are noted


def read_contents(file: Path, cache: Path | None, lines: bool = False) -> dict[str, Any]:
    """Reads a file, unless the cache has its contents.

    Args:
        file: A regular file.
        cache: Folder of tokenized data, if there is one.
        lines: Whether its records are lines of uncompressed text, which are counted then.

    Returns:
        ``digest``: SHA-256 of all bytes; for lines also ``records``: the number of lines that are not blank, and
        ``places``: of every `STRIDE`-th record its number, its line's number and the byte where it begins.

    Raises:
        UserError: When the file cannot be read.
    """
    try:
        state = file.stat()
        key = [str(file.absolute()), state.st_size, state.st_mtime_ns, state.st_ino, lines, STRIDE]
        return remember(cache if state.st_size >= LARGE else None, "files", key, lambda: _read(file, lines))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def remember(cache: Path | None, kind: str, key: Any, find_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the finding kept for a key, or finds it out and keeps it.

    Args:
        cache: Folder of tokenized data; nothing is kept when None, or when it cannot be written.
        kind: Name of the folder in it.
        key: Everything the finding depends on, as plain values.
        find_out: Returns the finding, as plain values.
    """
    if cache is None:
        return find_out()
    path = cache / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):  # missing or damaged
        return unseal(json.loads(path.read_text(encoding="utf-8")))
    found = find_out()
    with contextlib.suppress(OSError), write_atomically(path, shared=True) as partial:  # else it is found out again
        partial.write_text(json.dumps(seal(found)), encoding="utf-8")
    return found


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Returns plain values with a checksum of them."""
    return {**values, "seal": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def unseal(sealed: Any) -> dict[str, Any]:
    """Returns the values without their checksum; raises ValueError when they have changed since."""
    values = {name: value for name, value in sealed.items() if name != "seal"} if isinstance(sealed, dict) else {}
    if seal(values) != sealed:
        raise ValueError("its description is not as it was written")
    return values


def _read(file: Path, lines: bool) -> dict[str, Any]:
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        if not lines:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
            return {"digest": digest.hexdigest()}
        places: list[list[int]] = []
        records = offset = 0
        for number, line in enumerate(stream):
            digest.update(line)
            if not line.isspace():
                if records % STRIDE == 0:
                    places.append([records, number, offset])
                records += 1
            offset += len(line)
    return {"digest": digest.hexdigest(), "records": records, "places": places}
