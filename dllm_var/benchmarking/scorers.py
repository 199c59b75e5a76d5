"""Scorers decide which answers are right; a benchmark's config names one by `class_path`."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from decimal import Decimal

from dllm_var.datamodules import Example
from dllm_var.metrics import AnswerMetrics
from dllm_var.sampling import Generation
from dllm_var.text.tokenizer import Tokenizer

Scores = dict[str, float]


class Scorer(ABC):
    """Compares answers with the data's references."""

    @abstractmethod
    def score(self, answers: Sequence[Generation], examples: Sequence[Example], tokenizer: Tokenizer) -> Scores:
        """Returns `accuracy`, by which everything is ranked, and any other figure, all as shares of 1."""


class TokenErrorScorer(Scorer):
    """Accuracy is 1 minus the token error rate, at least 0; `exact_match` is the share of answers without an error.

    With phonemes as tokens these are 1 - PER and 1 - WER.
    """

    def score(self, answers: Sequence[Generation], examples: Sequence[Example], tokenizer: Tokenizer) -> Scores:
        metrics = AnswerMetrics(sync_on_compute=False)
        metrics.update(answers, [example.references for example in examples])
        errors = metrics.compute()
        return {
            "accuracy": max(0.0, 1 - errors["token_error_rate"]),
            "exact_match": 1 - errors["answer_error_rate"],
            "token_error_rate": errors["token_error_rate"],
        }


class FinalNumberScorer(Scorer):
    """Accuracy is the share of answers whose final number equals the reference's; `exact_match` wants the same text.

    The final number is the first one behind the last `marker` (`####` in GSM8K); an answer without it is wrong.
    Thousands separators and trailing zeros do not matter.
    """

    def __init__(self, marker: str = "####") -> None:
        self.marker = marker

    def score(self, answers: Sequence[Generation], examples: Sequence[Example], tokenizer: Tokenizer) -> Scores:
        right = same = 0
        for answer, example in zip(answers, examples, strict=True):
            number = self.final_number(tokenizer.decode(answer.tokens))
            expected = [self.final_number(tokenizer.decode(reference)) for reference in example.references]
            right += number is not None and number in expected
            same += list(answer.tokens) in [list(reference) for reference in example.references]
        count = max(len(answers), 1)
        return {"accuracy": right / count, "exact_match": same / count}

    def final_number(self, text: str) -> Decimal | None:
        """Returns the first number behind the last marker of a text; None when there is none."""
        _, marker, rest = text.rpartition(self.marker)
        found = re.search(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+", rest) if marker else None
        return None if found is None else Decimal(found[0].replace(",", ""))
