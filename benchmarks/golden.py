"""Answers, losses and rows of every sampler, objective and packing, to compare before and after a change of the code.

    python benchmarks/golden.py record FILE.json.gz                                   # minutes on two cores
    python benchmarks/golden.py compare benchmarks/results/golden.json.gz [--only NAME ...]

`compare` takes prompts and records from the file; it decodes, trains and packs with the dllm_var that Python imports.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gzip
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # before torch is imported
FIELDS = ("tokens", "commit_steps", "nfe", "auxiliary_nfe", "finish_reason", "prompt_tokens", "text")
CANVASES = ("fixed_length", "prefix_cache", "dual_cache", "dkv", "freecache", "prophet_canvas")
TASKS, TWINS = ("cmudict", "gsm_symbolic"), ("autoregressive", "diffuspec")
TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())  # what is trained and packed


def cases() -> dict[str, tuple[Any, ...]]:
    """Returns what is run, by name: the function, then its arguments behind the folder of the records."""
    found: dict[str, tuple[Any, ...]] = {}
    for overlay in sorted(path.stem for path in Path("configs/sampler").glob("*.yaml")):
        twin = "_autoregressive" if overlay in TWINS else ""
        file = ["--sampler", f"configs/sampler/{overlay}.yaml"]
        short = ["--sampler.canvas_length=24"] if overlay == "fixed_length" else []
        found[f"cmudict {overlay}"] = (answers, "cmudict" + twin, "cmudict", 200, [*file, *short])
        width = ["--max-new-tokens=160"] if overlay in TWINS else ["--block-length=8", "--max-new-tokens=160"]
        width = ["--sampler.canvas_length=48", "--block-length=16"] if overlay in CANVASES else width
        second = {
            "guided": "guide=checkpoints/gsm_symbolic_autoregressive",
            "diffuspec": "drafter=checkpoints/gsm_symbolic",
        }
        width += [f"--sampler.{second[overlay]}"] if overlay in second else []
        if overlay not in ("freedave", "wino"):  # they do not decode models with token_shift
            found[f"gsm_symbolic {overlay}"] = (answers, "gsm_symbolic" + twin, "gsm_symbolic", 50, [*file, *width])
        if not twin and overlay not in CANVASES:
            narrow = [*file, "--block-length=4"]
            found[f"cmudict {overlay} block 4"] = (answers, "cmudict", "cmudict", 40, narrow)
        if overlay in ("autoregressive", "threshold", "dual_cache", "multi_block", "first_hitting", "freedave", "wino"):
            one = [*file, "--batch-size=1"]
            found[f"cmudict {overlay} batch 1"] = (answers, "cmudict" + twin, "cmudict", 40, one)
            drawn = [*file, "--temperature=0.8", "--top-p=0.95", "--top-k=20", "--seed=7"]
            found[f"cmudict {overlay} drawn"] = (answers, "cmudict" + twin, "cmudict", 40, drawn)
    for checkpoint in ("cmudict", "cmudict_certain", "gsm_symbolic"):
        task = checkpoint.removesuffix("_certain")
        found[f"{checkpoint} default"] = (answers, checkpoint, task, 200, [])
        if checkpoint != "gsm_symbolic":  # it reads left to right
            found[f"{checkpoint} infill"] = (answers, checkpoint, "cmudict_gaps", 200, [])
    for commit in ("alone", "last_step", "joint_next"):
        options = [f"--sampler.kv_commit={commit}", "--sampler.grid=absolute", "--sampler.terminator_last=false"]
        found[f"cmudict kv_commit {commit}"] = (answers, "cmudict", "cmudict", 40, [*options, "--block-length=5"])
    steered = ["--stop=N", "--stop=AH T", "--suppress=AY", "--max-new-tokens=10"]
    found["cmudict stop"] = (answers, "cmudict", "cmudict", 200, steered)
    found["gsm_symbolic stop"] = (answers, "gsm_symbolic", "gsm_symbolic", 50, ["--stop=\n"])
    found |= {f"training {name}": (training, changes) for name, changes in TABLES["trainings"].items()}
    for packing in ("concat", "best_fit"):
        for name, shape in TABLES["rows"].items():
            for seed in (0, 1):
                found[f"rows {packing} {name} seed {seed}"] = (rows, {**shape, "packing": packing, "seed": seed})
        dropped = {"records": "gsm_symbolic", "context_length": 96, "batch_size": 1, "packing": packing}
        found[f"rows {packing} dropped"] = (rows, dropped)
    cut = {"records": "gsm_symbolic", "on_too_long": "cut", "packing": "concat"}
    return {**found, "rows concat cut": (rows, cut)}


def command(*arguments: str) -> None:
    """Runs one command of the package in this process."""
    from dllm_var.__main__ import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(arguments)
    if status:
        raise RuntimeError(output.getvalue().strip().splitlines()[-1])


def answers(folder: Path, checkpoint: str, records: str, count: int, options: list[str]) -> dict[str, list[Any]]:
    """Decodes prompts, evenly taken from the records; returns each field of the answers."""
    lines = (folder / f"{records}.jsonl").read_text().splitlines()
    prompts, output = folder / "prompts.jsonl", folder / "answers.jsonl"
    prompts.write_text("\n".join(lines[:: len(lines) // count][:count]))
    files = ["--prompts-file", str(prompts), "--json", "--output", str(output)]
    batch = [] if any(option.startswith("--batch-size") for option in options) else ["--batch-size=24"]
    command("generate", "--checkpoint", f"checkpoints/{checkpoint}", *files, *batch, *options)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    for answer in found:
        answer["text"] = zlib.crc32(answer["text"].encode())
    return {field: [answer.get(field) for answer in found] for field in FIELDS}


def training(folder: Path, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Trains ten steps of a tiny model; returns the columns of the logged figures."""
    settings = copy.deepcopy(TABLES["base"])
    for section, values in changes.items():
        settings[section].update(values)
    arguments = {"path": f"{folder}/cmudict.jsonl", "test_size": 0}
    records = {"class_path": "dllm_var.datamodules.JsonlSource", "init_args": arguments}
    settings["data"] |= {"source": records, "cache_dir": f"{folder}/cache"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": f"{folder}/runs"}}
    settings["trainer"]["logger"] = logger
    file = folder / "settings.yaml"
    file.write_text(json.dumps(settings))
    command("fit", "--config", str(file))
    newest = max(folder.glob("runs/**/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open() as lines:
        logged = list(csv.DictReader(lines))
    figures = {name: [float(line[name]) for line in logged if line[name]] for name in logged[0] if "/" in name}
    newest.unlink()
    return figures


def rows(folder: Path, settings: dict[str, Any]) -> dict[str, list[str]]:
    """Returns SHA-256 digests, cut to 16 digits, of each tensor of the first 50 training batches."""
    from dllm_var.datamodules import JsonlSource, PackedDataModule

    defaults = {"records": "cmudict", "batch_size": 4, "context_length": 128, "cache_dir": f"{folder}/cache"}
    settings = {**defaults, **settings}
    records = settings.pop("records")
    source = JsonlSource(f"{folder}/{records}.jsonl", test_size=0)
    data = PackedDataModule(source, f"checkpoints/{records}", **settings)
    data.prepare_data()
    found: dict[str, list[str]] = {}
    for batch in islice(data.train_dataloader(), 50):
        for name, tensor in batch.items():
            content = f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()
            found.setdefault(name, []).append(hashlib.sha256(content).hexdigest()[:16])
    return found


def task_records() -> dict[str, list[dict[str, str]]]:
    """Returns the tasks' problems as training records, and their answers with gaps."""
    found: dict[str, list[dict[str, str]]] = {}
    for task in TASKS:
        problems = map(json.loads, Path(f"dllm_var/evaluation/tasks/{task}.jsonl").read_text().splitlines())
        found[task] = [{"prompt": problem["prompt"], "response": problem["responses"][0]} for problem in problems]
        gaps = found[f"{task}_gaps"] = []
        for record in found[task][:: len(found[task]) // 200][:200]:
            words = record["response"].split(" ")
            text = " ".join(f"<gap:{1 + n % 2}>" if n % 5 in (0, 3) else word for n, word in enumerate(words))
            gaps.append({"prompt": record["prompt"], "infill": text})
    return found


def difference(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> str:
    """Says where two results of a case differ; floats may do so by a hundred-thousandth of their value."""
    differing: dict[str, list[int]] = {}
    largest = 0.0
    for name, old in before.items():
        new = after.get(name, [])
        if len(new) != len(old):
            return f"differs: {len(old)} entries of {name} before, {len(new)} after"
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            if isinstance(one, float) and math.isclose(one, other, rel_tol=1e-5):
                largest = max(largest, abs(one - other) / max(abs(one), 1e-30))
            elif one != other:
                differing.setdefault(name, []).append(place)
    if differing:
        places = [f"{name} at {' '.join(map(str, at[:12]))} ({len(at)})" for name, at in differing.items()]
        return f"differs: {', '.join(places)}"
    return f"same within {largest:.1e}" if largest else "same"


def main() -> int:
    """Records, or compares; returns 1 when a case differs or fails."""
    import torch

    import dllm_var

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=lambda path: Path(path).resolve())
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    options = parser.parse_args()
    os.chdir(Path(dllm_var.__file__).parent.parent)
    if compares := options.action == "compare":
        kept = json.loads(gzip.decompress(options.file.read_bytes()))
    else:
        kept = {"made": {"torch": torch.__version__}, "records": task_records(), "results": {}}
    results, known, bad = kept["results"], cases(), 0
    print(f"{options.action} with {os.getcwd()}, torch {torch.__version__}, the record's {kept['made']['torch']}")
    with tempfile.TemporaryDirectory() as name:
        for task, records in kept["records"].items():
            Path(name, f"{task}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        for case in dict.fromkeys([*results, *known]):
            if not any(part in case for part in options.only):
                continue
            began = time.perf_counter()
            try:
                if case not in known:
                    raise LookupError("this version has no such case")
                function, *arguments = known[case]
                found = function(Path(name), *arguments)
            except Exception as error:  # one case that cannot be run, by an older or newer version, is a finding
                line = f"failed: {type(error).__name__}: {error}"
                bad += case in results or not compares
            else:
                line = difference(results[case], found) if case in results else "not in the record"
                bad += line.startswith("differs")
                if not compares:
                    results[case], line = found, "recorded"
            print(f"{case}: {line} ({time.perf_counter() - began:.1f} s)", flush=True)
    if not compares:
        options.file.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), 9, mtime=0))
    print(f"{bad} bad")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
