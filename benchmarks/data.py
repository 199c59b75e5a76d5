"""How fast data is tokenized, packed and loaded, and how full the rows are.

    python benchmarks/data.py          # a minute or two
    python benchmarks/data.py --quick  # seconds

Rows are built from the same memory-mapped tables by our loader and by a loop in Python that strings samples together
and cuts every context_length tokens, both as batches of tensors. Plans of very large epochs: benchmarks/shard_plans.py.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dllm_var.benchmarking.contenders import RandomSamples
from dllm_var.datamodules import CmudictSource, GsmSymbolicSource, PackedDataModule, Source
from dllm_var.datamodules.table import Table
from dllm_var.errors import UserError

ROUNDS = 15  # short ones, so that what else the machine does falls on both alike
BAR = 10  # rows/s over the loop's


def loop_rows(table: Table, context_length: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Strings samples together in Python and cuts every `context_length` tokens; yields batches without end."""
    rows: list[dict[str, list[Any]]] = []
    row: dict[str, list[Any]] = {"input_ids": [], "supervised": [], "segment_ids": [], "position_ids": []}
    while True:
        for sample in np.random.default_rng(0).permutation(len(table)).tolist():
            start, end = int(table.offsets[sample]), int(table.offsets[sample + 1])
            tokens, supervised = table.tokens[start:end].tolist(), table.supervised[start:end].tolist()
            while tokens:
                room = context_length - len(row["input_ids"])
                segment = row["segment_ids"][-1] + 1 if row["segment_ids"] else 0
                row["input_ids"] += tokens[:room]
                row["supervised"] += supervised[:room]
                row["segment_ids"] += [segment] * len(tokens[:room])
                row["position_ids"] += range(len(tokens[:room]))
                tokens, supervised = tokens[room:], supervised[room:]
                if len(row["input_ids"]) == context_length:
                    rows.append(row)
                    row = {name: [] for name in row}
                    if len(rows) == batch_size:
                        yield {name: torch.tensor([r[name] for r in rows]) for name in row}
                        rows = []


def our_rows(data: PackedDataModule) -> Iterator[dict[str, torch.Tensor]]:
    """Yields our loader's batches without end."""
    while True:
        yield from data.train_dataloader()


def rows_per_second(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    """Takes batches for some time, after one to warm up."""
    next(batches)
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        next(batches)
        count += batch_size
    return count / passed


def measure_tokenizing(source: Source, cache: str) -> dict[str, Any]:
    """Tokenizes the splits of a source into a new cache."""
    data = PackedDataModule(source, cache_dir=cache)
    wall, cpu = time.perf_counter(), time.process_time()
    data.prepare_data()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    records = sum(data.table(split).meta["records"] for split in source.splits)
    return {"source": type(source).__name__, "records": records, "seconds": wall, "cores_busy": cpu / wall}


def measure_loading(data: PackedDataModule, seconds: float) -> dict[str, Any]:
    """Compares our loader with the loop, in turn."""
    table, rows = data.table("train"), data.rows("train")
    began = time.perf_counter()
    rows.packed(0)
    plan = time.perf_counter() - began
    contenders = {"ours": our_rows(data), "loop": loop_rows(table, data.context_length, data.batch_size)}
    speeds: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(ROUNDS):
        for who, batches in contenders.items():
            speeds[who].append(rows_per_second(batches, data.batch_size, seconds))
    ratio = median(ours / loop for ours, loop in zip(speeds["ours"], speeds["loop"], strict=True))
    return {
        "source": type(data.source).__name__,
        "samples": len(table),
        "context_length": data.context_length,
        "plan_seconds": plan,
        "rows_per_second": {who: median(values) for who, values in speeds.items()},
        "ratio": ratio,
        "passed": ratio >= BAR,
    }


def measure_packing(data: PackedDataModule) -> dict[str, Any]:
    """Share of row positions that are not padding."""
    names = ("context_length", "canvas", "packing")
    found = {"source": type(data.source).__name__, **{name: getattr(data, name) for name in names}}
    return {**found, "utilisation": data.report()["utilisation"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    seconds, samples = (0.02, 200) if options.quick else (0.2, 20_000)
    result: dict[str, Any] = {"cores": os.cpu_count(), "quick": options.quick, "loading": [], "packing": []}
    with tempfile.TemporaryDirectory() as cache:
        words, long = CmudictSource(), RandomSamples(samples, 60, 140, 8192)
        result["tokenizing"] = measure_tokenizing(words, cache)
        print(json.dumps(result["tokenizing"]))
        for source, batch_size, context_length in ((words, 16, 128), (long, 8, 1024), (long, 2, 8192)):
            data = PackedDataModule(source, None, batch_size, context_length, cache_dir=cache)
            result["loading"].append(measure_loading(data, seconds))
            print(json.dumps(result["loading"][-1]))
        shapes: list[tuple[Source, int, int]] = [(words, size, canvas) for size in (128, 1024) for canvas in (12, 0)]
        shapes += [(long, 1024, 0), *([] if options.quick else [(GsmSymbolicSource(), 1024, 0)])]
        for source, context_length, canvas in shapes:
            for packing in ("concat", "best_fit"):
                settings = {"context_length": context_length, "packing": packing, "canvas": canvas}
                try:
                    result["packing"].append(measure_packing(PackedDataModule(source, cache_dir=cache, **settings)))
                    print(json.dumps(result["packing"][-1]))
                except UserError as error:  # reasoning-gym is not installed
                    print(f"left out: {error}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
