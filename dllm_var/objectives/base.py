"""Objectives decide which tokens are hidden from the model, and what its predictions of them cost.

All their randomness is `KeyedNoise`: a pure function of (seed, row, position), the same on every device and rank.
"""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_var.errors import UserError
from dllm_var.model.attention import AttentionRule, send
from dllm_var.model.context_parallel import RowPart
from dllm_var.objectives.cross_entropy import Scores, cross_entropy, head_loss, summed_cross_entropy
from dllm_var.text.tokenizer import SpecialTokens

Batch = dict[str, Tensor]

SMALLEST_RATE = 1e-2  # of a walk over all mask rates; keeps weights of 1 / rate finite
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


def golden_fractions(numbers: Tensor) -> Tensor:
    """Returns the fractional part of each number times the golden ratio, in float32 [B]: spread evenly over [0, 1)."""
    return _shift_right(numbers * _GOLDEN, 40).to(torch.float32) * 2.0**-24


@dataclass
class NoisedBatch:
    """A batch as the model sees it, and what it must predict.

    An objective that gives the model more to read than the batch's tokens may choose its own L; it then gives
    `position_ids` and `attention_rule`.
    """

    input_ids: Tensor  # tokens the model reads [B, L]
    targets: Tensor  # token to predict at each position [B, L]; only those under `loss_mask` count
    loss_mask: Tensor  # positions whose prediction is scored [B, L], bool
    mask_rate: Tensor  # probability with which each position was masked [B, L], for weights and for reports
    weights: Tensor | None  # weight of each position's loss [B, L]; None for 1
    normaliser: Tensor  # divides the summed loss, after both are added up over ranks and accumulated batches
    position_ids: Tensor | None = None  # rotary position of each token [B, L]; None for the batch's
    attention_rule: AttentionRule | None = None  # which token sees which; None for what `model.attention` says
    part: RowPart | None = None  # of rows that several processes share: what this one computes and scores

    @cached_property
    def scored(self) -> Tensor:
        """Positions under `loss_mask` [M], counted through the flattened batch; a GPU is waited for to count them."""
        return self.loss_mask.flatten().nonzero()[:, 0]

    def within(self, part: RowPart, predicted_at: Tensor) -> "NoisedBatch":
        """Returns what this process scores of rows that several share: what is predicted in its part.

        `predicted_at` [B, L] says where each token's prediction stands, counted through the flattened batch. The first
        process has the whole normaliser and the others none, so that sums over processes count it once.
        """
        column = predicted_at % part.length
        here = (column >= part.columns.start) & (column < part.columns.stop)
        own = self.normaliser if part.rank == 0 else torch.zeros_like(self.normaliser)
        return replace(self, loss_mask=self.loss_mask & here, normaliser=own, part=part)

    def to(self, device: torch.device) -> "NoisedBatch":
        """Returns the batch on another device, which is not waited for: the host counts what is scored."""
        if self.scored.device == device:  # counted before anything moves
            return self
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, AttentionRule):
                setattr(moved, name, value.to(device))
            elif isinstance(value, Tensor):
                setattr(moved, name, send(value, device))
        return moved

    def at_loss(self, values: Tensor) -> Tensor:
        """Returns `values` [B, L] at the scored positions [M]."""
        return values.flatten().index_select(0, self.scored)

    def weighted(self, token_loss: Tensor) -> Tensor:
        """Returns losses at the scored positions [M], multiplied by their weights."""
        return token_loss if self.weights is None else token_loss * self.at_loss(self.weights)

    def counts(self, batch: Batch, attention: str) -> dict[str, int | Tensor]:
        """Counts the work on a batch, for speed and FLOPs; counts on the device stay there, so that nothing waits.

        They are `tokens`, `supervised_tokens` and `samples` of the rows; `loss_tokens`; `read_tokens`, which the layers
        read, an objective's copies included; `attended_pairs` of tokens: both halves of a causal square, and of
        annealed attention as many as at its end. Processes that share rows all count them as a whole, and those loss
        tokens which they score as many times as there are processes.
        """
        rows, length = self.input_ids.shape
        used = batch["segment_ids"] >= 0  # padding is at position 0 too
        if self.attention_rule is not None:
            pairs: int | Tensor = self.attention_rule.pairs()
        elif attention == "document":
            pairs = ((2 * batch["position_ids"] + 1) * used).sum()  # the first n odd numbers add up to n squared
        else:
            pairs = rows * length * length
        return {
            "tokens": batch["input_ids"].numel(),
            "read_tokens": self.input_ids.numel(),
            "attended_pairs": pairs,
            "supervised_tokens": batch["supervised"].sum(),
            "loss_tokens": len(self.scored) * (1 if self.part is None else self.part.ranks),
            "samples": ((batch["position_ids"] == 0) & used).sum(),
        }


class Objective(ABC):
    """Corrupts a batch and scores predictions; the module does the rest, the same for all objectives."""

    causal: bool = False  # whether the transformer reads left to right under this objective
    causal_context: bool = False  # whether it reads prompts and finished blocks left to right
    grid: int | None = None  # length of the blocks, counted from a text's beginning, in which it is block-causal
    token_shift: bool = False  # whether it predicts each token at the position left of it, although not `causal`
    document_attention_only: bool = False  # whether it decides itself which token of a sample sees which
    growth_rows: int = 0  # rows of the training over which it grows, where it can
    special: SpecialTokens | None = None

    def bind(self, special: SpecialTokens) -> "Objective":
        """Takes mask, terminator and pad ids from the tokenizer; returns itself."""
        self.special = special
        return self

    @abstractmethod
    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        """Returns the noised batch; a pure function of the batch, its `row` numbers and the generator's seed."""

    def likelihood(self) -> "Objective":
        """Returns the noise under which a bound on the likelihood is measured."""
        return EvenMasking().bind(self.specials())

    def grown(self) -> "Objective":
        """Returns the objective as it is when it has grown, for validation, whose rows are counted from 0."""
        if not self.growth_rows:
            return self
        grown = copy(self)
        grown.growth_rows = 0
        return grown

    def score(self, head: nn.Linear, hidden: Tensor, noised: NoisedBatch) -> Scores:
        """Returns the sum of the cross-entropies, weighted by `noised.weights`, given hidden states [M, hidden]."""
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


class EvenMasking(Objective):
    """Masks every supervised token, terminators too, with a rate that walks evenly over (0, 1) from row to row.

    The 1/t-weighted loss under it estimates the NELBO (MDLM, arXiv 2406.07524, equation 10), whatever the model was
    trained with. Successive multiples of the golden ratio are about as even as a grid for any number of rows.
    """

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        supervised = batch["supervised"]
        rate = (SMALLEST_RATE + (1 - SMALLEST_RATE) * golden_fractions(batch["row"]))[:, None].expand_as(supervised)
        return self.mask(batch, generator, rate, weights=1.0 / rate, normaliser=supervised.sum())


class Certainty(Objective):
    """An objective that may add the entropy of predictions that are already right to its loss (dParallel, 2509.26488).

    A row's loss is the mean cross-entropy of its loss tokens plus `certainty` times the mean entropy of the rightly
    predicted ones among them, as in dParallel's code, which takes one sequence at a time. Rows count by their loss
    tokens, so that the loss does not depend on how rows are split over batches and processes.

    `checkpoints/cmudict_certain` was trained with weight 2.0 while the entropies' sum was divided by the number of all
    loss tokens; with 90 % of the predictions right, that is 1.8 now.
    """

    def __init__(self, certainty: float, certainty_temperature: float) -> None:
        if certainty < 0 or certainty_temperature <= 0:
            raise UserError(
                f"objective {type(self).__name__} needs certainty >= 0 and certainty_temperature > 0, got "
                f"{certainty} and {certainty_temperature}"
            )
        self.certainty, self.certainty_temperature = certainty, certainty_temperature

    def score(self, head: nn.Linear, hidden: Tensor, noised: NoisedBatch) -> Scores:
        if self.certainty == 0:
            return super().score(head, hidden, noised)
        targets = noised.at_loss(noised.targets)
        terms, guesses = head_loss(head, hidden, targets, self._loss_and_entropy)
        token_loss, entropy = terms.unbind(dim=1)
        right = guesses == targets
        counted = noised.loss_mask.sum(dim=1)  # [B]
        row = torch.arange(len(counted), device=right.device).repeat_interleave(counted, output_size=len(right))
        rights = torch.zeros_like(counted).index_add_(0, row, right.long())
        if noised.part is not None:  # of whole rows
            for count in (counted, rights):
                dist.all_reduce(count, group=noised.part.group)
        # The step divides by loss tokens, this mean by right ones.
        token_loss = token_loss + self.certainty * entropy * right * (counted / rights.clamp_min(1))[row]
        return Scores(noised.weighted(token_loss).sum(), token_loss.detach(), right)

    def _loss_and_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns each prediction's cross-entropy and its entropy in nats at `certainty_temperature` [M, 2]."""
        log_probs = (logits / self.certainty_temperature).log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return torch.stack((cross_entropy(logits, targets), entropy), dim=1)


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


def span_starts(batch: Batch) -> Tensor:
    """Returns the column where each token's span starts [B, L]: tokens of a segment that are all supervised or none."""
    supervised, segment = batch["supervised"], batch["segment_ids"]
    changes = torch.ones_like(supervised)
    changes[:, 1:] = (supervised[:, 1:] != supervised[:, :-1]) | (segment[:, 1:] != segment[:, :-1])
    columns = torch.arange(supervised.size(1), device=supervised.device)
    return torch.where(changes, columns, 0).cummax(dim=1).values


def columns_where(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the columns of a row's `chosen` [B, L] places, in order, as [B, N], and which of them exist [B, N].

    N is the most that a row has; a column that does not exist is the row's last one. A GPU is waited for to count them.
    """
    length = chosen.size(1)
    columns = torch.where(chosen, torch.arange(length, device=chosen.device), length)
    columns = columns.sort(dim=1).values[:, : int(chosen.sum(dim=1).max())]
    return columns.clamp_max(length - 1), columns < length


def check_rates(name: str, low: float, high: float) -> None:
    """Raises UserError unless 0 < low <= high <= 1."""
    if not 0 < low <= high <= 1:
        raise UserError(f"objective {name}: mask rates must satisfy 0 < low <= high <= 1, got {low} and {high}")
