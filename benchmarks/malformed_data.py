"""Training data, settings and checkpoints that are broken in many ways."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from dllm_var.checkpoints.archive import write_archive
from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule, ParquetSource
from dllm_var.errors import UserError

TOKENIZER = CmudictSource.default_tokenizer


class Partial(Exception):
    """Something was taken for whole that is not."""


SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", " ", "a", "\x00",
    "\ud800", "é\u202e\U0001f600", "${data.seed}", "${", "1", "null", [], {}, [[]], [None], {"a": None}, {"": []},
    "x" * 5_000, [0] * 2_000, {"class_path": "os.system"}, {"class_path": 3}, {"init_args": {}}, "os.system", "../..",
]  # fmt: skip


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """Content cut, overwritten, lengthened or mixed up."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 8, 100, 4_000))
        way = rng.randrange(7)
        if way == 0:
            del data[place:]
        elif way == 1:
            del data[place : place + size]
        elif way == 2:
            data[place : place + size] = rng.randbytes(size)
        elif way == 3 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif way == 4:
            data[place:place] = rng.randbytes(size)
        elif way == 5:
            data[place : place + size] = bytes(size)
        else:
            data += data[place : place + size]
    return bytes(data)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A nested value with one part of it replaced, removed, repeated or renamed; the original stays as it is."""
    inner = isinstance(value, dict | list) and len(value) > 0
    if not inner or rng.random() < 0.2:
        choices = [rng.choice(SCALARS)]
        if isinstance(value, str) and value:
            choices += [value[: rng.randrange(len(value))], value + rng.choice("x.:/\n"), [value]]
        if isinstance(value, int | float) and not isinstance(value, bool):
            choices += [-value, value * 10**9, value + 0.5, str(value), [value]]
        return rng.choice(choices)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        way = rng.random()
        rest = {name: item for name, item in value.items() if name != key}
        if way < 0.15:
            return rest
        if way < 0.25:
            return {**rest, f"{key}{rng.choice('xs_.')}": value[key]}
        return {**value, key: damaged_value(rng, value[key])}
    place = rng.randrange(len(value))
    way = rng.random()
    if way < 0.2:
        return value[:place] + value[place + 1 :]
    if way < 0.3:
        return [*value, value[place]]
    return [*value[:place], damaged_value(rng, value[place]), *value[place + 1 :]]


# -- training data -----------------------------------------------------------------------------------------------------


def good_records(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Records in all five formats."""
    records: list[dict[str, Any]] = []
    for _ in range(number):
        word = "".join(rng.choices("abcdefg", k=rng.randint(1, 8)))
        answer = " ".join(rng.choices(["K", "AE", "T", "IY"], k=rng.randint(1, 6)))
        records.append(
            rng.choice(
                [
                    {"prompt": word, "response": answer},
                    {"instruction": word, "input": "", "output": answer},
                    {"text": answer},
                    {"input_ids": [rng.randrange(4, 60) for _ in range(6)], "prompt_length": rng.randrange(6)},
                    {
                        "messages": [
                            {"role": "user", "content": word},
                            {"role": "assistant", "content": answer},
                            {"role": "user", "content": word},
                        ][: rng.randint(2, 3)]
                    },
                ]
            )
        )
    return records


def read_all(source: Any, rng: random.Random, folder: Path) -> PackedDataModule:
    """Tokenizes, packs and reads every row of a source, with settings at random."""
    packing, canvas = rng.choice([("concat", 0), ("best_fit", 0), ("best_fit", 4), ("concat", 3)])
    data = PackedDataModule(
        source,
        TOKENIZER,
        batch_size=2,
        context_length=rng.choice((8, 32)),
        packing=packing,
        canvas=canvas,
        on_bad_record=rng.choice(("error", "skip")),
        on_too_long=rng.choice(("drop", "truncate", "error")),
        cache_dir=str(folder / "cache"),
    )
    data.prepare_data()
    rows = data.rows("train")
    rows.__getitems__(range(len(rows)))
    data.held_out("validation" if "validation" in source.splits else "train")
    data.report()
    return data


def check_whole(data: PackedDataModule, lines: int) -> None:
    """Raises when records are missing that were not counted as skipped."""
    read = sum(data.table(split).meta["records"] for split in data.source.splits)
    kept = sum(len(data.table(split)) + data.table(split).meta["skipped"] for split in data.source.splits)
    if read != lines or kept != lines:
        raise Partial(f"of {lines} records {read} were read and {kept} accounted for")


def jsonl(rng: random.Random, folder: Path) -> None:
    """A JSON Lines file whose bytes, records or settings are wrong."""
    records: list[Any] = good_records(rng, rng.choice((1, 3, 20)))
    path = folder / "data.jsonl"
    for _ in range(rng.choice((0, 1, 1, 2))):
        place = rng.randrange(len(records))
        records[place] = damaged_value(rng, records[place])
    content = "\n".join(json.dumps(record) for record in records).encode()
    if rng.random() < 0.5:
        content = damaged_bytes(rng, content)
    way = rng.random()
    if way < 0.1:
        path = path.with_suffix(".jsonl.gz")
        content = gzip.compress(content)
        content = damaged_bytes(rng, content) if rng.random() < 0.7 else content
    elif way < 0.15:
        content = content.decode(errors="replace").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    elif way < 0.2:
        content = rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"\n\n", b"", b"[1, 2]", json.dumps(records).encode()))
    elif way < 0.25:
        content = content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n \n", b"\x00\n", b"")))
    path.write_bytes(content)
    columns = rng.choice([None, None, None, {"prompt": "question"}, {"response": "prompt"}, {"text": "messages"}])
    size = rng.choice((0, 0, None, 1, 0.3, 5, 10**9))
    source = JsonlSource(str(path), validation_size=size, test_size=rng.choice((0, 0, 1)), columns=columns)
    data = read_all(source, rng, folder)
    if path.suffix == ".jsonl":
        check_whole(data, sum(bool(line.strip()) for line in content.split(b"\n")))


def parquet(rng: random.Random, folder: Path) -> None:
    """A Parquet file whose bytes, types or columns are wrong."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "data.parquet"
    number = rng.choice((0, 1, 5, 50))
    texts = pyarrow.array([f"K{' AE' * (index % 5)}" for index in range(number)])
    other = [
        pyarrow.array(list(range(number))),
        pyarrow.array([None] * number),
        pyarrow.array([[index, None] for index in range(number)], pyarrow.list_(pyarrow.int64())),
        pyarrow.array([[4, 5, 6]] * number, pyarrow.list_(pyarrow.int32())),
        pyarrow.array([b"\xff\xfe"] * number, pyarrow.binary()),
        pyarrow.array([{"role": "user", "content": "a"}] * number),
        pyarrow.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "K"}]] * number),
        pyarrow.array([1.5] * number),
        pyarrow.array([10**12] * number, pyarrow.timestamp("s")),
        texts.dictionary_encode() if number else texts,
    ]
    names = ("prompt", "response", "text", "messages", "input_ids", "prompt_length", "instruction", "output", "extra")
    chosen = rng.sample(names, rng.randint(0, 4))
    table = pyarrow.table({name: rng.choice([texts] * 40 + other) for name in ("prompt", "response", *chosen)})
    if rng.random() < 0.2:
        table = table.drop_columns(rng.sample(table.column_names, rng.randint(1, table.num_columns)))
    pyarrow.parquet.write_table(
        table, path, row_group_size=rng.choice((1, 7, 100)), compression=rng.choice(("none", "snappy", "zstd"))
    )
    intact = rng.random() < 0.4
    if not intact:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    source = ParquetSource(str(path), validation_size=rng.choice((0, None, 2)))
    data = read_all(source, rng, folder)
    if intact:
        check_whole(data, number)


# -- what commands read -----------------------------------------------------------------------------------------------


def damaged_recipe(rng: random.Random, folder: Path) -> None:
    """A recipe with something wrong in its text or its settings."""
    settings: Any = yaml.safe_load((folder / "recipe.yaml").read_text())
    for _ in range(rng.choice((1, 1, 2))):
        settings = damaged_value(rng, settings)
    text = yaml.safe_dump(settings, sort_keys=False).encode(errors="replace")
    (folder / "recipe.yaml").write_bytes(damaged_bytes(rng, text) if rng.random() < 0.3 else text)


def damaged_checkpoint(name: Path, rng: random.Random, folder: Path) -> None:
    """Contents that do not belong together, under a good checksum."""
    state = torch.load(folder / name, weights_only=True)
    part = rng.choice(("dllm_var", "state_dict", "optimizer_states", "loops", "callbacks", "PackedDataModule"))
    write_archive({**state, part: damaged_value(rng, state[part])}, folder / name)


def damaged_file(pattern: Path | str, rng: random.Random, folder: Path) -> None:
    """A file with wrong bytes, or wrong values."""
    path = rng.choice(sorted(folder.glob(str(pattern))))
    if path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(json.dumps(damaged_value(rng, json.loads(path.read_text()))))
    elif path.suffix == ".jsonl" and rng.random() < 0.6:
        values = damaged_value(rng, [json.loads(line) for line in path.read_text().splitlines()])
        path.write_text(
            "".join(json.dumps(value) + "\n" for value in (values if isinstance(values, list) else [values]))
        )
    else:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))


def read_data(work: Callable[[random.Random, Path], Any], rng: random.Random) -> None:
    """Reads broken data to its end in place of a command."""
    try:
        work(rng, Path.cwd())
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    os._exit(0)
