"""Does EOS really lead? Attention x end of a sample x terminator mask rate x terminator_last, measured on CMUdict.

    python benchmarks/eos_ablation.py             # trains what results/eos_ablation.json lacks: 45 minutes on one core
    python benchmarks/eos_ablation.py --report    # only prints the medians over seeds, and draws docs/eos_ablation.png

Every model is the quickstart's (0.87M parameters) trained on the same words with the same number of tokens; only these
settings differ. Each is decoded with and without `terminator_last` on the same 300 validation words.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "eos_ablation.json"
PICTURE = Path(__file__).parents[1] / "docs" / "eos_ablation.png"
SHORT, LONG = 300, 1200  # optimizer steps
BLOCK = 8
ATTENTIONS = ("full", "document")
METRICS = ("token_error_rate", "length_exact", "ended_by_eos", "premature", "overrun", "tokens_per_forward")
ORDERS = {"any_order": False, "terminator_last": True}  # of decoding
IN_WORDS = {  # values of the settings
    "full": "a sample sees the whole row",
    "document": "a sample sees only itself",
    "none": "nothing after the terminator",
    "overhang": "0 to 8 masks after the terminator",
    "canvas": "masks after the terminator, to the block's end",
    "any_order": "most certain token first",
    "terminator_last": "terminator only after all to its left (terminator_last)",
}
WHOSE = {("full", "none"): "the paper:\n", ("document", "canvas"): "the recipes here:\n"}


def settings(seeds: list[int]) -> list[dict[str, Any]]:
    """Returns every training run: a grid and the canvas at the short budget, the two attentions at the long one."""
    # What follows a terminator (nothing, 0 to 8 masks, the sampler's canvas), whether it is always masked, steps.
    ends = [("none", True, SHORT), ("none", False, SHORT), ("overhang", True, SHORT), ("overhang", False, SHORT)]
    ends += [("canvas", True, SHORT), ("overhang", True, LONG)]
    return [
        dict(attention=attention, end=end, mask_terminators=always, steps=steps, seed=seed)
        for (end, always, steps), seed, attention in itertools.product(ends, seeds, ATTENTIONS)
    ]


def run(attention: str, end: str, mask_terminators: bool, steps: int, seed: int) -> dict[str, Any]:
    """Trains one model and decodes the held-out words both ways."""
    import lightning as L

    from dllm_var import DiffusionLM
    from dllm_var.datamodules import PackedDataModule
    from dllm_var.model import TransformerConfig
    from dllm_var.objectives import EosSchedule
    from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold
    from dllm_var.training.optim import Muon, Schedule

    L.seed_everything(seed, verbose=False)
    data = PackedDataModule(
        batch_size=8,
        context_length=128,
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
    result = {"train_seconds": train(model, data, max_steps=steps)["train_seconds"]}
    for order, last in ORDERS.items():
        sampler = BlockDiffusionSampler(
            ConfidenceThreshold(0.9), block_length=BLOCK, max_new_tokens=40, batch_size=100, terminator_last=last
        )
        result[order] = decode(model, data.held_out("validation", 300), sampler, METRICS)
    return result


def train(model: Any, data: Any, **settings: Any) -> dict[str, Any]:
    """Trains a model on the CPU and keeps nothing of the run but the model and these figures."""
    import lightning as L

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", gradient_clip_val=1.0, logger=False, enable_checkpointing=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **settings,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(model, data)
    return {
        "steps": trainer.global_step,
        "train_seconds": round(time.perf_counter() - began, 1),
        "train_loss": round(float(trainer.callback_metrics["train/loss"]), 4),
    }


def decode(model: Any, examples: Sequence[Any], sampler: Any, figures: Sequence[str]) -> dict[str, float]:
    """Decodes held-out prompts; returns these figures of the answers."""
    from dllm_var.metrics import AnswerMetrics

    metrics = AnswerMetrics()
    answers = sampler.generate(model, [example.prompt_ids for example in examples])
    metrics.update(answers, [example.references for example in examples])
    found = metrics.compute()
    return {name: round(found[name], 4) for name in figures}


def report(done: list[dict[str, Any]]) -> str:
    """Returns the medians over seeds of each setting and order of decoding, and the range of the error rate."""
    seeds: dict[str, list[dict[str, Any]]] = {}
    for entry in done:
        compared = {name: value for name, value in entry["settings"].items() if name != "seed"}
        for order in ORDERS:
            seeds.setdefault(f"{compared}, {order}", []).append(entry[order])
    lines = []
    for setting, results in seeds.items():
        errors = [result["token_error_rate"] for result in results]
        medians = {name: round(statistics.median(result[name] for result in results), 3) for name in METRICS}
        lines.append(f"{setting}: {medians}, errors {min(errors):.1%} to {max(errors):.1%}")
    return "\n".join(lines)


def draw(done: list[dict[str, Any]]) -> None:
    """Draws how many answers of the short budget have the right length: medians as dots, ranges over seeds as lines."""
    from matplotlib.figure import Figure

    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in done:
        chosen = entry["settings"]
        if chosen["steps"] == SHORT:
            masked = "" if chosen["mask_terminators"] else ",\nwhich is masked only as often as other tokens"
            whose = "" if masked else WHOSE.get((chosen["attention"], chosen["end"]), "")
            words = f"{whose}{IN_WORDS[chosen['attention']]}; {IN_WORDS[chosen['end']]}{masked}"
            rows.setdefault(words, []).append(entry)
    names = sorted(
        rows, key=lambda name: statistics.median(one["terminator_last"]["length_exact"] for one in rows[name])
    )
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for order, colour, shift in zip(ORDERS, ("tab:gray", "tab:blue"), (-0.12, 0.12), strict=True):
        for place, name in enumerate(names):
            shares = [100 * entry[order]["length_exact"] for entry in rows[name]]
            axes.plot([min(shares), max(shares)], [place + shift] * 2, color=colour, alpha=0.6)
            label = f"decoding: {IN_WORDS[order]}" if place == 0 else None
            axes.plot(statistics.median(shares), place + shift, "o", color=colour, markersize=7, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(xlim=(0, 60), xlabel="answers of exactly the right length, %")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Which training lets a model end its answers? CMUdict, {SHORT} steps each")
    figure.legend(loc="outside lower center", frameon=False, title="dot: median, line: range of three seeds")
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="only print the medians")
    options = parser.parse_args()
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for wanted in [] if options.report else settings(options.seeds):
        if all(entry["settings"] != wanted for entry in done):
            done.append({"settings": wanted, **run(**wanted)})
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
            print(done[-1], flush=True)
    print(report(done))
    draw(done)


if __name__ == "__main__":
    main()
