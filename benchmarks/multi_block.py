"""Does it pay to vary the block length, or to decode several blocks at a time? Tokens per forward, error and work.

    python benchmarks/multi_block.py                      # checkpoints/cmudict: a minute on an idle core
    python benchmarks/multi_block.py --task gsm_symbolic  # checkpoints/gsm_symbolic: seven, with reasoning-gym

Prints the tables of docs/multi_block.md. `computed` is the work: positions that a row's forwards computed, its prompt
included, over its useful tokens. `tokens/s` is of rows decoded one at a time: the median of three rounds in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dllm_var.benchmarking import FinalNumberScorer, TokenErrorScorer
from dllm_var.benchmarking.scorers import Scorer
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import CmudictSource, GsmSymbolicSource, Source
from dllm_var.datamodules.packed import PackedDataModule
from dllm_var.metrics import AnswerMetrics
from dllm_var.model import Transformer
from dllm_var.sampling import (
    BlockDiffusionSampler,
    ConfidenceThreshold,
    ConstantSteps,
    DelimiterLength,
    MultiBlockSampler,
)
from dllm_var.sampling.block_run import BlockRun


@dataclass
class Task:
    """A held-out set and what is tried on it.

    Args:
        source: Where the prompts come from.
        scorer: What is counted as right.
        prompts: How many.
        single: How many of them are timed one at a time.
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
    single: int
    limit: int
    block: int
    parts: list[tuple[int, int]]
    pace: list[tuple[int, int, int]]
    delimiters: list[str]
    thresholds: tuple[float, ...]


def task(name: str) -> Task:
    """Returns a task by its name."""
    if name == "cmudict":
        return Task(
            CmudictSource(), TokenErrorScorer(), 300, 60, 48, 12, [(2, 12), (2, 6)], [(2, 2, 12)], [], (0.9, 0.6)
        )
    parts, delimiters = [(2, 8), (2, 4), (3, 8)], ["Ċ", "."]
    return Task(GsmSymbolicSource(), FinalNumberScorer(), 100, 5, 320, 8, parts, [(2, 2, 8)], delimiters, (0.9, 0.7))


def samplers(task: Task, threshold: float, ids: list[int]) -> dict[str, BlockDiffusionSampler]:
    """Returns what is compared, by name."""
    policy = ConfidenceThreshold(threshold)
    every: dict[str, Any] = dict(policy=policy, max_new_tokens=task.limit, batch_size=64)
    lengths = sorted({task.block, *(length for _, length in task.parts)}, reverse=True)
    found = {f"blocks of {n}": BlockDiffusionSampler(block_length=n, **every) for n in lengths}
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
        found[f"{blocks} blocks of {length} at a time"] = MultiBlockSampler(
            blocks=blocks, open_at=0.5, block_length=length, **every
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


def tokens_per_second(
    samplers: Iterable[BlockDiffusionSampler], model: Transformer, prompts: list[list[int]]
) -> list[float]:
    """Returns each sampler's useful tokens per second at batch 1: the median of three rounds, run in turn."""
    rounds = []
    for _ in range(3):
        rates = []
        for sampler in samplers:
            sampler.batch_size = 1
            began = time.perf_counter()
            answers = sampler.generate(model, prompts)
            rates.append(sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - began))
        rounds.append(rates)
    return [statistics.median(rates) for rates in zip(*rounds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=["cmudict", "gsm_symbolic"], default="cmudict")
    parser.add_argument("--checkpoint", help="checkpoints/TASK when left out")
    parser.add_argument("--prompts", type=int, help="held-out prompts; 300 of cmudict, 100 of gsm_symbolic")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = task(given.task)
    model, tokenizer, _ = load_checkpoint(given.checkpoint or f"checkpoints/{given.task}")
    examples = PackedDataModule(chosen.source, context_length=448).held_out(
        "validation", given.prompts or chosen.prompts
    )
    ids = [i for i in range(model.config.vocab_size or 0) if tokenizer.id_to_token(i) in chosen.delimiters]
    prompts = [example.prompt_ids for example in examples]
    work = Work()
    print("| threshold | sampler | tokens/forward | token error | wrong | computed | tokens/s |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for threshold in chosen.thresholds:
        compared, lines = samplers(chosen, threshold, ids), []
        for name, sampler in compared.items():
            before = work.positions
            answers = sampler.generate(model, prompts)
            metrics = AnswerMetrics()
            metrics.update(answers, [example.references for example in examples])
            scores = metrics.compute()
            right = chosen.scorer.score(answers, examples, tokenizer)
            wrong = 1 - right["exact_match" if given.task == "cmudict" else "accuracy"]
            computed = (work.positions - before) / scores["tokens"]
            figures = (
                f"{scores['tokens_per_forward']:.2f} | {scores['token_error_rate']:.1%} | {wrong:.1%} | {computed:.1f}"
            )
            lines.append(f"| {threshold} | {name} | {figures} |")
        rates = tokens_per_second(compared.values(), model, prompts[: chosen.single])
        print("\n".join(f"{line} {rate:.0f} |" for line, rate in zip(lines, rates, strict=True)), flush=True)


if __name__ == "__main__":
    main()
