"""What takes part in a benchmark, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dllm_var.benchmarking.settings import Setting
from dllm_var.model.transformer import Transformer
from dllm_var.sampling import Generation, Request, Sampler
from dllm_var.sampling.auxiliary import AuxiliaryModel


@dataclass
class Run:
    """One decode of a list of prompts.

    Args:
        answers: One per prompt.
        seconds: Wall time of each call of `generate`.
        forward_seconds: Of these, time inside transformers.
        forward_calls: Forwards of the layers, auxiliary models' included.
    """

    answers: list[Generation]
    seconds: list[float]
    forward_seconds: float
    forward_calls: int

    @property
    def tokens(self) -> int:
        """Useful tokens: neither prompts nor terminators nor anything behind them."""
        return sum(len(answer.tokens) for answer in self.answers)


@dataclass
class Contender:
    """A setting with its sampler and model, and what has been measured of it so far.

    Args:
        setting: What it is.
        sampler: The sampler.
        model: The model it decodes with.
        scores: The scorer's figures and those of how answers end; empty until scored.
        single: Timed runs, one prompt at a time.
        batched: Timed runs in batches.
        memory: Peak bytes beyond the models, `single` and `batched`.
        selection_scores: As `scores`, on the split that chooses the best setting.
        selection_single: As `single`, on that split.
    """

    setting: Setting
    sampler: Sampler
    model: Transformer
    scores: dict[str, float] = field(default_factory=dict)
    single: list[Run] = field(default_factory=list)
    batched: list[Run] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)
    selection_scores: dict[str, float] = field(default_factory=dict)
    selection_single: list[Run] = field(default_factory=list)

    @property
    def models(self) -> list[Transformer]:
        """The model and those the sampler brings."""
        brought = vars(self.sampler).values()
        auxiliary = [value.beside(self.model, Request()) for value in brought if isinstance(value, AuxiliaryModel)]
        models = [self.model, *(value for value in brought if isinstance(value, Transformer)), *auxiliary]
        return list({id(model): model for model in models}.values())
