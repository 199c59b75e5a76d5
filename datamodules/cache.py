"""Tables on disk: tokenized once, kept under a fingerprint, memory-mapped by every process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dllm_var.datamodules.encoding import RecordEncoder, bad_record
from dllm_var.datamodules.sources import Source
from dllm_var.datamodules.table import Table
from dllm_var.errors import UserError
from dllm_var.tokenization import Tokenizer

VERSION = 1  # of the files' layout and meaning; part of the cache key
CHUNK = 4_096  # records tokenized at a time
PROGRESS_AFTER = 5.0  # seconds of tokenizing before progress is shown


def load_table(
    source: Source, split: str, tokenizer: Tokenizer, cache: Path, chat: bool = False, skip_bad: bool = False
) -> Table:
    """Opens the tokenized table of a split, building it first if the cache has none.

    Several processes may do so at once: each writes a folder of its own, and the first to finish gives it its name.

    Args:
        source: Where the records come from.
        split: One of the source's splits.
        tokenizer: Makes token ids of them.
        cache: Folder of tables, shared by runs and processes.
        chat: Whether prompt and answer go through the tokenizer's chat template.
        skip_bad: Whether records that cannot be used are counted instead of being an error.

    Raises:
        UserError: When a record cannot be used, with its place; or when the cache cannot be written.
    """
    settings = {"version": VERSION, "source": source.fingerprint(), "tokenizer": tokenizer.fingerprint, "chat": chat}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"{key}-{split}"
    if not (folder / "meta.json").is_file():
        try:
            _build(source, split, RecordEncoder(tokenizer, chat, skip_bad), folder)
        except OSError as error:
            raise UserError(f"cannot keep tokenized data in {cache}: {error}; set data.cache_dir") from None
    table = Table.open(folder)
    if table.meta["skipped"] and not skip_bad:  # built by a run that skipped them
        raise bad_record(table.meta["reasons"][0])
    return table


def _build(source: Source, split: str, encoder: RecordEncoder, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # others may share the cache
        _write(source, split, encoder, unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process was faster with the same table, which is as good
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(source: Source, split: str, encoder: RecordEncoder, folder: Path) -> None:
    """Writes the files of a table, chunk by chunk."""
    columns: dict[str, list[NDArray[np.int64]]] = {"length": [], "answer_start": [], "record": []}
    records = source.located_records(split)
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "supervised.bin", "wb") as supervised,
        tqdm(desc=f"tokenizing {split}", unit=" records", delay=PROGRESS_AFTER, leave=False) as progress,
    ):
        while chunk := list(islice(records, CHUNK)):
            table = encoder.encode(chunk, encoder.records)
            table.tokens.tofile(tokens)
            table.supervised.tofile(supervised)
            columns["length"].append(np.diff(table.offsets))
            columns["answer_start"].append(table.answer_start)
            columns["record"].append(table.record)
            progress.update(len(chunk))
    joined = {name: np.concatenate([np.empty(0, np.int64), *parts]) for name, parts in columns.items()}
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(joined.pop("length"))])
    for name, column in {"offsets": offsets, **joined}.items():
        np.save(folder / f"{name}.npy", column)
    (folder / "meta.json").write_text(json.dumps(encoder.meta, indent=1), encoding="utf-8")
