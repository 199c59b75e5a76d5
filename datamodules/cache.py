"""Tables on disk: tokenized once, kept under a fingerprint, memory-mapped by every process."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zlib
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dllm_var.datamodules.encoding import RecordEncoder, bad_record
from dllm_var.datamodules.sources import Located, Source
from dllm_var.datamodules.table import COLUMNS, Table, seal
from dllm_var.errors import UserError
from dllm_var.files import PARTIAL, write_atomically

VERSION = 4  # of the files' layout and meaning; part of the cache key
CHUNK = 4_096  # records tokenized at a time
PROGRESS_AFTER = 5.0  # seconds of tokenizing before progress is shown
ABANDONED_AFTER = 86_400.0  # seconds without a write after which nobody finishes a folder any more


def load_table(source: Source, split: str, encoder: RecordEncoder, cache: Path, verify: bool = True) -> Table:
    """Opens the tokenized table of a split, building it first if the cache has none.

    Several processes may do so at once: each writes a folder of its own, and the first to finish gives it its name.

    Args:
        source: Where the records come from.
        split: One of the source's splits.
        encoder: Makes token ids of them; a new one, that has encoded nothing yet.
        cache: Folder of tables, shared by runs and processes.
        verify: Compares the checksums of all there is in the table.

    Raises:
        UserError: When a record cannot be used, with its place; when the cache cannot be written, or is damaged.
    """
    settings = {"version": VERSION, "source": source.fingerprint(), **encoder.settings}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"{key}-{split}"
    if not folder.is_dir():
        try:
            _build(source, split, encoder, folder)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot keep tokenized data in {cache}: {reason}; set data.cache_dir") from None
    table = Table.open(folder, verify)
    if table.meta["skipped"] and not encoder.skip_bad:  # built by a run that skipped them
        raise bad_record(table.meta["reasons"][0])
    return table


def _build(source: Source, split: str, encoder: RecordEncoder, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder.parent)
    with write_atomically(folder, shared=True) as partial:
        partial.mkdir()
        _write(source, split, encoder, partial)


def _clear_abandoned(cache: Path) -> None:
    """Removes what processes that were killed while building left behind; needs no lock, which not every disk has."""
    for folder in cache.glob(f"*{PARTIAL}"):
        with suppress(OSError):  # its owner has just finished
            written = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
            if time.time() - written > ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _write(source: Source, split: str, encoder: RecordEncoder, folder: Path) -> None:
    """Writes the files of a table, chunk by chunk."""
    records = source.located_records(split)
    samples = tokens = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in COLUMNS}
        progress = stack.enter_context(
            tqdm(desc=f"tokenizing {split}", unit=" records", delay=PROGRESS_AFTER, leave=False)
        )
        first = np.zeros(1, np.int64)
        first.tofile(files["offsets"])
        crc32 = {name: zlib.crc32(first.data) if name == "offsets" else 0 for name in COLUMNS}
        while chunk := _next_chunk(records, source, split):
            table = encoder.encode(chunk, encoder.records)
            columns = {name: getattr(table, name) for name in COLUMNS}
            columns["offsets"] = table.offsets[1:] + tokens
            for name, column in columns.items():
                column.tofile(files[name])
                crc32[name] = zlib.crc32(column.data, crc32[name])
            samples, tokens = samples + len(table), tokens + len(table.tokens)
            progress.update(len(chunk))
    meta = seal({**encoder.meta, "samples": samples, "tokens": tokens, "crc32": crc32})
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _next_chunk(records: Located, source: Source, split: str) -> list[tuple[str, Any]]:
    try:
        return list(islice(records, CHUNK))
    except OSError as error:  # not to be taken for one of the cache
        reason = " ".join(str(error).split())
        raise UserError(f"the {split} split of {type(source).__name__} cannot be read: {reason}") from error
