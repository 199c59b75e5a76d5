"""Does EOS really lead? Attention x overhang x terminator_last x terminator mask rate, measured on CMUdict.

    python benchmarks/eos_ablation.py             # trains what results/eos_ablation.json lacks: 45 minutes on one core
    python benchmarks/eos_ablation.py --report    # table (docs/eos_ablation.md) and plot from the results

Every model is the quickstart's (0.87M parameters) trained on the same words with the same number of tokens; only the
row below differs. Each is decoded with and without `terminator_last` on the same 300 validation words.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from dllm_var.files import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "eos_ablation.json"
DOCS = HERE.parent / "docs"
SHORT, LONG = 300, 1200  # optimizer steps
ROWS, CONTEXT = 8, 128
ATTENTIONS = ("document", "full")
ENDS = {"none": "nothing", "overhang": "0 to 8 masks", "canvas": "the sampler's canvas"}  # what follows a terminator
WORDS, BLOCK = 300, 8
METRICS = ("token_error_rate", "length_exact", "ended_by_eos", "premature", "overrun", "tokens_per_forward")


def settings(seeds: list[int]) -> list[dict]:
    """Every training run: the full grid and the canvas at the short budget, the two attentions at the long one."""
    grid = [
        dict(attention=attention, end=end, mask_terminators=always, steps=SHORT, seed=seed)
        for seed, attention, end, always in itertools.product(seeds, ATTENTIONS, ("none", "overhang"), (True, False))
    ]
    canvas = [
        dict(attention=attention, end="canvas", mask_terminators=True, steps=SHORT, seed=seed)
        for seed, attention in itertools.product(seeds, ATTENTIONS)
    ]
    longer = [
        dict(attention=attention, end="overhang", mask_terminators=True, steps=LONG, seed=seed)
        for seed, attention in itertools.product(seeds, ATTENTIONS)
    ]
    return grid + canvas + longer


def run(attention: str, end: str, mask_terminators: bool, steps: int, seed: int) -> dict:
    """Trains one model and decodes the held-out words both ways."""
    import lightning as L

    from dllm_var import DiffusionLM
    from dllm_var.datamodules import PackedDataModule
    from dllm_var.metrics import AnswerMetrics
    from dllm_var.model import TransformerConfig
    from dllm_var.objectives import EosSchedule
    from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold
    from dllm_var.training.optim import Muon, Schedule

    L.seed_everything(seed, verbose=False)
    data = PackedDataModule(
        batch_size=ROWS,
        context_length=CONTEXT,
        packing="best_fit",
        overhang=BLOCK if end == "overhang" else 0,
        canvas=BLOCK if end == "canvas" else 0,
        seed=seed,
    )
    model = DiffusionLM(
        transformer=TransformerConfig(hidden_size=128, num_layers=4, num_heads=4),
        objective=EosSchedule(0.1, 0.9, rate_per="segment", mask_terminators=mask_terminators),
        attention=attention,
        optimizer=Muon,
        schedule=Schedule(warmup_steps=50),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(model, data)
        seconds = time.perf_counter() - began
    examples = data.held_out("validation", WORDS)
    result: dict = {"train_seconds": round(seconds, 1)}
    for last in (False, True):
        sampler = BlockDiffusionSampler(
            ConfidenceThreshold(0.9), block_length=BLOCK, max_new_tokens=40, batch_size=100, terminator_last=last
        )
        metrics = AnswerMetrics()
        answers = sampler.generate(model, [example.prompt_ids for example in examples])
        metrics.update(answers, [example.references for example in examples])
        scores = metrics.compute()
        result["terminator_last" if last else "any_order"] = {name: round(scores[name], 4) for name in METRICS}
    return result


def train_missing(seeds: list[int], threads: int) -> None:
    """Runs what RESULTS lacks, saving after each."""
    import torch

    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    done = load()
    for wanted in settings(seeds):
        if any(entry["settings"] == wanted for entry in done):
            continue
        result = run(**wanted)
        done.append({"settings": wanted, **result})
        write_text(RESULTS, json.dumps(done, indent=1) + "\n")
        print(wanted, result, flush=True)


def load() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def summarise(done: list[dict]) -> list[dict]:
    """One line per setting and decoding order: medians and ranges over seeds."""
    lines = []
    keys = ("steps", "attention", "end", "mask_terminators")
    groups: dict[tuple, list[dict]] = {}
    for entry in done:
        groups.setdefault(tuple(entry["settings"][key] for key in keys), []).append(entry)
    for group, entries in sorted(groups.items(), key=lambda item: _place(*item[0])):
        for order in ("any_order", "terminator_last"):
            line = {**dict(zip(keys, group, strict=True)), "terminator_last": order == "terminator_last"}
            line["seeds"] = len(entries)
            for name in METRICS:
                values = [entry[order][name] for entry in entries]
                line[name] = statistics.median(values)
                line[f"{name}_range"] = (min(values), max(values))
            lines.append(line)
    return lines


def _place(steps: int, attention: str, end: str, always: bool) -> tuple:
    """Where a setting stands in the table."""
    return steps, attention != "full", list(ENDS).index(end), not always


def table(lines: list[dict]) -> str:
    rows = [
        "| steps | attention | after the terminator | terminator masked | terminator_last | PER (range over seeds) "
        "| length exact | ended by EOS | ended early | ended late | tokens/forward |",
        "|--:|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        low, high = line["token_error_rate_range"]
        rows.append(
            f"| {line['steps']} | {line['attention']} | {ENDS[line['end']]} "
            f"| {'always' if line['mask_terminators'] else 'with t'} | {'yes' if line['terminator_last'] else 'no'} "
            f"| {line['token_error_rate']:.1%} ({low:.1%} to {high:.1%}) | {line['length_exact']:.1%} "
            f"| {line['ended_by_eos']:.1%} | {line['premature']:.1%} | {line['overrun']:.1%} "
            f"| {line['tokens_per_forward']:.2f} |"
        )
    return "\n".join(rows)


def plot(lines: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def label(line: dict) -> str:
        return (
            f"{line['attention']}, {ENDS[line['end']]} after"
            f"{'' if line['mask_terminators'] else ', masked with t'}"
            f"{f', {LONG} steps' if line['steps'] == LONG else ''}"
        )

    names = list(dict.fromkeys(label(line) for line in lines))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.42 * len(names) + 1.4), sharey=True)
    panels = (("token_error_rate", "phoneme error rate"), ("length_exact", "share of answers of the right length"))
    for axis, (metric, title) in zip(axes, panels, strict=True):
        for last, colour, shift in ((False, "#c44e52", -0.18), (True, "#4c72b0", 0.18)):
            chosen = [line for line in lines if line["terminator_last"] == last]
            places = [names.index(label(line)) + shift for line in chosen]
            values = [line[metric] for line in chosen]
            spread = [[line[metric] - line[f"{metric}_range"][0] for line in chosen],
                      [line[f"{metric}_range"][1] - line[metric] for line in chosen]]  # fmt: skip
            axis.barh(places, values, 0.34, xerr=spread, color=colour, label=f"terminator_last: {str(last).lower()}",
                      error_kw={"elinewidth": 1})  # fmt: skip
        axis.set_xlabel(title)
        axis.set_xlim(0, 1.5 if metric == "token_error_rate" else 1)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(loc="upper right")
    figure.suptitle(
        "Which setting lets the model end its own answers (median and range of the seeds; longer bars are cut)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the table and the plot")
    arguments = parser.parse_args()
    if not arguments.report:
        train_missing(arguments.seeds, arguments.threads)
    lines = summarise(load())
    if not lines:
        raise SystemExit(f"no results in {RESULTS}: run without --report first")
    print(table(lines))
    (DOCS / "eos_ablation.md").write_text(table(lines) + "\n")
    plot(lines, DOCS / "eos_ablation.png")


if __name__ == "__main__":
    main()
