"""Contents of data files, found out by reading each once: a digest, and where its records stand.

For large files it is kept in the cache of tokenized data, under their path, size, time and inode, and found out again
when one of these changes. Nothing but the content goes into a fingerprint, so that data may be moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dllm_var.datamodules.table import seal, unseal
from dllm_var.errors import UserError
from dllm_var.files import write_atomically

KEPT = 2**24  # bytes from which on a file's contents are kept in the cache
STRIDE = 4_096  # records between the places that are noted
CHUNK = 2**20


@dataclass(frozen=True)
class Contents:
    """A file's content.

    Args:
        digest: SHA-256 of all its bytes.
        records: How many lines it has that are not blank; -1 when they were not counted.
        places: Number of a record, number of its line and the byte it begins at, for every `STRIDE`-th record.
    """

    digest: str
    records: int = -1
    places: list[list[int]] = field(default_factory=list)


def read_contents(file: Path, cache: Path | None, lines: bool = False) -> Contents:
    """Reads a file, unless the cache knows what is in it.

    Args:
        file: A regular file.
        cache: Folder of tokenized data, where the contents of large files are kept; nowhere when not given.
        lines: Whether its records are lines of uncompressed text, to be counted.

    Raises:
        UserError: When the file cannot be read.
    """
    try:
        state = file.stat()
        key = [str(file.absolute()), state.st_size, state.st_mtime_ns, state.st_ino, lines, STRIDE]
        cache = cache if state.st_size >= KEPT else None
        return Contents(
            **remember(cache, "files", key, lambda: asdict(_read_lines(file) if lines else _read_bytes(file)))
        )
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def remember(cache: Path | None, kind: str, key: Any, find_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what was found out before, or finds it out and keeps it.

    Args:
        cache: Folder of tokenized data; nothing is kept when not given, or when it cannot be written.
        kind: Name of the folder in it.
        key: What the answer depends on, as plain values.
        find_out: Gives the answer, as plain values.
    """
    if cache is None:
        return find_out()
    kept = cache / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):  # not there, or damaged
        return unseal(json.loads(kept.read_text(encoding="utf-8")))
    found = find_out()
    with contextlib.suppress(OSError), write_atomically(kept, shared=True) as partial:  # else it is found out again
        partial.write_text(json.dumps(seal(found)), encoding="utf-8")
    return found


def _read_bytes(file: Path) -> Contents:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return Contents(digest.hexdigest())


def _read_lines(file: Path) -> Contents:
    digest = hashlib.sha256()
    places: list[list[int]] = []
    records = offset = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream):
            digest.update(line)
            if not line.isspace():
                if records % STRIDE == 0:
                    places.append([records, number, offset])
                records += 1
            offset += len(line)
    return Contents(digest.hexdigest(), records, places)
