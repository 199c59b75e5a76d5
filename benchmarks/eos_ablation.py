"""Does EOS really lead? Attention x end of a sample x terminator mask rate x terminator_last, measured on CMUdict.

    python benchmarks/eos_ablation.py             # trains what results/eos_ablation.json lacks: 45 minutes on one core
    python benchmarks/eos_ablation.py --report    # only prints the table of docs/eos.md

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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "eos_ablation.json"
SHORT, LONG = 300, 1200  # optimizer steps
BLOCK = 8
ATTENTIONS = ("full", "document")
ENDS = {"none": "nothing", "overhang": "0 to 8 masks", "canvas": "the sampler's canvas"}  # what follows a terminator
METRICS = ("token_error_rate", "length_exact", "ended_by_eos", "premature", "overrun", "tokens_per_forward")
HEADER = (
    "steps", "attention", "after the terminator", "terminator masked", "terminator_last", "PER (range over seeds)",
    "length exact", "ended by EOS", "ended early", "ended late", "tokens/forward",
)  # fmt: skip


def settings(seeds: list[int]) -> list[dict[str, Any]]:
    """Returns every training run: a grid and the canvas at the short budget, the two attentions at the long one."""
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
    from dllm_var.metrics import AnswerMetrics
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
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(model, data)
        result: dict[str, Any] = {"train_seconds": round(time.perf_counter() - began, 1)}
    examples = data.held_out("validation", 300)
    for order, last in (("any_order", False), ("terminator_last", True)):
        sampler = BlockDiffusionSampler(
            ConfidenceThreshold(0.9), block_length=BLOCK, max_new_tokens=40, batch_size=100, terminator_last=last
        )
        metrics = AnswerMetrics()
        answers = sampler.generate(model, [example.prompt_ids for example in examples])
        metrics.update(answers, [example.references for example in examples])
        result[order] = {name: round(metrics.compute()[name], 4) for name in METRICS}
    return result


def table(done: list[dict[str, Any]]) -> str:
    """Returns one line per setting and decoding order: medians over seeds, and the range of the error rate."""
    keys = ("steps", "attention", "end", "mask_terminators")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in done:
        groups.setdefault(tuple(entry["settings"][key] for key in keys), []).append(entry)

    def place(group: tuple[Any, ...]) -> tuple[Any, ...]:
        steps, attention, end, always = group
        return steps, ATTENTIONS.index(attention), list(ENDS).index(end), not always

    rows = [f"| {' | '.join(HEADER)} |", "|--:|---|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for group in sorted(groups, key=place):
        steps, attention, end, always = group
        for order, last in (("any_order", "no"), ("terminator_last", "yes")):
            figures = {name: [entry[order][name] for entry in groups[group]] for name in METRICS}
            error, *shares, speed = (statistics.median(values) for values in figures.values())
            errors = figures["token_error_rate"]
            cells = [str(steps), attention, ENDS[end], "always" if always else "with t", last]
            cells += [f"{error:.1%} ({min(errors):.1%} to {max(errors):.1%})", *(f"{share:.1%}" for share in shares)]
            rows.append(f"| {' | '.join([*cells, f'{speed:.2f}'])} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="only print the table")
    options = parser.parse_args()
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for wanted in [] if options.report else settings(options.seeds):
        if all(entry["settings"] != wanted for entry in done):
            done.append({"settings": wanted, **run(**wanted)})
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
            print(done[-1], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
