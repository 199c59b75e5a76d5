"""The engine of every sampler: slots, admission, caches, forwards and answers."""

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.kv_cache import KVCache, kept_rows
from dllm_var.model.transformer import Transformer
from dllm_var.sampling import captured
from dllm_var.sampling.base import Generation, Request, Sampler, special_ids
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.sampling.drawing import draw, request_keys
from dllm_var.sampling.policies.base import State

KEPT_BELOW = 0.75  # share of used slots under which the free ones are dropped, so that the copies cost little in all


@dataclass(eq=False)
class Row:
    """A row in flight, in one slot of the cache; index -1 is an idle slot, whose results nobody reads."""

    index: int = -1  # of its prompt
    key: int = 0  # number of its request, for draws
    prompt_length: int = 0
    limit: int = 1  # tokens of its longest answer
    began: float = 0.0  # when it was admitted, by `time.perf_counter`
    nfe: int = 0  # forward passes so far
    auxiliary_nfe: int = 0  # those of a second model
    drafted: int = 0  # tokens of drafts that the model has verified
    accepted: int = 0  # those of them that it confirmed
    pending: int = 0  # finished tokens that are not in the cache yet; they follow those that are
    shown: int = 0  # finished tokens behind them that each step reads again, as a block-causal model's block has them
    width: int = 0  # tokens of the active block, which follow these
    ahead: int = 0  # masks behind it that belong to the same block of a block-causal model
    steps: int = 0  # denoising steps that the block has had
    left: int = 0  # masked positions left in it

    @property
    def window(self) -> int:
        """Tokens that a step reads to take the active block further."""
        return self.shown + self.width + self.ahead


AnyRow = TypeVar("AnyRow", bound=Row)
T = TypeVar("T")


@dataclass
class Batch(Generic[AnyRow]):
    """The rows of one forward."""

    slots: list[int]
    rows: list[AnyRow]
    index: Tensor | None  # the slots as a tensor on the CPU; None when they are all
    pending: Tensor  # pending tokens that the forward takes of each row [R], on the CPU
    width: Tensor  # tokens of its active block that the forward takes of each row [R], on the CPU
    window: Tensor  # tokens that it reads for that [R], on the CPU: the active block and what is beside it

    def only_pending(self, rows: Tensor) -> None:
        """Leaves the active blocks of some rows [R] out of the forward."""
        self.width, self.window = self.width.masked_fill(rows, 0), self.window.masked_fill(rows, 0)


class Engine(ABC, Generic[AnyRow]):
    """The rows in flight, forward after forward, until every prompt has its answer.

    A subclass says what happens in a forward; it calls `tell` when a row gets further, which also ends rows. Canvas and
    caches have room for the longest prompt, the longest answer and `slack` tokens; when further prompts may `enter`
    while the engine runs, for `request.context` tokens and the slack.
    """

    row_class: type[AnyRow] = Row  # type: ignore[assignment]
    free_share: ClassVar[float] = 0.0  # share of the slots that must be free before waiting prompts enter
    constant_shape: ClassVar[bool] = False  # whether this very class has a step of constant shape, to be captured
    has_limits: ClassVar[bool] = True  # whether each row may have a limit of its own
    cache: KVCache

    def __init__(
        self, sampler: "EngineSampler", model: Transformer, prompts: list[list[int]], request: Request, slack: int = 0
    ) -> None:
        self.sampler, self.model, self.request = sampler, model, request
        self.limit = request.max_new_tokens or sampler.max_new_tokens
        config, self.device = model.config, model.embedding.weight.device
        self.mask_id = -1 if config.mask_id is None else config.mask_id
        self.terminators = tuple(config.terminator_ids or ())
        banned = [token for token in (*request.suppressed, config.mask_id) if token is not None]
        self.waiting: deque[int] = deque()
        self.prompts: dict[int, list[int]] = {}
        self.keys: dict[int, int] = {}
        self.limits: dict[int, int] = {}
        for index, (prompt, key) in enumerate(zip(prompts, request_keys(prompts), strict=True)):
            self.enter(index, prompt, key)
        self.longest_prompt = request.context or max(map(len, prompts), default=0)
        self.capacity = (request.context or self.longest_prompt + self.limit) + slack
        self.answers: dict[int, Generation] = {}
        self.arena: captured.Arena | None = None  # where steps are captured
        captures = (
            vars(type(self)).get("constant_shape", False) and sampler.can_be_captured and captured.can_capture(model)
        )
        slots = min(sampler.batch_size, len(prompts))
        if request.context is not None:  # `fit_rows` adds more, but not to captured steps
            slots = sampler.batch_size if captures else 1
        self.rows: list[AnyRow] = [self.row_class() for _ in range(slots)]
        if captures:
            self.capacity = -(-self.capacity // captured.CAPACITY_MULTIPLE) * captured.CAPACITY_MULTIPLE
            settings: Any = sampler_to_config(sampler)
            settings = object() if settings is None else repr(settings)  # of what cannot be described, no two are equal
            self.arena_key = (type(self), settings, slots, self.capacity, self.limit, tuple(banned))
            self.arena = captured.take_arena(model, self.arena_key)
            model.rotary.reserve(self.capacity, self.device)
            self.lasting("rotary", lambda: (model.rotary.cos, model.rotary.sin))  # a longer table may replace it
        elif self.device.type == "cpu":  # rows at powers of two would share few lines of the processor's cache
            self.capacity += self.capacity % 64 == 0
        self.banned = self.lasting("banned", lambda: torch.tensor(banned, dtype=torch.long, device=self.device))
        shape = (slots, self.capacity)
        # Tokens, then masks; the forward that committed each token; and its log-probability there, if that is wanted.
        self.canvas = self.lasting("canvas", lambda: torch.empty(shape, dtype=torch.long, device=self.device))
        self.canvas.fill_(self.mask_id)
        self.committed_at = self.lasting("committed_at", lambda: torch.empty_like(self.canvas)).zero_()
        known = self.lasting("log_probabilities", lambda: torch.empty_like(self.canvas, dtype=torch.float))
        self.log_probabilities = known.zero_()
        self.state: State = {}  # what is remembered for each slot, beside its tokens
        self.caches: list[KVCache] = []

    @abstractmethod
    def forward(self, batch: Batch[AnyRow]) -> None:
        """Runs the model once over newly filled slots, or over all of them."""

    def start(self, slot: int) -> None:
        """Prepares an admitted row."""

    def add_cache(self, model: Transformer, capacity: int | None = None) -> KVCache:
        """Returns a new cache for a model, whose slots are freed and dropped with the rows."""
        name, room = f"cache {len(self.caches)}", capacity or self.capacity
        cache = copy(self.lasting(name, lambda: model.new_cache(len(self.rows), room)))
        cache.lengths = torch.zeros_like(cache.lengths)
        self.caches.append(cache)
        return cache

    def lasting(self, name: str, make: Callable[[], T]) -> T:
        """Returns a new tensor or cache, or the one that the last engine of the same settings had by this name."""
        return make() if self.arena is None else self.arena.lasting(name, make)

    # -- rows ----------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row.index >= 0]

    @property
    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row.index < 0]

    def batch(self, slots: list[int] | None = None) -> Batch[AnyRow]:
        where = list(range(len(self.rows))) if slots is None else slots
        rows = [self.rows[slot] for slot in where]
        counts = torch.tensor([(row.pending, row.width, row.window) for row in rows]).unbind(1)
        return Batch(where, rows, None if slots is None else torch.tensor(slots), *counts)

    def run(self) -> list[Generation]:
        while self.waiting or self.active:
            needed = len(self.active) + len(self.waiting)
            if self.arena is not None:
                needed = captured.rows_kept(len(self.rows), needed)
            if needed <= KEPT_BELOW * len(self.rows):
                self.keep_rows(needed)
            self.advance()
        self.close()
        return [self.answers[index] for index in sorted(self.answers)]

    def advance(self) -> None:
        """Admits waiting prompts, and takes all rows one forward further."""
        self.admit()
        if self.active:
            self.run_forward(self.batch())

    def close(self) -> None:
        """Keeps what is captured for the next engine."""
        if self.arena is not None:
            captured.give_back(self.model, self.arena_key, self.arena)

    def enter(self, index: int, prompt: list[int], key: int, limit: int | None = None) -> None:
        """Adds a prompt to those that wait; `key` is the number of its draws, `limit` its longest answer."""
        self.prompts[index], self.keys[index], self.limits[index] = prompt, key, limit or self.limit
        self.waiting.append(index)

    def leave(self, index: int) -> None:
        """Drops a prompt that waits or is in flight, and forgets one that has its answer."""
        if index in self.waiting:
            self.waiting.remove(index)
        for slot, row in enumerate(self.rows):
            if row.index == index:
                self.free_slot(slot)
        for known in (self.prompts, self.keys, self.limits, self.answers):
            known.pop(index, None)

    def fit_rows(self) -> None:
        """Adds slots, to a power of two, so that all rows in flight and those that wait have one; drops idle ones."""
        if self.arena is not None:
            return
        before, needed = len(self.rows), len(self.active) + len(self.waiting)
        wanted = min(self.sampler.batch_size, 1 << max(needed - 1, 0).bit_length())
        if wanted > before:
            self.compact([*range(before), *[0] * (wanted - before)])
            for slot in range(before, len(self.rows)):
                self.free_slot(slot)
        elif 2 * needed <= before:
            self.keep_rows(max(needed, 1))

    def keep_rows(self, count: int) -> None:
        """Drops free slots until `count` are left."""
        self.compact(sorted([*self.active, *self.free[: count - len(self.active)]]))

    def free_slot(self, slot: int) -> None:
        self.rows[slot] = self.row_class()
        for cache in self.caches:
            cache.free(slot)

    def admit(self) -> None:
        """Gives free slots to waiting prompts and prefills them together."""
        slots = self.free[: len(self.waiting)]
        if not slots or len(self.free) < self.free_share * len(self.rows):
            return
        for slot in slots:
            index = self.waiting.popleft()
            length = len(self.prompts[index])
            self.canvas[slot] = self.mask_id
            self.canvas[slot, :length] = torch.tensor(self.prompts[index], device=self.device)
            self.committed_at[slot] = self.log_probabilities[slot] = 0
            told = (index, self.keys[index], length, self.limits[index], time.perf_counter())
            self.rows[slot] = self.row_class(*told, pending=length)
            self.start(slot)
        self.run_forward(self.batch(slots if len(slots) < len(self.rows) else None))

    def run_forward(self, batch: Batch[AnyRow]) -> None:
        """Runs a forward, and records what it did to the answers that are to be recorded."""
        self.forward(batch)
        for slot in batch.slots if self.request.records else ():
            row = self.rows[slot]
            if row.index >= 0 and self.request.wants_steps(row.index):  # it goes on
                start, (stop, blocks) = row.prompt_length, self.in_sight(slot)
                tokens = [None if token == self.mask_id else token for token in self.canvas[slot, start:stop].tolist()]
                known = self.log_probabilities_of(slot, len(tokens))
                self.request.stepped(row.index, row.nfe, tokens, known, [place - start for place in blocks])

    def in_sight(self, slot: int) -> tuple[int, list[int]]:
        """Returns the end of what the model reads or predicts of a row, and the places where its open blocks begin."""
        start = self.rows[slot].prompt_length
        return start + int((self.committed_at[slot, start:] > 0).sum()), []

    def compact(self, kept: list[int]) -> None:
        """Drops all slots but these, of which one may be copied."""
        slots, in_place = torch.tensor(kept), self.arena is not None
        for cache in self.caches:
            cache.keep(slots, in_place)
        slots = slots.to(self.device)
        self.canvas = kept_rows(self.canvas, slots, in_place)
        self.committed_at = kept_rows(self.committed_at, slots, in_place)
        self.log_probabilities = kept_rows(self.log_probabilities, slots, in_place)
        self.state = {name: kept_rows(value, slots, in_place) for name, value in self.state.items()}
        self.rows = [self.rows[slot] for slot in kept]

    def tell(self, slot: int, stop: int, reason: str | None) -> bool:
        """Streams a row's answer up to its place `stop`; returns whether a reason or a stop string ended the row."""
        row = self.rows[slot]
        if reason is None and not self.request.follows:
            return False
        tokens = self.canvas[slot, row.prompt_length : stop].tolist()
        if self.request.advanced(row.index, tokens, self.log_probabilities_of(slot, len(tokens))):
            reason = reason or "stop"
        if reason is not None:
            self.end(slot, tokens, reason)
        return reason is not None

    def end(self, slot: int, tokens: list[int], reason: str) -> None:
        row = self.rows[slot]
        answer = self.answers[row.index] = self.answer(slot, tokens, reason)
        self.free_slot(slot)
        self.request.finished(row.index, answer)

    def answer(self, slot: int, tokens: list[int], reason: str) -> Generation:
        row = self.rows[slot]
        return Generation(
            tokens=tokens,
            finish_reason=reason,
            nfe=row.nfe,
            seconds=time.perf_counter() - row.began,
            prompt_length=row.prompt_length,
            commit_steps=self.committed_at[slot, row.prompt_length : row.prompt_length + len(tokens)].tolist(),
            auxiliary_nfe=row.auxiliary_nfe,
            drafted=row.drafted,
            accepted=row.accepted,
            prompt=self.prompts[row.index][: row.prompt_length],
            log_probabilities=self.log_probabilities_of(slot, len(tokens)),
        )

    def log_probabilities_of(self, slot: int, count: int) -> list[float] | None:
        """Returns the log-probabilities of a row's first `count` new tokens; None when they are not wanted."""
        if not self.request.log_probabilities:
            return None
        start = self.rows[slot].prompt_length
        return self.log_probabilities[slot, start : start + count].tolist()

    # -- forwards ------------------------------------------------------------------------------------------------------

    def arena_for(self, batch: Batch[AnyRow], most: int) -> captured.Arena | None:
        """Returns the arena if a batch is for a step of constant shape: of all rows, of `most` pending tokens each."""
        return self.arena if batch.index is None and int(batch.pending.max()) <= most else None

    def read(
        self,
        batch: Batch[AnyRow],
        counts: Tensor,
        kept: Tensor,
        model: Transformer | None = None,
        cache: KVCache | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Reads each row's next `counts` [R] tokens of the canvas; returns their hidden states [R, L, hidden].

        The cache keeps the first `kept` [R] of them. `seen` says which of them each sees [R, L, L]; all when None.
        """
        model, cache = model or self.model, cache or self.cache
        longest = int(counts.max())
        text = kept if model.config.causal_context and bool(kept.any()) else None
        # An idle slot reads one token: anything but an empty softmax.
        cache.open(longest, None if longest == 1 else counts.clamp_min(1), batch.index, seen=seen, left_to_right=text)
        canvas = self.canvas if batch.index is None else self.canvas[batch.slots]
        positions = cache.positions if cache.capacity == self.capacity else cache.positions.clamp(max=self.capacity - 1)
        hidden = model.hidden_states(canvas.gather(1, positions), cache=cache)
        cache.advance(kept, batch.index)
        return hidden

    def score(
        self, model: Transformer, hidden: Tensor, places: Tensor, where: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Runs a model's output head at the `count` positions `where` [R, K] of blocks, and nowhere else.

        They stand at `places` [R, K] of the flattened forward `hidden` [R, L, hidden]. Returns their indices in the
        flattened blocks [M], and their logits [M, V] in float32: -inf for tokens that may not appear. The device need
        not be asked for the count, which the caller knows.
        """
        places, hidden = places.reshape(-1), hidden.flatten(0, 1)
        if count == places.numel():
            scored = torch.arange(count, device=places.device)
        else:
            scored = where.reshape(-1).nonzero_static(size=count).squeeze(1)
            places = places.index_select(0, scored)
        logits = model.lm_head(hidden.index_select(0, places)).float()
        return scored, logits.index_fill_(1, self.banned, -torch.inf)


@dataclass(eq=False, kw_only=True)
class EngineSampler(Sampler):
    """A sampler that is its settings, the fields of a dataclass, and the engine that decodes with them.

    Args:
        max_new_tokens: Longest answer in tokens; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        temperature: 0 takes the most likely token; otherwise logits + temperature x Gumbel noise (LLaDA's form).
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws; a row's draws do not depend on its batch.
    """

    # Without annotation: jsonargparse reads those of a base class by the names that the subclass's module knows.
    causal = False  # whether the models it decodes are autoregressive

    max_new_tokens: int = 512
    batch_size: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_words()
        self.check_range(1, math.inf, "max_new_tokens", "batch_size")
        self.check_range(0, math.inf, "temperature", "top_k")
        if not 0 < self.top_p <= 1:
            self.refuse("top_p", "in (0, 1]")

    @property
    @abstractmethod
    def engine(self) -> type[Engine[Any]]:
        """The engine's class; subclasses set it as a class attribute."""

    @property
    def can_be_captured(self) -> bool:
        """Whether a step of its engine may be replayed without running any Python; what others wrote may need it."""
        policy = getattr(self, "policy", None)
        return self.is_own() and (policy is None or policy.is_own() or policy.can_be_captured)

    def draw(self, logits: Tensor, keys: Tensor) -> Tensor:
        """Returns one drawn token per position [M], from its logits [M, V] and the number of its draw [M]."""
        return draw(logits, keys, self.temperature, self.top_k, self.top_p, self.seed)

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        self.check_model(model)
        return self.engine(self, model, prompts, request).run()

    def check_model(self, model: Transformer) -> None:
        """Raises UserError for a model of the wrong kind."""
        if model.config.causal and not self.causal:
            raise UserError("this checkpoint is autoregressive: decode it with dllm_var.sampling.AutoregressiveSampler")
        if self.causal and not model.config.causal:
            raise UserError("this checkpoint is bidirectional: decode it with dllm_var.sampling.BlockDiffusionSampler")
        if not self.causal:
            special_ids(model)
