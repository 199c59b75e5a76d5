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
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dllm_var.benchmarking.trainers import RandomSamples
from dllm_var.datamodules import CmudictSource, GsmSymbolicSource, PackedDataModule, Source
from dllm_var.datamodules.table import Table
from dllm_var.errors import UserError

ROUNDS = 15  # short ones, so that what else the machine does falls on both alike
BAR = 10  # rows/s over the loop's


def stream_rows(table: Table, context_length: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Strings samples together in Python and cuts every `context_length` tokens; yields batches."""
    rows: list[dict[str, list[Any]]] = []
    row: dict[str, list[Any]] = {"input_ids": [], "supervised": [], "segment_ids": [], "position_ids": []}
    order = np.random.default_rng(0).permutation(len(table))
    for sample in order.tolist():
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


def rows_per_second(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    """Takes batches for some time, after one to warm up."""
    next(batches)
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        next(batches)
        count += batch_size
    return count / passed


def endless(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Begins anew whenever the batches have come to an end."""
    while True:
        yield from make()


def measure_loading(name: str, data: PackedDataModule, seconds: float) -> dict[str, Any]:
    """Compares our loader with the loop, in turn."""
    table, rows = data.table("train"), data.rows("train")
    began = time.perf_counter()
    rows.packed(0)
    plan = time.perf_counter() - began
    contenders = {
        "ours": endless(lambda: iter(data.train_dataloader())),
        "loop": endless(lambda: stream_rows(table, data.context_length, data.batch_size)),
    }
    speeds: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(ROUNDS):
        for who, batches in contenders.items():
            speeds[who].append(rows_per_second(batches, data.batch_size, seconds))
    ratio = median(ours / loop for ours, loop in zip(speeds["ours"], speeds["loop"], strict=True))
    return {
        "data": name,
        "samples": len(table),
        "context_length": data.context_length,
        "plan_seconds": plan,
        "rows_per_second": {who: median(values) for who, values in speeds.items()},
        "ratio": ratio,
        "passed": ratio >= BAR,
    }


def measure_tokenizing(source: Source, cache: Path) -> dict[str, Any]:
    """Tokenizes the splits of a source into a new cache."""
    data = PackedDataModule(source, cache_dir=str(cache))
    wall, cpu = time.perf_counter(), time.process_time()
    data.prepare_data()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    records = sum(data.table(split).meta["records"] for split in source.splits)
    return {"source": type(source).__name__, "records": records, "seconds": wall, "cores_busy": cpu / wall}


def measure_packing(source: Source, cache: Path, context_length: int, canvas: int) -> list[dict[str, Any]]:
    """Share of row positions that are not padding, for each policy."""
    found = []
    for packing, bar in (("concat", 0.99), ("best_fit", 0.97)):
        data = PackedDataModule(
            source, context_length=context_length, packing=packing, canvas=canvas, cache_dir=str(cache)
        )
        used = data.report()["utilisation"]
        setting = {"source": type(source).__name__, "context_length": context_length, "canvas": canvas}
        found.append({**setting, "packing": packing, "utilisation": used, "bar": bar, "passed": used >= bar})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    seconds, samples = (0.02, 200) if options.quick else (0.2, 20_000)
    result: dict[str, Any] = {"cores": os.cpu_count(), "quick": options.quick}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        result["tokenizing"] = measure_tokenizing(CmudictSource(), cache)
        print(
            "tokenizing {source}: {records:,} records in {seconds:.1f} s, {cores_busy:.1f} cores".format(
                **result["tokenizing"]
            )
        )
        long = RandomSamples(samples, 60, 140, 8192)
        result["loading"] = []
        for name, data in (
            ("words", PackedDataModule(CmudictSource(), None, 16, 128, "concat", cache_dir=folder)),
            ("instructions", PackedDataModule(long, None, 8, 1024, "concat", cache_dir=folder)),
            ("instructions", PackedDataModule(long, None, 2, 8192, "concat", cache_dir=folder)),
        ):
            result["loading"].append(one := measure_loading(name, data, seconds))
            ours, loop = one["rows_per_second"]["ours"], one["rows_per_second"]["loop"]
            print(
                f"{name}, {one['samples']:,} samples, rows of {one['context_length']}: planned in "
                f"{1000 * one['plan_seconds']:.0f} ms; {ours:,.0f} rows/s, the loop {loop:,.0f}: {one['ratio']:.1f}x "
                f"(>= {BAR}x: {'pass' if one['passed'] else 'FAIL'})"
            )
        result["packing"] = []
        try:
            sources: list[tuple[Source, int, int]] = [
                (CmudictSource(), context_length, canvas) for context_length in (128, 1024) for canvas in (12, 0)
            ]
            sources.append((long, 1024, 0))
            sources += [] if options.quick else [(GsmSymbolicSource(), 1024, 0)]
            for source, context_length, canvas in sources:
                result["packing"] += measure_packing(source, cache, context_length, canvas)
        except UserError as error:
            print(f"left out: {error}")
        for one in result["packing"]:
            print(
                f"{one['source']}, rows of {one['context_length']}, canvas {one['canvas']}, {one['packing']}: "
                f"{one['utilisation']:.1%} used (>= {one['bar']:.0%}: {'pass' if one['passed'] else 'FAIL'})"
            )
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
