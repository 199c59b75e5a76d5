"""Step time against context length and depth: how well do two measured rates predict it?

    python benchmarks/scaling.py          # some minutes
    python benchmarks/scaling.py --quick  # seconds

A step's FLOPs are those of matrix products and those of attention, which reach different rates. Both rates are fitted
to two of the points; the others are predictions.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from dllm_var.benchmarking.cost_model import Shape
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.objectives.cross_entropy import summed_cross_entropy
from dllm_var.training.optim import AdamW, parameter_groups

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
DEPTHS = (2, 4, 8, 16)
FITTED = ("context 512", "context 4096")  # so --tokens is at least 4096
VOCABULARY = 256


@dataclass
class Point:
    """One measured setting; FLOPs are those of a step, seconds are a median."""

    name: str
    layers: int
    rows: int
    context: int
    matrix_flops: float
    attention_flops: float
    seconds: float = 0.0
    predicted: float = 0.0


def measure(name: str, layers: int, context: int, hidden: int, tokens: int, repeats: int) -> Point:
    """Trains a few steps on random tokens, the same number in each step whatever the context."""
    config = TransformerConfig(hidden_size=hidden, num_layers=layers, num_heads=2, vocab_size=VOCABULARY)
    weights = layers * Shape(config).block_matrices + VOCABULARY * hidden
    point = Point(
        name, layers, tokens // context, context, 6.0 * tokens * weights, 12.0 * layers * tokens * context * hidden
    )
    model = Transformer(config)
    optimizer = AdamW(parameter_groups(model))
    batch = torch.randint(0, VOCABULARY, (point.rows, context))
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        hidden_states = model.hidden_states(batch).flatten(0, 1)
        summed_cross_entropy(model.lm_head, hidden_states, batch.flatten()).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    point.seconds = median(seconds[1:])
    return point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step; contexts up to that are measured")
    parser.add_argument("--repeats", type=int, default=3, help="steps timed, after one to warm up")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    hidden, tokens, repeats = (32, 4096, 1) if options.quick else (256, options.tokens, options.repeats)
    varied = [(f"context {c}", 4, c) for c in CONTEXTS if c <= tokens] + [(f"depth {d}", d, 512) for d in DEPTHS]
    points = [measure(*one, hidden, tokens, repeats) for one in varied]
    fitted = [point for point in points if point.name in FITTED]
    flops = np.array([[point.matrix_flops, point.attention_flops] for point in fitted])
    rates = 1 / np.linalg.solve(flops, np.array([point.seconds for point in fitted]))
    print(f"{tokens} tokens a step, width {hidden}, {torch.get_num_threads()} threads")
    print(f"fitted: {rates[0] / 1e9:.0f} GFLOP/s in matrix products, {rates[1] / 1e9:.0f} in attention")
    for point in points:
        point.predicted = point.matrix_flops / rates[0] + point.attention_flops / rates[1]
        error = "fitted" if point in fitted else f"{point.predicted / point.seconds - 1:+.0%}"
        share = point.attention_flops / (point.attention_flops + point.matrix_flops)
        print(
            f"{point.name:13} {point.seconds:7.2f} s, predicted {point.predicted:7.2f} ({error}), {share:.0%} attention"
        )
    if options.output:
        result = {"rates": rates.tolist(), "points": [asdict(point) for point in points]}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
