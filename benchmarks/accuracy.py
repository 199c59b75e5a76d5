"""Error rate against epochs on few words: does diffusion gain where its autoregressive twin overfits?

    python benchmarks/accuracy.py             # trains what results/accuracy.json lacks: hours on one core
    python benchmarks/accuracy.py --report    # only prints the table and draws docs/accuracy.png

Every run is the quickstart's transformer (0.87M parameters) on the same 2,000 words of CMUdict, with a cosine schedule
of its own that ends with its last epoch. Each model is decoded on the same words that training never sees.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from eos_ablation import decode, train
from lightning.pytorch.callbacks import LambdaCallback

from dllm_var import DiffusionLM
from dllm_var.datamodules import CmudictSource, PackedDataModule
from dllm_var.model import TransformerConfig
from dllm_var.objectives import Autoregressive, EosSchedule, IntrospectiveStride
from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler, ConfidenceThreshold, StridedSampler
from dllm_var.training.optim import Muon, Schedule

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
PICTURE = Path(__file__).parents[1] / "docs" / "accuracy.png"
WORDS = 2_000
EPOCHS = (8, 24, 72)
HELD_OUT = {"validation": 500, "test": 2_000}
FIGURES = ("token_error_rate", "length_exact", "tokens_per_forward")
BLOCK = 12
RECIPES = ("autoregressive", "autoregressive, dropout 0.1", "EOS schedule", "EOS schedule, dropout 0.1", "strided")


class FewWords(CmudictSource):
    """CMUdict with an even choice of its training words; held-out words are the same."""

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        words = self._words["train"]
        kept = set(words[:: len(words) // WORDS][:WORDS])
        yield from (record for record in super().records(split) if split != "train" or record["prompt"] in kept)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}-{WORDS}"


def recipe(name: str) -> tuple[Any, Any, int]:
    """Returns the objective of a recipe, the sampler that it is for, and the canvas of the data."""
    if name.startswith("EOS schedule"):
        blocks = BlockDiffusionSampler(ConfidenceThreshold(0.9), block_length=BLOCK, max_new_tokens=48, batch_size=128)
        return EosSchedule(0.1, 1.0, rate_per="segment"), blocks, BLOCK
    if name == "strided":
        return IntrospectiveStride(8, share=0.5), StridedSampler(8, max_new_tokens=48, batch_size=128), 0
    return Autoregressive(), AutoregressiveSampler(max_new_tokens=48, batch_size=128), 0


def dropout(share: float) -> L.Callback:
    """Returns a callback that drops this share of what attention and feed-forward layers add."""

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, module.training)

    def attach(trainer: L.Trainer, model: L.LightningModule) -> None:
        for layer in model.transformer.layers:
            layer.self_attn.register_forward_hook(drop)
            layer.mlp.register_forward_hook(drop)

    return LambdaCallback(on_fit_start=attach)


def run(name: str, epochs: int, seed: int) -> dict[str, Any]:
    """Trains one model and decodes the held-out words."""
    objective, sampler, canvas = recipe(name)
    L.seed_everything(seed, verbose=False)
    data = PackedDataModule(
        FewWords(), batch_size=16, context_length=128, packing="best_fit", canvas=canvas, seed=seed, num_workers=0
    )
    model = DiffusionLM(
        transformer=TransformerConfig(hidden_size=128, num_layers=4, num_heads=4, initializer_range=0.01),
        objective=objective,
        attention="document",
        optimizer=lambda parameters: Muon(parameters, lr=0.015, adamw_lr=6e-3, weight_decay=0.1),
        schedule=Schedule("cosine", warmup_steps=50),
        seed=seed,
    )
    callbacks = [dropout(0.1)] if "dropout" in name else []
    result = train(model, data, max_epochs=epochs, callbacks=callbacks)
    for split, count in HELD_OUT.items():
        result[split] = decode(model, data.held_out(split, count), sampler, FIGURES)
    return result


def results() -> list[dict[str, Any]]:
    """Returns the runs that are done."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def table(done: list[dict[str, Any]]) -> str:
    """Returns the medians over seeds as a table: error rates on the test words, and which length validation chooses."""
    lines = [
        "| recipe | " + " | ".join(f"{epochs} epochs" for epochs in EPOCHS) + " | stopped early | range over seeds |",
        "|---|" + "--:|" * (len(EPOCHS) + 2),
    ]
    for name in RECIPES:
        runs = [entry for entry in done if entry["recipe"] == name]
        cells = []
        for epochs in EPOCHS:
            errors = [entry["test"]["token_error_rate"] for entry in runs if entry["epochs"] == epochs]
            cells.append(f"{statistics.median(errors):.1%}" if errors else "")
        chosen = []
        for seed in sorted({entry["seed"] for entry in runs}):
            own = [entry for entry in runs if entry["seed"] == seed]
            chosen.append(min(own, key=lambda entry: entry["validation"]["token_error_rate"]))
        errors = [entry["test"]["token_error_rate"] for entry in chosen]
        if errors:
            cells += [f"{statistics.median(errors):.1%}", f"{min(errors):.1%} to {max(errors):.1%} ({len(errors)})"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(done: list[dict[str, Any]]) -> None:
    """Draws the error rates against epochs, one line for each recipe and one point for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, name in zip(("C0", "C9", "C1", "C3", "C2"), RECIPES, strict=True):
        runs = [entry for entry in done if entry["recipe"] == name]
        if not runs:
            continue
        lengths = sorted({entry["epochs"] for entry in runs})
        errors = [[100 * run["test"]["token_error_rate"] for run in runs if run["epochs"] == some] for some in lengths]
        axes.plot(
            lengths,
            [statistics.median(values) for values in errors],
            color=colour,
            label=name.replace("EOS schedule", "diffusion"),
        )
        for length, values in zip(lengths, errors, strict=True):
            axes.plot([length] * len(values), values, "o", color=colour, markersize=4)
    axes.set(xscale="log", xlabel="epochs over 2,000 words", ylabel="phoneme error rate on 2,000 unseen words, %")
    axes.set_title("Few words, many epochs: diffusion and its autoregressive twin", fontsize=11)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_yticks(range(20, 38, 4))
    axes.grid(alpha=0.25, axis="y")
    axes.set_xticks(EPOCHS, [str(epochs) for epochs in EPOCHS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--report", action="store_true", help="only print the table and draw the picture")
    options = parser.parse_args()
    for seed, name, epochs in [] if options.report else itertools.product(options.seeds, options.recipes, EPOCHS):
        wanted = {"recipe": name, "epochs": epochs, "seed": seed}
        if all(entry | wanted != entry for entry in results()):
            entry = wanted | run(name, epochs, seed)
            RESULTS.write_text(json.dumps([*results(), entry], indent=1) + "\n")  # others may have added theirs
            print(entry, flush=True)
    print(table(results()))
    draw(results())


if __name__ == "__main__":
    main()
