"""The engine of every sampler: slots, admission, compaction, caches and answers; and the denoising step they share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.base import Generation, Request, Sampler
from dllm_var.sampling.policies.base import BlockView, Decision, State
from dllm_var.sampling.settings import DecodingSettings, request_keys

STEPS_WITH_REMASKING = 4  # denoising steps per position of a block, after which nothing is masked again
KEPT_BELOW = 0.75  # share of used slots under which the free ones are dropped, so that the copies cost little in all


@dataclass(eq=False)
class Row:
    """A row in flight, in one slot of the cache; index -1 is an idle slot, whose results nobody reads.

    Args:
        index: Of its prompt.
        key: Number of its request, for draws.
        prompt_length: Tokens of the prompt.
        began: When it was admitted, by `time.perf_counter`.
        nfe: Forward passes so far.
        auxiliary_nfe: Those of a second model.
        pending: Finished tokens that are not in the cache yet; they follow those that are.
        width: Tokens of the active block, which follow the pending ones.
        steps: Denoising steps that the block has had.
        left: Masked positions left in it.
    """

    index: int = -1
    key: int = 0
    prompt_length: int = 0
    began: float = 0.0
    nfe: int = 0
    auxiliary_nfe: int = 0
    pending: int = 0
    width: int = 0
    steps: int = 0
    left: int = 0


AnyRow = TypeVar("AnyRow", bound=Row)


class Engine(ABC, Generic[AnyRow]):
    """One call of `generate`: the rows in flight, forward after forward, until every prompt has its answer.

    A subclass says what happens in a forward; it calls `tell` when a row gets further, which also ends rows.

    Args:
        sampler: Its settings.
        model: The transformer.
        prompts: Token ids.
        request: What the caller asks.
        slack: Tokens of room in the cache beside the longest prompt and answer.
    """

    row_class: ClassVar[type[Row]] = Row
    free_share: ClassVar[float] = 0.0  # share of the slots that must be free before waiting prompts enter

    def __init__(
        self, sampler: DecodingSettings, model: Transformer, prompts: list[list[int]], request: Request, slack: int = 0
    ) -> None:
        self.sampler, self.model, self.prompts, self.request = sampler, model, prompts, request
        self.limit = request.max_new_tokens or sampler.max_new_tokens
        config, self.device = model.config, model.embedding.weight.device
        self.mask_id = -1 if config.mask_id is None else config.mask_id
        self.terminators = tuple(config.terminator_ids or ())
        banned = sorted({*request.suppressed} | ({self.mask_id} if self.mask_id >= 0 else set()))
        self.banned = torch.tensor(banned, dtype=torch.long, device=self.device)
        self.waiting = deque(range(len(prompts)))
        self.keys = request_keys(prompts)
        self.answers: dict[int, Generation] = {}
        slots = min(sampler.batch_size, len(prompts))
        self.rows: list[AnyRow] = [self.new_row() for _ in range(slots)]
        self.capacity = max(map(len, prompts), default=0) + self.limit + slack
        self.canvas = torch.full((slots, self.capacity), self.mask_id, device=self.device)  # tokens, then masks
        self.committed_at = torch.zeros_like(self.canvas)  # the forward that committed each token
        self.template: State = {}  # the policy's memory of a new block,
        self.state: State = {}  # and that of each slot's block
        self.cache = self.new_cache(slots)

    @abstractmethod
    def forward(self, slots: list[int] | None) -> None:
        """Runs the model once over newly filled slots, or over all of them (None)."""

    def start(self, slot: int) -> None:
        """Prepares a row that was just admitted."""

    def new_cache(self, slots: int) -> Any:
        """Returns the cache of the rows."""
        return self.model.new_cache(slots, self.capacity)

    def new_row(self, *values: Any) -> AnyRow:
        """Returns a row of this engine's class."""
        return self.row_class(*values)  # type: ignore[return-value]

    def use_policy_state(self, template: State) -> None:
        """Gives every slot a copy of a policy's initial memory."""
        self.template = {name: value.to(self.device) for name, value in template.items()}
        self.state = {name: value.repeat(len(self.rows), *[1] * value.dim()) for name, value in self.template.items()}

    @property
    def active(self) -> list[int]:
        """The slots in use."""
        return [slot for slot, row in enumerate(self.rows) if row.index >= 0]

    def run(self) -> list[Generation]:
        """Decodes all prompts and returns the answers in their order."""
        while self.waiting or self.active:
            active = self.active
            if len(active) + len(self.waiting) <= KEPT_BELOW * len(self.rows):
                idle = [slot for slot, row in enumerate(self.rows) if row.index < 0]
                self.compact(sorted([*active, *idle[: len(self.waiting)]]))
            self.admit()
            if self.active:
                self.forward(None)
        return [self.answers[index] for index in range(len(self.prompts))]

    def admit(self) -> None:
        """Gives free slots to waiting prompts and prefills them together."""
        free = [slot for slot, row in enumerate(self.rows) if row.index < 0]
        if not self.waiting or not free or len(free) < self.free_share * len(self.rows):
            return
        free = free[: len(self.waiting)]
        for slot in free:
            index = self.waiting.popleft()
            prompt = self.prompts[index]
            self.canvas[slot] = self.mask_id
            self.canvas[slot, : len(prompt)] = torch.tensor(prompt, device=self.device)
            self.committed_at[slot] = 0
            self.rows[slot] = self.new_row(index, self.keys[index], len(prompt), time.perf_counter())
            self.rows[slot].pending = len(prompt)
            if self.cache is not None:
                self.cache.free(slot)
            self.start(slot)
        self.forward(free if len(free) < len(self.rows) else None)

    def compact(self, kept: list[int]) -> None:
        """Drops all slots but these."""
        if self.cache is not None:
            self.cache.keep(torch.tensor(kept))
        index = torch.tensor(kept, device=self.device)
        self.canvas, self.committed_at = self.canvas[index], self.committed_at[index]
        self.state = {name: value[index] for name, value in self.state.items()}
        self.rows = [self.rows[slot] for slot in kept]

    def tell(self, slot: int, stop: int, reason: str | None) -> bool:
        """Streams a row's answer up to its place `stop`; ends the row for a reason or at a stop string.

        Returns:
            Whether the row has ended.
        """
        row = self.rows[slot]
        if reason is None and self.request.on_block is None and self.request.stop is None:
            return False
        tokens = self.canvas[slot, row.prompt_length : stop].tolist()
        if self.request.on_block is not None:
            self.request.on_block(row.index, tokens)
        if reason is None and not self.request.stopped(row.index, tokens):
            return False
        self.end(slot, tokens, reason or "length")
        return True

    def end(self, slot: int, tokens: list[int], reason: str) -> None:
        """Hands on a row's answer and frees its slot."""
        row = self.rows[slot]
        answer = self.answers[row.index] = self.answer(slot, tokens, reason)
        self.rows[slot] = self.new_row()
        if self.cache is not None:
            self.cache.free(slot)
        self.request.finished(row.index, answer)

    def answer(self, slot: int, tokens: list[int], reason: str) -> Generation:
        """Returns a row's answer."""
        row = self.rows[slot]
        return Generation(
            tokens=tokens,
            finish_reason=reason,
            nfe=row.nfe,
            seconds=time.perf_counter() - row.began,
            prompt_length=row.prompt_length,
            commit_steps=self.committed_at[slot, row.prompt_length : row.prompt_length + len(tokens)].tolist(),
            auxiliary_nfe=row.auxiliary_nfe,
        )

    def write(self, cells: Tensor, tokens: Tensor, written: Tensor, nfe: Tensor) -> None:
        """Writes blocks [R, K] at `cells` of the flat canvas, and the number of the forward [R] where `written`."""
        self.canvas.put_(cells, tokens)
        self.committed_at.put_(cells, torch.where(written, nfe[:, None], self.committed_at.take(cells)))

    def score(
        self, model: Transformer, hidden: Tensor, places: Tensor, where: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Runs the output head at some positions of blocks, and nowhere else.

        Args:
            model: Whose head.
            hidden: Hidden states [R, L, hidden] of a forward.
            places: Where the positions of the blocks are in the flattened forward [R, K].
            where: The positions wanted [R, K].
            count: How many they are, known beforehand so that the device need not be asked.

        Returns:
            Indices of the positions in the flattened blocks [M], and their logits [M, V] in float32: -inf for the mask
            token and suppressed ones.
        """
        places, hidden = places.reshape(-1), hidden.flatten(0, 1)
        if count == places.numel():
            scored = torch.arange(count, device=places.device)
        else:
            scored = where.reshape(-1).nonzero_static(size=count).squeeze(1)
            places = places.index_select(0, scored)
        logits = model.lm_head(hidden.index_select(0, places)).float()
        return scored, logits.index_fill_(1, self.banned, -torch.inf)

    def view(
        self,
        hidden: Tensor,
        places: Tensor,
        tokens: Tensor,
        inside: Tensor,
        count: int,
        *,
        step: Tensor,
        progress: Tensor,
        key: Tensor,
        all_scored: bool,
        spacing: Tensor | None = None,
    ) -> BlockView:
        """Returns what a policy sees of blocks `tokens` [R, K], scored at `count` of their `places`; see `score`.

        Args:
            spacing: Keys that each row's draws take [R]; K when None.
        """
        masked = (tokens == self.mask_id) & inside
        scored, logits = self.score(self.model, hidden, places, inside if all_scored else masked, count)
        sampled = None
        if self.sampler.temperature > 0:
            owner, offset = scored // tokens.size(1), scored % tokens.size(1)
            number = key[owner] * (tokens.size(1) if spacing is None else spacing[owner])
            sampled = self.sampler.draw(logits, number + offset)
        return BlockView(logits, scored, tokens, masked, inside, step, progress, key, sampled)

    def denoise(self, view: BlockView, decision: Decision, terminator_last: bool) -> Step:
        """Returns what one step makes of the blocks."""
        return take_step(view, decision, self.mask_id, self.terminators, terminator_last)


@dataclass
class Step:
    """What a denoising step makes of blocks; R rows, K positions.

    Args:
        tokens: The blocks by now [R, K], the mask id where masked.
        masked: What is masked still [R, K].
        written: Positions that the step committed or edited [R, K].
        left: Masks left [R].
        end: Where the answer ends, or -1 [R].
        over: Whether the block is over [R].
    """

    tokens: Tensor
    masked: Tensor
    written: Tensor
    left: Tensor
    end: Tensor
    over: Tensor


def take_step(
    view: BlockView, decision: Decision, mask_id: int, terminators: tuple[int, ...], terminator_last: bool
) -> Step:
    """Applies a policy's decision, under the rules that hold for every policy; all shapes are constant."""
    tokens, masked, written = commit(view, decision, mask_id, terminators, terminator_last)
    return Step(tokens, masked, written, *outcome(decision, tokens, masked, view.changeable, terminators))


def commit(
    view: BlockView, decision: Decision, mask_id: int, terminators: tuple[int, ...], terminator_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the blocks' tokens, their masked positions and the written ones, each [R, K].

    A row that has masks, and of whose decision neither a commit nor a remasking is left, commits the position with the
    best of the decision's scores: without remasking a block takes at most K steps. With `terminator_last` a terminator
    is committed only once everything left of it is, nothing is committed right of one that the policy selected, and the
    commit that every row gets is not right of any predicted one: what stands there is not part of the answer. Where
    these rules leave no more commits than positions that the policy would mask again, nothing is masked again: the
    policy had counted on progress. A block that remasks without end is filled without remasking after
    `STEPS_WITH_REMASKING` steps per position.
    """
    tokens = view.predicted if decision.tokens is None else decision.tokens
    given, masked = view.tokens, view.masked
    commit = wanted = decision.commit & masked
    may_commit = masked  # what a row commits that would commit nothing
    if terminator_last:
        is_end = is_one_of(tokens, terminators) & masked
        sure_end = wanted & is_end
        waits = (masked ^ wanted).cumsum(1).bool()  # something left of it stays masked
        commit = wanted & (sure_end.cumsum(1) <= sure_end) & ~(sure_end & waits)
        may_commit = masked & ((is_end.cumsum(1) == 0) | (masked.cumsum(1) == 1))
    stuck = masked.any(1) & ~commit.any(1)
    remask = None
    if decision.remask is not None:
        in_vain = (commit != wanted).any(1) & (commit.sum(1) <= decision.remask.sum(1))
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
    after, masked = torch.where(written, tokens, given), masked ^ commit
    if remask is not None:
        remask = remask & view.changeable & ~commit
        after, masked = after.masked_fill(remask, mask_id), masked | remask
    return after, masked, written


def outcome(
    decision: Decision, tokens: Tensor, masked: Tensor, inside: Tensor, terminators: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns of each block after a step [R]: how many masks are left, where the answer ends or -1, if it is over.

    An answer ends at its first terminator with no mask left of it.
    """
    masks = masked.cumsum(1)
    left = masks[:, -1]
    ends, end = (is_one_of(tokens, terminators) & inside & (masks == 0)).max(1)
    end = torch.where(ends, end, -1)
    if decision.finish_row is not None:
        behind_last = inside.cumsum(1).argmax(1) + 1
        decided = torch.where(left > 0, masked.int().argmax(1), behind_last)
        end = torch.where(decision.finish_row & (end < 0), decided, end)
    over = (left == 0) | (end >= 0)
    return left, end, over if decision.keep_open is None else over & ~decision.keep_open


@dataclass(eq=False, kw_only=True)
class EngineSampler(DecodingSettings, Sampler):
    """A sampler that is its settings and the engine that decodes with them."""

    engine: ClassVar[type[Engine[Any]]]
    causal: ClassVar[bool] = False  # whether the models it decodes are autoregressive

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if model.config.causal and not self.causal:
            raise UserError("this checkpoint is autoregressive: decode it with dllm_var.sampling.AutoregressiveSampler")
        if self.causal and not model.config.causal:
            raise UserError("this checkpoint is bidirectional: decode it with dllm_var.sampling.BlockDiffusionSampler")
        if not model.config.causal and (model.config.mask_id is None or not model.config.terminator_ids):
            raise UserError("the model's config has no mask_id or terminator_ids: set both to decode by diffusion")
        return self.engine(self, model, prompts, request).run()
