"""Objectives decide which tokens are hidden from the model, and what its predictions of them cost.

All their randomness is `KeyedNoise`: a pure function of (seed, row, position), the same on every device and rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from dllm_var.errors import UserError
from dllm_var.model.attention import AttentionRule
from dllm_var.objectives.cross_entropy import Scores, summed_cross_entropy
from dllm_var.text.tokenizer import SpecialTokens

Batch = dict[str, Tensor]

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts the 64 bits right, filling with zeros (torch fills with the sign)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each input bit flips each output bit half the time."""
    x = (x ^ _shift_right(x, 30)).mul_(_MIX_1)
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 31))


@cache
def _first_key(seed: int, stream: int) -> int:
    """Returns the 64 bits that seed and stream come to; on the host, as each constant sent to a GPU makes it wait."""
    return int(_mix(torch.tensor(seed, dtype=torch.int64, device="cpu") * _GOLDEN + stream + 1))


class KeyedNoise:
    """Random numbers keyed by (seed, stream, row, position): no state, so nothing to restore and nothing to shard.

    Streams are independent sequences; an objective uses one for mask rates and one for positions.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, rows: Tensor, length: int, stream: int = 0) -> Tensor:
        """Returns float32 numbers in [0, 1) of shape [B, length], for the global row numbers [B]."""
        bits = _shift_right(self._bits(rows, length, stream), 40)  # the 24 bits a float32 holds exactly
        return bits.to(torch.float32) * 2.0**-24

    def exponential(self, rows: Tensor, length: int, stream: int = 0) -> Tensor:
        """Returns float32 numbers of the exponential distribution with mean 1, above 0, of shape [B, length].

        The small ones, which win races, come from 63 bits and have a float32's relative precision down to 2^-63.
        """
        bits = _shift_right(self._bits(rows, length, stream), 1).bitwise_or_(1)
        return bits.to(torch.float32).mul_(-(2.0**-63)).log1p_().neg_()

    def _bits(self, rows: Tensor, length: int, stream: int) -> Tensor:
        """Returns 64 random bits each, as int64 [B, length]."""
        base = _mix(rows * _GOLDEN + _first_key(self.seed, stream))
        counters = torch.arange(1, length + 1, dtype=torch.int64, device=rows.device) * _GOLDEN
        return _mix(base[:, None] + counters)


SMALLEST_RATE = 1e-2  # of a walk over all mask rates; keeps weights of 1 / rate finite


def golden_fractions(numbers: Tensor) -> Tensor:
    """Returns the fractional part of each number times the golden ratio, in float32 [B]: spread evenly over [0, 1)."""
    return _shift_right(numbers * _GOLDEN, 40).to(torch.float32) * 2.0**-24


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
        """Returns the loss at the scored positions: the sum of the cross-entropies, weighted by `noised.weights`.

        Args:
            head: The output head.
            hidden: Hidden states at the scored positions [M, hidden].
            noised: What the model saw and has to predict.
        """
        weights = None if noised.weights is None else noised.at_loss(noised.weights)
        return summed_cross_entropy(head, hidden, noised.at_loss(noised.targets), weights)

    def specials(self) -> SpecialTokens:
        """Returns the bound ids; raises UserError when there are none yet."""
        if self.special is None:
            raise UserError(f"{type(self).__name__} has no mask and terminator ids: call bind(tokenizer.special) first")
        return self.special

    def mask(
        self,
        batch: Batch,
        generator: KeyedNoise,
        rate: Tensor,
        always: Tensor | None = None,
        weights: Tensor | None = None,
        normaliser: Tensor | None = None,
    ) -> NoisedBatch:
        """Returns the batch with supervised tokens masked with probability `rate` [B, L], and scored there.

        Supervised tokens of `always` [B, L] are masked in any case. The loss is divided by `normaliser`; by the number
        of masked tokens when None.
        """
        tokens = batch["input_ids"]
        masked = generator.uniform(batch["row"], tokens.size(1), stream=2) < rate
        masked = (masked if always is None else masked | always) & batch["supervised"]
        return NoisedBatch(
            input_ids=torch.where(masked, self.specials().mask_id, tokens),
            targets=tokens,
            loss_mask=masked,
            mask_rate=rate,
            weights=weights,
            normaliser=masked.sum() if normaliser is None else normaliser,
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
