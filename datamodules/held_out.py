"""Held-out prompts with their answers, for whoever decodes; does without Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dllm_var.datamodules.table import Table
from dllm_var.text.tokenizer import Tokenizer

HELD_OUT_SEED = 0  # held-out rows and examples are the same whatever the training seed


@dataclass(frozen=True)
class Example:
    """A held-out prompt with every answer the data has for it.

    Args:
        prompt: Text of the prompt.
        prompt_ids: Its token ids.
        references: Token ids of the answers, without terminator.
    """

    prompt: str
    prompt_ids: list[int]
    references: list[list[int]] = field(default_factory=list)


def held_out_examples(table: Table, tokenizer: Tokenizer, n: int | None = None) -> list[Example]:
    """Prompts of a table with their answers, those with the same prompt put together, in an order of their own.

    Samples without a prompt, such as records of the form ``{text}``, are left out.

    Args:
        table: Tokenized samples of a split.
        tokenizer: What tokenized them.
        n: How many prompts, the same ones every time; all when not given.
    """
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for sample in np.random.default_rng(HELD_OUT_SEED).permutation(len(table)).tolist():
        ids, start = table.ids(sample), int(table.answer_start[sample])
        if start:
            by_prompt.setdefault(tuple(ids[:start]), []).append(ids[start:-1])
    chosen = list(by_prompt.items())[:n]
    return [Example(tokenizer.decode(prompt), list(prompt), answers) for prompt, answers in chosen]
