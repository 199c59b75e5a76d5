"""Documents and scores of the shipped tasks; their YAML files name these functions."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dllm_var.benchmarking.scorers import FinalNumberScorer
from dllm_var.datamodules import CmudictSource
from dllm_var.evaluation import TASKS
from dllm_var.metrics.answers import nearest_reference
from dllm_var.text.tokenizer import Tokenizer


def documents(file: str, **_: Any) -> dict[str, Any]:
    """Returns the split `test` of a task from a JSONL file beside its YAML, as lm-eval's `custom_dataset`."""
    from datasets import Dataset

    lines = (TASKS / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def pronunciation_scores(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Compares an answer with the nearest of a word's pronunciations, as `RunSummary` does.

    `per` has the edits and the phonemes of the reference, for `error_rate`; `wer` and `length_exact` are 0 or 1.
    """
    tokenizer = _phonemes()
    answer = tokenizer.encode(results[0])
    references = [tokenizer.encode(reference) for reference in document["responses"]]
    reference, edits = nearest_reference(answer, references)
    return {
        "per": (edits, len(reference)),
        "wer": float(edits > 0),
        "length_exact": float(len(answer) == len(reference)),
    }


def error_rate(items: Sequence[tuple[int, int]]) -> float:
    """Returns the edits of all answers over the tokens of all references."""
    return sum(edits for edits, _ in items) / max(sum(length for _, length in items), 1)


def final_number_scores(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Compares the number behind the last `####` with the reference's, and the whole text; both scores are 0 or 1."""
    final_number, answer = FinalNumberScorer().final_number, results[0]
    number = final_number(answer)
    right = number is not None and number in map(final_number, document["responses"])
    return {"accuracy": float(right), "same_text": float(answer.strip() in document["responses"])}


@lru_cache(maxsize=1)
def _phonemes() -> Tokenizer:
    return Tokenizer.from_pretrained(CmudictSource.default_tokenizer or "")
