"""What the shipped tasks are made of: their documents, and what makes an answer right. Their YAML files name these."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from dllm_var.benchmarking.scorers import FinalNumberScorer
from dllm_var.datamodules import CmudictSource, GsmSymbolicSource
from dllm_var.datamodules.sources import Source
from dllm_var.evaluation import TASKS
from dllm_var.metrics.answers import nearest_reference
from dllm_var.text.tokenizer import Tokenizer


def documents(file: str, **_: Any) -> dict[str, Any]:
    """Returns the split `test` of a task from a JSONL file, as lm-eval's `custom_dataset`.

    Args:
        file: Name of the file in the folder of the shipped tasks.
    """
    from datasets import Dataset

    lines = (TASKS / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def pronunciation_scores(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Compares an answer with the nearest of a word's pronunciations, as `RunSummary` does.

    Returns:
        `per`: edits and phonemes of the reference, for `error_rate`; `wer` and `length_exact`: 0 or 1.
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
    """Compares the number behind the last `####` with the reference's, and the whole text.

    Returns:
        `accuracy` and `same_text`: 0 or 1.
    """
    scorer, answer = FinalNumberScorer(), results[0]
    number = scorer.final_number(answer)
    expected = [scorer.final_number(response) for response in document["responses"]]
    right = number is not None and number in expected
    return {"accuracy": float(right), "same_text": float(answer.strip() in document["responses"])}


@lru_cache(maxsize=1)
def _phonemes() -> Tokenizer:
    assert CmudictSource.default_tokenizer is not None
    return Tokenizer.from_pretrained(CmudictSource.default_tokenizer)


def grouped(records: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Puts the first records with the same prompt together: `{"prompt": ..., "responses": [...]}`."""
    by_prompt: dict[str, list[str]] = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], []).append(record["response"])
    return [{"prompt": prompt, "responses": answers} for prompt, answers in islice(by_prompt.items(), count)]


def write_documents(folder: Path = TASKS, words: int = 2_000, problems: int = 500) -> None:
    """Writes the JSONL files of the shipped tasks from the test splits of their sources.

    Args:
        folder: Where they go.
        words: Words of `cmudict`; all of its test split.
        problems: Problems of `gsm_symbolic`; needs reasoning-gym.
    """
    sources: dict[str, tuple[Source, int]] = {
        "cmudict": (CmudictSource(), words),
        "gsm_symbolic": (GsmSymbolicSource(), problems),
    }
    for name, (source, count) in sources.items():
        lines = [json.dumps(line, ensure_ascii=False) for line in grouped(source.records("test"), count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
