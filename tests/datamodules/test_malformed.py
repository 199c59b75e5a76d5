"""Training data that is broken at random places is refused in one line that names the cause, or read whole."""

import gzip
import json
import random

import pyarrow
import pytest
from pyarrow import parquet

from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule, ParquetSource
from dllm_var.errors import UserError

SCALARS = [None, True, -1, 3.5, 10**30, float("nan"), "", " ", "\x00", "\ud800", "null", [], {}, [None], {"": []}]
RECORDS = [
    {"prompt": "cat", "response": "K AE T"},
    {"instruction": "cat", "input": "", "output": "K AE T"},
    {"text": "K AE"},
    {"input_ids": [4, 50, 51, 52], "prompt_length": 1},
    {
        "messages": [
            {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "K"), ("user", "b"))
        ]
    },
]


def damaged_bytes(rng, content):
    place, size = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 100))
    before, part, after = content[:place], content[place : place + size], content[place + size :]
    changed = rng.choice((b"", part + part, rng.randbytes(size), bytes(size), part[::-1]))
    return before + changed + rng.choice((after, after, b""))


def damaged_value(rng, value):
    """A nested value with one part of it replaced, removed or repeated."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice([*SCALARS, [value], str(value)])
    if isinstance(value, dict):
        key = rng.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        return rest if rng.random() < 0.2 else {**rest, key: damaged_value(rng, value[key])}
    place = rng.randrange(len(value))
    return [
        *value[:place],
        *rng.choice(([], [value[place]] * 2, [damaged_value(rng, value[place])])),
        *value[place + 1 :],
    ]


def jsonl(rng, folder):
    """Writes a file of JSON lines; returns its source, and how many records it has if that is known."""
    records = rng.choices(RECORDS, k=rng.choice((1, 3, 20)))
    records[0] = damaged_value(rng, records[0]) if rng.random() < 0.7 else records[0]
    content = "\n".join(map(json.dumps, records)).encode()
    content = damaged_bytes(rng, content) if rng.random() < 0.5 else content
    content = rng.choice([content] * 20 + [b"", b"[" * 100_000, content.decode(errors="replace").encode("utf-16")])
    path = folder / rng.choice(("data.jsonl", "data.jsonl", "data.jsonl.gz"))
    if path.suffix == ".gz":
        content = gzip.compress(content)
        content = damaged_bytes(rng, content) if rng.random() < 0.7 else content
    path.write_bytes(content)
    columns = rng.choice([None, None, None, {"prompt": "question"}, {"response": "prompt"}, {"text": "messages"}])
    source = JsonlSource(str(path), validation_size=rng.choice((0, None, 1, 0.3)), test_size=0, columns=columns)
    return source, None if path.suffix == ".gz" else sum(bool(line.strip()) for line in content.split(b"\n"))


def parquet_rows(rng, folder):
    """Writes a Parquet file; returns as `jsonl`."""
    number = rng.choice((0, 1, 5, 50))
    texts = pyarrow.array([f"K{' AE' * (index % 5)}" for index in range(number)])
    other = [
        pyarrow.array([None] * number),
        pyarrow.array([[index, None] for index in range(number)], pyarrow.list_(pyarrow.int64())),
        pyarrow.array([b"\xff\xfe"] * number, pyarrow.binary()),
        pyarrow.array([{"role": "user", "content": "a"}] * number),
        pyarrow.array([10**12] * number, pyarrow.timestamp("s")),
    ]
    more = rng.sample(("text", "messages", "input_ids", "prompt_length", "instruction", "extra"), rng.randint(0, 3))
    table = pyarrow.table({name: rng.choice([texts] * 20 + other) for name in ("prompt", "response", *more)})
    path = folder / "data.parquet"
    parquet.write_table(table, path, row_group_size=rng.choice((1, 7, 100)))
    intact = rng.random() < 0.4
    if not intact:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    return ParquetSource(str(path), validation_size=rng.choice((0, None, 2))), number if intact else None


def read_all(rng, folder, write):
    """Tokenizes, packs and reads every row; raises AssertionError when a record is missing that was not skipped."""
    source, records = write(rng, folder)
    packing, canvas = rng.choice([("concat", 0), ("best_fit", 0), ("best_fit", 4), ("concat", 3)])
    bad, too_long = rng.choice(("error", "skip")), rng.choice(("drop", "truncate", "error"))
    settings = {"packing": packing, "canvas": canvas, "on_bad_record": bad, "on_too_long": too_long}
    tokenizer, cache = CmudictSource.default_tokenizer, str(folder / "cache")
    data = PackedDataModule(source, tokenizer, 2, rng.choice((8, 32)), cache_dir=cache, **settings)
    data.prepare_data()
    rows = data.rows("train")
    rows.__getitems__(range(len(rows)))
    data.report()
    tables = [data.table(split) for split in source.splits]
    if records is not None:
        assert sum(table.meta["records"] for table in tables) == records
        assert sum(len(table) + table.meta["skipped"] for table in tables) == records


@pytest.mark.parametrize(("write", "number"), [(jsonl, 60), (parquet_rows, 25)])
def test_broken_data_is_refused_with_a_named_cause_or_read_whole(write, number, tmp_path):
    refused = []
    for seed in range(number):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            read_all(random.Random(f"{write.__name__} {seed}"), folder, write)
        except UserError as error:
            refused.append(str(error).strip())
    assert 0 < len(refused) < number
    assert all(len(message.splitlines()) == 1 for message in refused)
