"""What a training benchmark's config says: models, vocabularies, who takes part and what is asked of the ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dllm_var.errors import UserError

OURS, COMPILED, FULL = "ours", "ours, compiled", "ours, compiled, full attention"
PLAIN_LOOP, PADDED = "full logits, plain loop", "full logits, padded, Trainer"
CONTENDERS = (OURS, COMPILED, FULL, PLAIN_LOOP, PADDED)
BARS = ("tokens_per_second", "peak_memory", "mfu")  # what a bar's name begins with


@dataclass
class TrainingCase:
    """One model on one vocabulary.

    Args:
        name: What the tables call it.
        transformer: Its shape, as `model.transformer` in a training config.
        vocab_size: Rows of embedding and output head.
        context_length: Tokens in a row.
        batch_size: Rows in a batch.
        steps: Optimizer steps timed in each round, after one to warm up.
        contenders: Who takes part.
        prompt_tokens: Median length of a sample's prompt, which carries no loss.
        answer_tokens: Median length of its answer.
        bars: What is asked: `mfu` at least, of full attention where that takes part; `tokens_per_second_...` over the
            plain loop's at least; `peak_memory_...` over the plain loop's at most. These are also the names of the
            ratios in the result.

    Raises:
        UserError: For a number below 1, an unknown contender or an unknown bar.
    """

    name: str
    vocab_size: int
    transformer: dict[str, Any] = field(default_factory=dict)
    context_length: int = 1024
    batch_size: int = 2
    steps: int = 2
    contenders: list[str] = field(default_factory=lambda: list(CONTENDERS))
    prompt_tokens: int = 60
    answer_tokens: int = 140
    bars: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "batch_size", "steps", "prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"training {self.name}: {name} must be at least 1, got {getattr(self, name)}")
        for contender in self.contenders:
            if contender not in CONTENDERS:
                raise UserError(f"training {self.name}: no contender '{contender}'; there are {'; '.join(CONTENDERS)}")
        for bar in self.bars:
            if not bar.startswith(BARS):
                raise UserError(f"training {self.name}: a bar begins with {', '.join(BARS)}, got '{bar}'")

    @property
    def ours(self) -> str | None:
        """The contender that the ratios are about: compiled where that takes part."""
        return next((name for name in (COMPILED, OURS) if name in self.contenders), None)


def smaller(cases: Sequence[TrainingCase]) -> list[TrainingCase]:
    """Returns cases for a smoke test: the same contenders on models and rows of next to nothing."""
    return [
        TrainingCase(
            name=case.name,
            vocab_size=min(case.vocab_size, 512),
            transformer={"hidden_size": 32, "num_layers": 1, "num_heads": 2},
            context_length=64,
            steps=1,
            contenders=[name for name in case.contenders if name not in (COMPILED, FULL)],
            prompt_tokens=6,
            answer_tokens=10,
            bars=case.bars,
        )
        for case in cases
    ]
