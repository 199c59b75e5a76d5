"""Does it pay to vary the block length, or to decode several blocks at a time? Tokens per forward, error and work.

    python benchmarks/multi_block.py                      # checkpoints/cmudict: a minute on one core
    python benchmarks/multi_block.py --task gsm_symbolic  # checkpoints/gsm_symbolic: needs reasoning-gym, five minutes

Prints the tables of docs/multi_block.md. `computed` is the work: positions that a row's forwards computed, its prompt
included, over its useful tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dllm_var.benchmarking import FinalNumberScorer, TokenErrorScorer
from dllm_var.benchmarking.scorers import Scorer
from dllm_var.datamodules import CmudictSource, GsmSymbolicSource, Source
from dllm_var.datamodules.packed import PackedDataModule
from dllm_var.metrics import AnswerMetrics
from dllm_var.model.checkpoints import load_checkpoint
from dllm_var.sampling import (
    BlockDiffusionSampler,
    ConfidenceThreshold,
    ConstantSteps,
    DelimiterLength,
    MultiBlockSampler,
    Sampler,
)
from dllm_var.sampling.block_run import BlockRun


@dataclass
class Task:
    """A held-out set and what is tried on it.

    Args:
        source: Where the prompts come from.
        scorer: What is counted as right.
        prompts: How many.
        limit: Longest answer, in tokens.
        block: The block length that the checkpoint was trained for.
        parts: Multi-block settings: (blocks, block length).
        pace: Adaptive settings: (steps, narrowest, widest).
        delimiters: Token texts at which blocks may end.
        thresholds: Confidence thresholds.
    """

    source: Source
    scorer: Scorer
    prompts: int
    limit: int
    block: int
    parts: list[tuple[int, int]]
    pace: list[tuple[int, int, int]]
    delimiters: list[str]
    thresholds: tuple[float, ...]


def task(name: str) -> Task:
    """Returns a task by its name."""
    if name == "cmudict":
        pairs, pace = [(2, 12), (2, 6), (3, 4)], [(2, 2, 12)]
        return Task(CmudictSource(), TokenErrorScorer(), 300, 48, 12, pairs, pace, [], (0.9, 0.6))
    pairs, pace = [(2, 32), (2, 16), (4, 8)], [(8, 8, 32)]
    return Task(GsmSymbolicSource(), FinalNumberScorer(), 60, 320, 32, pairs, pace, ["Ċ", "."], (0.9,))


def samplers(task: Task, threshold: float, ids: list[int]) -> dict[str, Sampler]:
    """Returns what is compared, by name."""
    policy = ConfidenceThreshold(threshold)
    every: dict[str, Any] = dict(policy=policy, max_new_tokens=task.limit, batch_size=64)
    lengths = sorted({task.block, *(length for _, length in task.parts)}, reverse=True)
    found: dict[str, Sampler] = {f"blocks of {n}": BlockDiffusionSampler(block_length=n, **every) for n in lengths}
    for steps, narrowest, widest in task.pace:
        adaptive = ConstantSteps(steps, narrowest)
        found[f"as wide as {steps} steps fill, {narrowest} to {widest}"] = BlockDiffusionSampler(
            block_length=widest, block_length_policy=adaptive, **every
        )
    if ids:
        found[f"up to a delimiter, at most {task.block}"] = BlockDiffusionSampler(
            block_length=task.block, block_length_policy=DelimiterLength(ids), **every
        )
    for blocks, length in task.parts:
        for open_at in (0.1, 0.5):
            found[f"{blocks} blocks of {length} open, the next at {open_at}"] = MultiBlockSampler(
                blocks=blocks, open_at=open_at, block_length=length, **every
            )
    return found


class Work:
    """Counts the positions that forwards compute for rows, padding left out."""

    def __init__(self) -> None:
        self.positions = 0
        original = BlockRun._open_window

        def counted(
            run: BlockRun, rows: Any, index: Any, slots: Any, pending: np.ndarray, width: np.ndarray
        ) -> torch.Tensor:
            self.positions += int((pending + width).sum())
            return original(run, rows, index, slots, pending, width)

        BlockRun._open_window = counted  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=["cmudict", "gsm_symbolic"], default="cmudict")
    parser.add_argument("--checkpoint", help="checkpoints/TASK when left out")
    parser.add_argument("--prompts", type=int, help="held-out prompts; 300 of cmudict, 60 of gsm_symbolic")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = task(given.task)
    model, tokenizer, _ = load_checkpoint(given.checkpoint or f"checkpoints/{given.task}")
    examples = PackedDataModule(chosen.source, context_length=448).held_out(
        "validation", given.prompts or chosen.prompts
    )
    ids = [i for i in range(model.config.vocab_size or 0) if tokenizer.id_to_token(i) in chosen.delimiters]
    work = Work()
    print("| threshold | sampler | tokens/forward | token error | wrong | computed |\n|--:|---|--:|--:|--:|--:|")
    for threshold in chosen.thresholds:
        for name, sampler in samplers(chosen, threshold, ids).items():
            before = work.positions
            answers = sampler.generate(model, [example.prompt_ids for example in examples])
            metrics = AnswerMetrics()
            metrics.update(answers, [example.references for example in examples])
            scores = metrics.compute()
            right = chosen.scorer.score(answers, examples, tokenizer)
            wrong = 1 - right["exact_match" if given.task == "cmudict" else "accuracy"]
            figures = [f"{scores['tokens_per_forward']:.2f}", f"{scores['token_error_rate']:.1%}", f"{wrong:.1%}"]
            figures.append(f"{(work.positions - before) / scores['tokens']:.1f}")
            print(f"| {threshold} | {name} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
