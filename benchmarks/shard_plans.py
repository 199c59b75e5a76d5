"""How long plans of very large epochs take, and what memory a rank needs for them.

    python benchmarks/shard_plans.py          # 100 million samples, then 10^12 tokens on 1,024 ranks: minutes
    python benchmarks/shard_plans.py --quick  # a hundredth of both

Lengths are real numbers in memory-mapped files (1,100 tokens on average, context 8,192); only the tokens themselves are
left out. Of the large epoch all sections are counted, as every rank does when training begins; a few of the ranks then
find the batches they are dealt at steps over the whole epoch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.datamodules.rows import PackedRows, RowSampler
from dllm_var.datamodules.table import Table
from dllm_var.text.tokenizer import SpecialTokens

CONTEXT, RANKS, BATCH = 8_192, 1_024, 4
PIECE = 1_000_000  # lengths drawn at a time
RESULTS = Path(__file__).parent / "results" / "shard_plans.json"
SPECIAL = SpecialTokens(mask_id=1, terminator_ids=(2,), pad_id=0)


class Repeated:
    """A column of a table repeated end to end, so that 10^12 tokens need no disk; each time `step` is added to it."""

    def __init__(self, values: np.ndarray, times: int, step: int = 0) -> None:
        self.values, self.times, self.step = values, times, step

    def __len__(self) -> int:
        return len(self.values) * self.times + (1 if self.step else 0)

    def __getitem__(self, index: Any) -> Any:
        turn, place = np.divmod(index, len(self.values))
        return self.values[place] + turn * self.step


def make_table(folder: Path, samples: int, times: int) -> Table:
    """A table of lengths like those of web documents, `samples * times` of them."""
    path = folder / f"offsets-{samples}.bin"
    if not path.exists():
        generator, end = np.random.default_rng(0), 0
        with open(path, "wb") as file:
            np.zeros(1, np.int64).tofile(file)
            for first in range(0, samples, PIECE):
                lengths = generator.lognormal(6.5, 0.9, min(PIECE, samples - first))
                ends = end + np.cumsum(np.clip(lengths, 8, CONTEXT).astype(np.int64))
                ends.tofile(file)
                end = int(ends[-1])
    offsets: Any = np.memmap(path, dtype=np.int64, mode="r")
    if times > 1:
        offsets = Repeated(offsets[:-1], times, int(offsets[-1]))
    zeros: Any = Repeated(np.zeros(1, np.int64), samples * times)
    return Table(np.zeros(1, np.uint16), np.zeros(1, np.bool_), offsets, zeros, meta={})


def memory() -> int:
    """Memory of this process that is not a mapped file, in MB."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) // 1024


def measure(folder: Path, samples: int, times: int, packing: str, ranks: int, steps: int = 12) -> dict[str, Any]:
    """Counts an epoch's rows, plans some of it and finds the rows of some ranks at some steps; times are of the CPU."""
    table = make_table(folder, samples, times)
    began = time.process_time()
    rows = PackedRows(table, SPECIAL, CONTEXT, packing)
    total = len(rows)
    counted, after_counting = time.process_time() - began, memory()
    samplers = [RowSampler(total, BATCH, ranks, rank) for rank in sorted({0, ranks // 3, ranks - 1})]
    began = time.process_time()
    for step in np.linspace(0, samplers[0].batches - 1, steps).astype(int).tolist():
        for sampler in samplers:
            first = (step * ranks + sampler.rank) * BATCH
            for row in range(first, first + BATCH):  # the last ones are of the next epoch
                epoch, section, number = rows.locate(row)
                spans = rows.packed(epoch, section)[1].spans(np.array([number]))
                assert 0 < spans.length.sum() <= CONTEXT
    return {
        "packing": packing,
        "samples": len(table),
        "tokens": int(table.offsets[np.int64(len(table))]),
        "sections": rows.sections,
        "rows": total,
        "ranks": ranks,
        "batches_per_rank": samplers[0].batches,
        "count_seconds": round(counted, 1),
        "plan_seconds_per_section": round((time.process_time() - began) / (steps + 1), 2),
        "memory_after_counting_mb": after_counting,
        "memory_mb": memory(),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size")
    parser.add_argument("--output", type=Path, help=f"JSON file; {RESULTS.name} in results/ when not --quick")
    arguments = parser.parse_args()
    part = 100 if arguments.quick else 1
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for samples, times, ranks in ((100_000_000 // part, 1, 64), (10_000_000 // part, 100, RANKS)):
            for packing in ("concat", "best_fit"):
                with multiprocessing.Pool(1) as alone:  # a process of its own, so that peaks of memory do not mix
                    result = alone.apply(measure, (Path(folder), samples, times, packing, ranks))
                results.append(result)
                print(
                    "{packing:>8}: {samples:,} samples, {tokens:.2e} tokens, {ranks:,} ranks of {batches_per_rank:,} "
                    "batches: counted in {count_seconds} CPU s, then {plan_seconds_per_section} s a section; "
                    "memory {memory_mb} MB, peak {peak_mb} MB".format(**result),
                    flush=True,
                )
    output = arguments.output or (None if arguments.quick else RESULTS)
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
