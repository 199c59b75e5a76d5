"""Answers, losses and rows of every sampler, objective and packing, to compare before and after a change of the code.

    python benchmarks/golden.py record FILE.json.gz                                   # minutes on two cores
    python benchmarks/golden.py compare benchmarks/results/golden.json.gz [--only NAME ...]

`compare` takes prompts and records from the file; it decodes, trains and packs with the dllm_var that Python imports.
"""

from __future__ import annotations

import argparse
import contextlib
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

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # before torch is imported
FIELDS = ("tokens", "commit_steps", "nfe", "auxiliary_nfe", "finish_reason", "prompt_tokens", "text")
CANVASES = ("fixed_length", "prefix_cache", "dual_cache", "dkv", "freecache", "prophet_canvas")
TASKS, TWINS = ("cmudict", "gsm_symbolic"), ("autoregressive", "diffuspec")
EOS, BLOCKS = "dllm_var.objectives.EosSchedule", "dllm_var.objectives.BlockDiffusion"
ADAPTED = dict(whole_share=0.3, right_heavy=0.5, causal_context=True, autoregressive_weight=0.5, token_shift=True)
SHIPPED = {"init_from": "checkpoints/cmudict", "transformer": {}}
OBJECTIVES: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {  # class, its arguments, other settings
    "default": (None, {}, {}),
    "accumulated": (None, {}, {"trainer": {"accumulate_grad_batches": 2, "val_check_interval": 20}}),
    "eos per segment": (EOS, {"t_max": 1.0, "rate_per": "segment"}, {"data": {"packing": "best_fit", "canvas": 12}}),
    "eos full attention": (EOS, {}, {"model": {"attention": "full"}, "data": {"on_too_long": "cut"}}),
    "mdlm": ("dllm_var.objectives.Mdlm", {}, {}),
    "mdlm over samples": ("dllm_var.objectives.Mdlm", {"mean_over": "samples"}, {}),
    "block diffusion": (BLOCKS, {"block_length": 12}, {}),
    "block diffusion alone": (BLOCKS, {"block_length": 4, "kv_commit": "alone"}, {}),
    "block diffusion causal context": (BLOCKS, {"block_length": 8, **ADAPTED}, {}),
    "block diffusion complementary": (BLOCKS, {"block_length": 8, "complementary": True, "exact_count": True}, {}),
    "autoregressive": ("dllm_var.objectives.Autoregressive", {}, {}),
    "certainty": (EOS, {"t_min": 0.4, "t_max": 1.0, "certainty": 1.8}, {"model": SHIPPED}),
    "block diffusion certainty": (BLOCKS, {"block_length": 12, "certainty": 1.8}, {"model": SHIPPED}),
    "annealing": (None, {}, {"model": {"attention_annealing": 8}}),
    "annealing shifted": (None, {}, {"model": {"attention_annealing": 8, "transformer": {"token_shift": True}}}),
    "recomputed": (None, {}, {"model": {"activation_checkpointing": "full"}}),
    "averaged": (None, {}, {"trainer": {"callbacks": [{"class_path": "dllm_var.callbacks.EmaWeights"}]}}),
    "muon": (None, {}, {"model": {"optimizer": {"class_path": "dllm_var.training.optim.Muon"}}}),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # of rows: records, settings
    "cmudict": ("cmudict", {}),
    "canvas": ("cmudict", {"canvas": 12}),
    "overhang": ("cmudict", {"overhang": 8}),
    "eos_padding": ("cmudict", {"eos_padding": 16}),
    "gsm_symbolic": ("gsm_symbolic", {"context_length": 448, "batch_size": 2}),
    "truncated": ("gsm_symbolic", {"on_too_long": "truncate"}),
}


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
    found |= {f"training {name}": (training, *settings) for name, settings in OBJECTIVES.items()}
    for packing in ("concat", "best_fit"):
        for seed in (0, 1):
            for name, shape in SHAPES.items():
                found[f"rows {packing} {name} seed {seed}"] = (rows, *shape, {"packing": packing, "seed": seed})
        found[f"rows {packing} dropped"] = (
            rows,
            "gsm_symbolic",
            {"context_length": 96, "batch_size": 1},
            {"packing": packing},
        )
    found["rows concat cut"] = (rows, "gsm_symbolic", {"on_too_long": "cut"}, {"packing": "concat"})
    return found


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


def training(folder: Path, objective: str | None, arguments: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Trains ten steps of a tiny model; returns the columns of the logged figures."""
    settings: dict[str, dict[str, Any]] = {
        "model": {
            "seed": 1,
            "objective": objective and {"class_path": objective, "init_args": arguments},
            "transformer": {"hidden_size": 64, "num_layers": 2, "num_heads": 2},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        },
        "data": {
            "seed": 1,
            "source": {
                "class_path": "dllm_var.datamodules.JsonlSource",
                "init_args": {"path": f"{folder}/cmudict.jsonl"},
            },
            "tokenizer": "checkpoints/cmudict",
            "cache_dir": f"{folder}/cache",
            "batch_size": 4,
            "context_length": 128,
        },
        "trainer": {
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": f"{folder}/runs"},
            },
            **dict(accelerator="cpu", max_steps=10, log_every_n_steps=1, val_check_interval=10, gradient_clip_val=1.0),
            **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
            **dict(check_val_every_n_epoch=None, num_sanity_val_steps=0),
        },
    }
    for section, values in other.items():
        settings[section].update(values)
    file = folder / "settings.yaml"
    file.write_text(json.dumps({"seed_everything": 1, **settings}))
    command("fit", "--config", str(file))
    newest = max(folder.glob("runs/**/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open() as lines:
        logged = list(csv.DictReader(lines))
    figures = {name: [float(line[name]) for line in logged if line[name]] for name in logged[0] if "/" in name}
    newest.unlink()
    return figures


def rows(folder: Path, records: str, shape: dict[str, Any], more: dict[str, Any]) -> dict[str, list[str]]:
    """Returns SHA-256 digests, cut to 16 digits, of each tensor of the first 50 training batches."""
    from dllm_var.datamodules import JsonlSource, PackedDataModule

    settings = {"batch_size": 4, "context_length": 128, "cache_dir": f"{folder}/cache", **shape, **more}
    data = PackedDataModule(JsonlSource(f"{folder}/{records}.jsonl"), f"checkpoints/{records}", **settings)
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


def difference(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> str | None:
    """Says where two results of a case differ, and returns None when they differ nowhere."""
    places: dict[str, list[int]] = {}
    largest = 0.0
    for name, old in before.items():
        new = after.get(name, [])
        if len(new) != len(old):
            return f"differs: {len(old)} entries of {name} before, {len(new)} after"
        if differing := [number for number, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]:
            places[name] = differing
        if places.get(name) and isinstance(old[0], float):
            largest = max(largest, *(abs(new[n] - old[n]) / max(abs(old[n]), 1e-30) for n in places[name]))
            if all(math.isclose(old[n], new[n], rel_tol=1e-5) for n in places[name]):
                del places[name]
    if not places:
        return f"same within 1e-5, not bitwise: {largest:.1e} at most" if largest else None
    union = sorted(set().union(*places.values()))
    kind = "prompts" if "nfe" in before else "entries"
    text = f"differs at {kind} {' '.join(map(str, union[:12]))}{' ...' if len(union) > 12 else ''} ({len(union)} of "
    text += f"{len(next(iter(before.values())))}; {', '.join(f'{name} {len(at)}' for name, at in places.items())}"
    return text + (f"; largest {largest:.1e})" if largest else ")")


def forwards(result: dict[str, list[Any]]) -> str:
    """Returns the forwards of a case, and those of a second model."""
    return " + ".join(str(sum(result[name])) for name in ("nfe", "auxiliary_nfe") if any(result[name]))


def main() -> int:
    """Records, or compares; 1 when anything differs."""
    import torch

    import dllm_var

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=lambda path: Path(path).resolve())
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose name contains one of these; record then keeps the others"
    )
    options = parser.parse_args()
    os.chdir(Path(dllm_var.__file__).parent.parent)
    sums = {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("checkpoints").glob("*/*.safetensors")
    }
    made = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), **dict(sorted(sums.items()))}
    compares, kept = options.action == "compare", dict[str, Any](made=made)
    if compares or (any(options.only) and options.file.exists()):
        kept = json.loads(gzip.decompress(options.file.read_bytes()))
    kept["records"] = kept.get("records") or task_records()
    print(
        f"{options.action} with {os.getcwd()}",
        *(f"{k} is another" for k in made if made[k] != kept["made"].get(k)),
        sep="; ",
    )
    results, bad, began = kept.setdefault("results", {}), 0, time.perf_counter()
    known = cases()
    with tempfile.TemporaryDirectory() as name:
        for task, records in kept["records"].items():
            Path(name, f"{task}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        for case in dict.fromkeys([*results, *known]):
            if not any(part in case for part in options.only):
                continue
            started = time.perf_counter()
            try:
                if case not in known:
                    raise LookupError("this version has no such case")
                function, *arguments = known[case]
                found = function(Path(name), *arguments)
            except Exception as error:  # one case that cannot be run, by an older or newer version, is a finding
                found, line = {}, f"failed: {type(error).__name__}: {error}"
                bad += case in results or not compares
            else:
                line = (difference(results[case], found) or "same") if case in results else "recorded"
                line = "not in the record" if compares and case not in results else line
                bad += line.startswith("differs")
                if found.get("nfe"):
                    was = f"{forwards(results[case])} / " if case in results else ""
                    line += f", forwards {was}{forwards(found)}"
            print(f"{case}: {line} ({time.perf_counter() - started:.1f} s)", flush=True)
            if not compares and found:
                results[case] = found
    if not compares:
        options.file.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), 9, mtime=0))
    print(f"{len(results)} cases, {bad} bad, {time.perf_counter() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
