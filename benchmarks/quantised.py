"""Weights of 8 and 4 bits: likelihood, answers, memory and speed of checkpoints, each beside its plain weights.

    python benchmarks/quantised.py --checkpoint checkpoints/cmudict:cmudict

A checkpoint is followed by the task whose documents it answers, or by a file of them, one {"prompt": ..., "response":
...} a line. Likelihoods are those of `evaluate`, block by block as
the checkpoint's sampler decodes; of a checkpoint without a sampler, which reads from left to right, they are exact. The
kinds take turns in decoding, and the fastest of the rounds counts; its time is that of the processor, so that others on
the machine do not matter much.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dllm_var.checkpoints.checkpoint import Checkpoint
from dllm_var.checkpoints.pretrained import load_checkpoint, open_checkpoint
from dllm_var.evaluation import TASKS
from dllm_var.evaluation.calibration import RECORDS, calibrated
from dllm_var.evaluation.likelihood import Likelihood
from dllm_var.sampling import AutoregressiveSampler, Sampler
from dllm_var.sampling.base import sampler_from_config

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "quantize": "int8"},
    "int4": {"dtype": torch.float32, "quantize": "int4"},
}


def measure(path: str, task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the figures of each kind of weights."""
    checkpoint = open_checkpoint(path)
    documents = Path(task) if task.endswith(".jsonl") else TASKS / f"{task}.jsonl"
    lines = documents.read_text(encoding="utf-8").splitlines()
    sampler = sampler_of(checkpoint)
    length = 0 if isinstance(sampler, AutoregressiveSampler) else int(getattr(sampler, "block_length", 0))
    likelihood = Likelihood(draws=options.draws, block_length=length, canvas=length)
    models = {kind: load_checkpoint(checkpoint, **how)[:2] for kind, how in KINDS.items()}
    tokenizer = models["float32"][1]

    def pairs_of(lines: list[str]) -> list[tuple[list[int], list[int]]]:
        given = [json.loads(line) for line in lines]
        responses = [one["response"] if "response" in one else one["responses"][0] for one in given]
        ends = [[*tokenizer.encode(response), tokenizer.terminator_id] for response in responses]
        return list(zip((tokenizer.encode(one["prompt"]) for one in given), ends, strict=True))

    known = calibrated(checkpoint, pairs_of(lines[-options.records :]), replace(likelihood, draws=4), "int4")
    models["int4, calibrated"] = load_checkpoint(known)[:2]
    pairs = pairs_of(lines[: max(options.scored, options.answered)])
    results = {kind: {"checkpoint": path, "weights": kind} for kind in models}
    answers: dict[str, list[list[int]]] = {}
    tokens = sum(len(answer) for _, answer in pairs[: options.scored])
    for kind, (model, _) in models.items():
        scores = likelihood(model, pairs[: options.scored], decode=False)
        results[kind]["nats_per_token"] = -sum(score.log_likelihood for score in scores) / tokens
        results[kind]["megabytes"] = sum(parameter.nbytes for parameter in set(model.parameters())) / 1e6
        results[kind]["layers_megabytes"] = sum(parameter.nbytes for parameter in model.layers.parameters()) / 1e6
    for _ in range(options.rounds):
        for kind, (model, _) in models.items():
            began = time.process_time()
            found = sampler.generate(model, [prompt for prompt, _ in pairs[: options.answered]])
            rate = sum(len(answer.tokens) for answer in found) / (time.process_time() - began)
            results[kind]["tokens_per_second"] = max(rate, results[kind].get("tokens_per_second", 0.0))
            answers[kind] = [answer.tokens for answer in found]
    for kind, found in answers.items():
        same = [ours == plain for ours, plain in zip(found, answers["float32"], strict=True)]
        results[kind]["same_answers"] = sum(same) / len(same)
    return list(results.values())


def sampler_of(checkpoint: Checkpoint) -> Sampler:
    described = checkpoint.meta.get("sampler")
    return AutoregressiveSampler(max_new_tokens=32) if described is None else sampler_from_config(described)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, metavar="PATH:TASK", help="repeatable")
    parser.add_argument("--scored", type=int, default=200, help="documents whose likelihood is measured")
    parser.add_argument("--answered", type=int, default=64, help="documents that are answered")
    parser.add_argument("--draws", type=int, default=16, help="draws of each block's likelihood")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of decoding")
    parser.add_argument("--records", type=int, default=RECORDS, help="documents, of the last ones, that calibrate")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    results = []
    print("| checkpoint | weights | nats/token | same answers | MB (layers) | tokens/s |\n|---|---|---|---|---|---|")
    for given in options.checkpoint:
        path, _, task = given.rpartition(":")
        found = measure(path, task, options)
        for one in found:
            print(
                f"| {Path(path).name} | {one['weights']} | {one['nats_per_token']:.4f} | {one['same_answers']:.1%} | "
                f"{one['megabytes']:.1f} ({one['layers_megabytes']:.1f}) | {one['tokens_per_second']:,.0f} |",
                flush=True,
            )
        results += found
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
