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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.objectives.cross_entropy import summed_cross_entropy
from dllm_var.training.optim import AdamW, parameter_groups

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
DEPTHS = (2, 4, 8, 16)
FITTED = ("context 512", "context 4096")  # so --tokens is at least 4096
VOCABULARY = 256


def measure(layers: int, context: int, hidden: int, tokens: int, repeats: int) -> tuple[float, float, float]:
    """Trains a few steps on random tokens, the same number in each step whatever the context.

    Returns:
        FLOPs of a step in matrix products and in attention, and its median seconds.
    """
    config = TransformerConfig(hidden_size=hidden, num_layers=layers, num_heads=2, vocab_size=VOCABULARY)
    model = Transformer(config)
    optimizer = AdamW(parameter_groups(model))
    batch = torch.randint(0, VOCABULARY, (tokens // context, context))
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        hidden_states = model.hidden_states(batch).flatten(0, 1)
        summed_cross_entropy(model.lm_head, hidden_states, batch.flatten()).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    in_matrices = tokens * model.flops_per_token(0)
    return in_matrices, tokens * model.flops_per_token(context) - in_matrices, median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step; contexts up to that are measured")
    parser.add_argument("--repeats", type=int, default=3, help="steps timed, after one to warm up")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    hidden, tokens, repeats = (32, 4096, 1) if options.quick else (256, options.tokens, options.repeats)
    varied = {f"context {c}": (4, c) for c in CONTEXTS if c <= tokens} | {f"depth {d}": (d, 512) for d in DEPTHS}
    points = {name: measure(*one, hidden, tokens, repeats) for name, one in varied.items()}
    fitted = np.array([points[name] for name in FITTED])
    rates = 1 / np.linalg.solve(fitted[:, :2], fitted[:, 2])
    print(f"{tokens} tokens a step, width {hidden}, {torch.get_num_threads()} threads")
    print(f"fitted: {rates[0] / 1e9:.0f} GFLOP/s in matrix products, {rates[1] / 1e9:.0f} in attention")
    result: dict[str, Any] = {"rates": rates.tolist(), "points": []}
    for name, (matrix_flops, attention_flops, seconds) in points.items():
        predicted = matrix_flops / rates[0] + attention_flops / rates[1]
        error = "fitted" if name in FITTED else f"{predicted / seconds - 1:+.0%}"
        share = attention_flops / (attention_flops + matrix_flops)
        print(f"{name:13} {seconds:7.2f} s, predicted {predicted:7.2f} ({error}), {share:.0%} attention")
        result["points"].append({"name": name, "seconds": seconds, "predicted": predicted, "attention": share})
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
