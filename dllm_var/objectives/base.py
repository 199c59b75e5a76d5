"""Objectives: an objective decides which tokens are hidden from the model, and what its predictions of them cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dllm_var.errors import UserError
from dllm_var.model.attention import AttentionRule
from dllm_var.objectives.cross_entropy import Scores, summed_cross_entropy
from dllm_var.objectives.noise import KeyedNoise
from dllm_var.text.tokenizer import SpecialTokens

Batch = dict[str, Tensor]


@dataclass
class NoisedBatch:
    """A batch as the model sees it, and what it must predict.

    An objective that gives the model more to read than the batch's tokens may choose its own L; it then gives
    `position_ids` and `attention_rule`.

    Args:
        input_ids: Tokens the model reads [B, L].
        targets: Token to predict at each position [B, L]; only those under `loss_mask` count.
        loss_mask: Positions whose prediction is scored [B, L], bool.
        mask_rate: Probability with which each position was masked [B, L], for weights and for reports.
        weights: Weight of each position's loss [B, L]; None for 1.
        normaliser: Divides the summed loss, after both are added up over ranks and accumulated batches.
        position_ids: Rotary position of each token [B, L]; None for the batch's.
        attention_rule: Which token sees which; None for what `model.attention` says.
    """

    input_ids: Tensor
    targets: Tensor
    loss_mask: Tensor
    mask_rate: Tensor
    weights: Tensor | None
    normaliser: Tensor
    position_ids: Tensor | None = None
    attention_rule: AttentionRule | None = None

    @cached_property
    def scored(self) -> Tensor:
        """Positions under `loss_mask` [M], counted through the flattened batch; a GPU is waited for to count them."""
        return self.loss_mask.flatten().nonzero()[:, 0]

    def at_loss(self, values: Tensor) -> Tensor:
        """Returns `values` [B, L] at the scored positions [M]."""
        return values.flatten().index_select(0, self.scored)


class Objective(ABC):
    """Corrupts a batch and scores predictions; the module does the rest, the same for all objectives.

    Attributes:
        causal: Whether the transformer reads left to right under this objective.
        causal_context: Whether it reads prompts and finished blocks left to right.
        token_shift: Whether it predicts each token at the position left of it, although not `causal`.
        document_attention_only: Whether it decides itself which token of a sample sees which.
    """

    causal: bool = False
    causal_context: bool = False
    token_shift: bool = False
    document_attention_only: bool = False
    special: SpecialTokens | None = None

    def bind(self, special: SpecialTokens) -> Objective:
        """Takes mask, terminator and pad ids from the tokenizer; returns itself."""
        self.special = special
        return self

    @abstractmethod
    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        """Returns the noised batch; a pure function of the batch, its `row` numbers and the generator's seed."""

    def likelihood(self) -> Objective | None:
        """Returns the noise under which a bound on the likelihood is measured; None for `EvenMasking`."""
        return None

    def score(self, head: nn.Linear, hidden: Tensor, noised: NoisedBatch) -> Scores:
        """Returns the loss at `noised.loss_mask`: the sum of the cross-entropies, weighted by `noised.weights`.

        Args:
            head: The output head.
            hidden: Hidden states at the scored positions [M, hidden].
            noised: What the model saw and has to predict.
        """
        weights = None if noised.weights is None else noised.at_loss(noised.weights)
        return summed_cross_entropy(head, hidden, noised.at_loss(noised.targets), weights)

    def specials(self) -> SpecialTokens:
        """Returns the bound ids.

        Raises:
            UserError: When there are none yet.
        """
        if self.special is None:
            raise UserError(f"{type(self).__name__} has no mask and terminator ids: call bind(tokenizer.special) first")
        return self.special

    def hide(
        self, batch: Batch, masked: Tensor, rate: Tensor, weights: Tensor | None = None, total: Tensor | None = None
    ) -> NoisedBatch:
        """Returns the batch with mask tokens where it is `masked` [B, L]; `total`, else their number, normalises."""
        tokens = batch["input_ids"]
        return NoisedBatch(
            input_ids=torch.where(masked, self.specials().mask_id, tokens),
            targets=tokens,
            loss_mask=masked,
            mask_rate=rate,
            weights=weights,
            normaliser=masked.sum() if total is None else total,
        )


def is_one_of(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Returns where `tokens` is one of a few `ids`, same shape; a few comparisons are faster than torch.isin."""
    found = tokens == ids[0]
    for token in ids[1:]:
        found = found | (tokens == token)
    return found


def mask_rates(batch: Batch, generator: KeyedNoise, low: float, high: float, per_segment: bool) -> Tensor:
    """Draws mask rates, uniform in [low, high], one per row or per segment, spread over positions [B, L]."""
    rows, length = batch["row"], batch["input_ids"].size(1)
    if not per_segment:
        return (low + (high - low) * generator.uniform(rows, 1, stream=1)).expand(-1, length)
    return low + (high - low) * generator.uniform(rows, length, stream=1).gather(1, segment_starts(batch))


def segment_starts(batch: Batch) -> Tensor:
    """Returns the column where each token's segment starts [B, L]; padding tokens are segments of their own."""
    position = batch["position_ids"]
    return torch.arange(position.size(1), device=position.device) - position


def check_rates(name: str, low: float, high: float) -> None:
    """Raises UserError unless 0 < low <= high <= 1."""
    if not 0 < low <= high <= 1:
        raise UserError(f"objective {name}: mask rates must satisfy 0 < low <= high <= 1, got {low} and {high}")
