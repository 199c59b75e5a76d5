"""A denoising step: `BlockView` is what an unmasking policy sees, `Decision` its answer, `take_step` what follows."""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.configurable import Configurable

STEPS_WITH_REMASKING = 4  # per position of a block
OF_ROWS = ("finish_block", "finish_row", "keep_open")  # entries of a decision that are for whole rows


@dataclass
class BlockView:
    """The active block of every row at one denoising step; R rows, K positions, M scored positions, V tokens.

    Only the scored positions have logits: the masked ones, and also the committed ones for a policy that sets
    `scores_committed`. Everywhere else the properties below hold 0.
    """

    scored_logits: Tensor  # [M, V] float32 in row-major order; the mask token is -inf, so it is never predicted
    scored: Tensor  # indices of the scored positions in the flattened [R * K] block [M]
    tokens: Tensor  # current tokens [R, K], the mask id where masked
    masked: Tensor  # positions still masked [R, K]
    changeable: Tensor  # positions the policy may write [R, K]: inside the row's block and not given text
    step: Tensor  # denoising steps that the row's block has had before this one [R]
    progress: Tensor  # share of the row's length limit already decoded, in [0, 1) [R]
    key: Tensor  # number of the request and forward [R], int64, for randomness that does not depend on the batch
    sampled: Tensor | None = None  # tokens drawn at the scored positions [M], when the temperature is above 0
    unscored: Tensor | None = None  # positions that count as not scored [R, K] although all have logits

    def after(self, tokens: Tensor, masked: Tensor, sampled: Tensor | None = None) -> "BlockView":
        """Returns the view of the next step if it had the same logits, with a block of `tokens` and `masked` [R, K].

        What was computed of the logits is kept. `sampled` are tokens drawn anew [M], when the temperature is above 0.
        """
        later = copy(self)
        later.tokens, later.masked, later.sampled = tokens, masked, sampled
        later.step, later.key = self.step + 1, self.key + 1
        if sampled is not None:
            for name in ("predicted", "confidence"):
                later.__dict__.pop(name, None)
        return later

    def spread(self, values: Tensor) -> Tensor:
        """Returns per-position values [M, ...] at their places in a block of zeros [R, K, ...]."""
        rows, width = self.tokens.shape
        if values.size(0) == rows * width:  # every position is scored
            values = values.view(rows, width, *values.shape[1:])
            if self.unscored is None:
                return values
            return values.masked_fill(self.unscored.view(rows, width, *[1] * (values.dim() - 2)), 0)
        block = values.new_zeros((rows * width, *values.shape[1:]))
        return block.index_copy_(0, self.scored, values).view(rows, width, *values.shape[1:])

    @cached_property
    def _best(self) -> Tensor:
        return self.scored_logits.argmax(dim=-1)

    @cached_property
    def most_likely(self) -> Tensor:
        """The most likely token at each position [R, K], also when tokens are drawn."""
        return self.spread(self._best)

    @cached_property
    def predicted(self) -> Tensor:
        """The token to put at each position [R, K]: the most likely one, or the one drawn when sampling."""
        return self.most_likely if self.sampled is None else self.spread(self.sampled)

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of the predicted token [R, K]."""
        if self.sampled is not None:
            return self.probability_of(self.predicted)
        return self.spread(self.scored_logits.softmax(dim=-1).gather(1, self._best[:, None]).squeeze(1))

    @cached_property
    def _normaliser(self) -> Tensor:
        return self.scored_logits.logsumexp(dim=-1)

    def probability_of(self, tokens: Tensor) -> Tensor:
        """Probability of given tokens [R, K] at the scored positions."""
        return self.spread(self._log_probabilities(tokens).exp())

    def log_probability_of(self, tokens: Tensor) -> Tensor:
        """Natural logarithm of the probability of given tokens [R, K] at the scored positions."""
        return self.spread(self._log_probabilities(tokens))

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        """Returns the log-probabilities of given tokens [R, K] at the scored positions alone [M]."""
        chosen = self.scored_logits.gather(1, tokens.reshape(-1)[self.scored, None]).squeeze(1)
        return chosen - self._normaliser

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy of each position in nats [R, K]."""
        return self.spread(torch.special.entr(self.scored_logits.softmax(dim=-1)).sum(dim=-1))

    @cached_property
    def logit_margin(self) -> Tensor:
        """Top-1 minus top-2 logit [R, K]."""
        first, second = self.scored_logits.topk(2, dim=-1).values.T
        return self.spread(first - second)

    @cached_property
    def probability_margin(self) -> Tensor:
        """Top-1 minus top-2 probability [R, K]."""
        first, second = (self.scored_logits.topk(2, dim=-1).values - self._normaliser[:, None]).exp().T
        return self.spread(first - second)


@dataclass
class Decision:
    """What to do with the block; every mask is [R, K] bool and None means nowhere.

    A row that would commit nothing commits its masked position with the largest of the `scores`.
    """

    commit: Tensor  # masked positions to fill
    tokens: Tensor | None = None  # for each committed or edited position [R, K]; the predicted ones when None
    scores: Tensor | None = None  # how good each masked position is [R, K]; the confidence when None
    remask: Tensor | None = None  # committed positions to mask again
    edit: Tensor | None = None  # committed positions to overwrite
    finish_block: Tensor | None = None  # rows [R] whose block is to be filled with `tokens` at once
    finish_row: Tensor | None = None  # rows [R] that end after this step, before their first mask if one is left
    keep_open: Tensor | None = None  # rows [R] whose block gets another step even when it is full, to be edited


State = dict[str, Tensor]


class UnmaskingPolicy(Configurable, ABC):
    """Decides at each denoising step what becomes of each position of the block; `commit` has the engine's rules."""

    scores_committed = False  # whether committed positions get logits, too
    can_be_captured = False  # whether `decide` uses nothing but tensors, of constant shapes; this package's all do

    def initial_state(self, block_length: int) -> State:
        """Returns the memory with which each row's new block begins, without a row dimension."""
        return {}

    @abstractmethod
    def decide(self, view: BlockView, state: State) -> Decision:
        """Returns what to commit, remask or edit at this step; changes the memory [R, ...] in place."""

    def decision(self, view: BlockView, state: State) -> Decision:
        """Returns what `decide` does; raises UserError when that is no decision on the blocks of the view."""
        decision, name = self.decide(view, state), f"the policy {type(self).__name__}"
        if not isinstance(decision, Decision):
            raise UserError(f"{name} must return a Decision, got {type(decision).__name__}: change its method decide")
        for each in fields(decision):
            value, wanted = getattr(decision, each.name), view.tokens.shape[: 1 if each.name in OF_ROWS else 2]
            kind = None if each.name == "scores" else torch.int64 if each.name == "tokens" else torch.bool
            if value is not None and (value.shape != wanted or kind not in (None, value.dtype)):
                must, got = f"{list(wanted)} of {kind or 'numbers'}", f"{list(value.shape)} of {value.dtype}"
                raise UserError(f"{name}: Decision.{each.name} must be {must}, got {got}")
        return decision


@dataclass(eq=False)
class ConfidenceThreshold(UnmaskingPolicy):
    """Commits every masked position whose confidence exceeds the threshold (dLLM-Var 2510.24605, Fast-dLLM 2505.22618).

    Args:
        threshold: Confidence to exceed, in [0, 1]; LLaDA2 uses 0.95.
        decay: Multiplies the threshold at each further step of a block, in [0, 1]. Below 1 a block takes few steps: the
            first step's sure tokens decide much of what the others are, so that these may follow at less confidence.
    """

    threshold: float = 0.9
    decay: float = 1.0

    def __post_init__(self) -> None:
        self.check_range(0, 1, "threshold", "decay")

    def decide(self, view: BlockView, state: State) -> Decision:
        if self.decay == 1:
            return Decision(commit=view.masked & (view.confidence > self.threshold))
        thresholds = self.threshold * self.decay ** view.step.double()  # [R]
        return Decision(commit=view.masked & (view.confidence > thresholds[:, None]))


@dataclass
class Step:
    """The outcome of a denoising step."""

    tokens: Tensor  # [R, K], the mask id where masked
    masked: Tensor  # what is still masked [R, K]
    written: Tensor  # positions that the step committed or edited [R, K]
    left: Tensor  # masks left [R]
    end: Tensor  # where the answer ends, or -1 [R]
    over: Tensor  # whether the block is over [R]


def take_step(
    view: BlockView, decision: Decision, mask_id: int, terminators: tuple[int, ...], terminator_last: bool
) -> Step:
    """Applies a policy's decision, under the rules that hold for every policy; all shapes are constant."""
    tokens, masked, written = commit(view, decision, mask_id, terminators, terminator_last)
    left, end = outcome(tokens, masked, view.changeable, terminators, decision.finish_row)
    over = (left == 0) | (end >= 0)
    return Step(tokens, masked, written, left, end, over if decision.keep_open is None else over & ~decision.keep_open)


def commit(
    view: BlockView,
    decision: Decision,
    mask_id: int,
    terminators: tuple[int, ...],
    terminator_last: bool,
    must_advance: Tensor | bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the blocks' tokens, their masked positions and the written ones, each [R, K].

    - A row with masks whose decision leaves neither a commit nor a remasking commits the position with the best score,
      unless it need not advance [R]. So without remasking a block takes at most K steps.
    - With `terminator_last` a terminator is committed only once everything left of it is, nothing is committed right of
      one that the policy selected, and no forced commit is right of a predicted one.
    - Where that leaves no more commits than positions to mask again, nothing is masked again: the policy had counted on
      progress. After `STEPS_WITH_REMASKING` steps per position nothing is, either.
    """
    tokens = view.predicted if decision.tokens is None else decision.tokens
    masked = view.masked
    commit = wanted = decision.commit & masked
    may_commit = masked  # what a row commits that would commit nothing
    if terminator_last:
        is_end = is_one_of(tokens, terminators) & masked
        sure_end = wanted & is_end
        waits = (masked ^ wanted).cumsum(1).bool()  # something left of it stays masked
        commit = wanted & (sure_end.cumsum(1) <= sure_end) & ~(sure_end & waits)
        may_commit = masked & ((is_end.cumsum(1) == 0) | (masked.cumsum(1) == 1))
    stuck = masked.any(1) & ~commit.any(1) & must_advance
    remask = None
    if decision.remask is not None:
        in_vain = (commit != wanted).any(1) & (commit.sum(1) <= decision.remask.sum(1)) & must_advance
        in_time = view.step < STEPS_WITH_REMASKING * tokens.size(1)
        remask = decision.remask & (~in_vain & in_time)[:, None]
        stuck = stuck & ~remask.any(1)
    scores = view.confidence if decision.scores is None else decision.scores
    best = scores.masked_fill(~may_commit, -torch.inf).argmax(1, keepdim=True)
    commit = commit.scatter(1, best, commit.gather(1, best) | stuck[:, None])
    if decision.finish_block is not None:
        commit = commit | (masked & decision.finish_block[:, None])
    written = commit
    if decision.edit is not None:
        written = commit | (decision.edit & view.changeable & ~masked)
    after, masked = torch.where(written, tokens, view.tokens), masked ^ commit
    if remask is not None:
        remask = remask & view.changeable & ~commit
        after, masked = after.masked_fill(remask, mask_id), masked | remask
    return after, masked, written


def outcome(
    tokens: Tensor, masked: Tensor, inside: Tensor, terminators: tuple[int, ...], finish_row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns how many masks a step leaves in blocks [R], and where the answer ends or -1 [R].

    An answer ends at its first terminator with no mask left of it, or where a policy's `finish_row` [R] says so.
    """
    masks = masked.cumsum(1)
    left = masks[:, -1]
    ends, end = (is_one_of(tokens, terminators) & inside & (masks == 0)).max(1)
    end = torch.where(ends, end, -1)
    if finish_row is not None:
        behind_last = inside.cumsum(1).argmax(1) + 1
        decided = torch.where(left > 0, masked.int().argmax(1), behind_last)
        end = torch.where(finish_row & (end < 0), decided, end)
    return left, end


def top_n(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """Returns where `scores` [R, K] is among the row's `counts` [R] best eligible ones; ties go to the left."""
    return (ranks(scores, eligible) < counts[:, None]) & eligible


def ranks(scores: Tensor, eligible: Tensor) -> Tensor:
    """Returns each position's place [R, K] in its row sorted by score, best eligible one first, ties left first."""
    order = scores.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.size(1), device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Returns each row's mean of `values` [R, K] over `where`; 0 for a row without any."""
    return (values * where).sum(dim=1) / where.sum(dim=1).clamp_min(1)
