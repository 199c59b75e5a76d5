"""Block diffusion with a plain KV cache: decode block by block until the terminator (arXiv 2510.24605, section 4)."""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.captured import Arena, reach_of
from dllm_var.sampling.configurable import Configurable
from dllm_var.sampling.denoising import DenoisingEngine
from dllm_var.sampling.engine import AnyRow, Batch, Engine, EngineSampler
from dllm_var.sampling.policies import BlockView, ConfidenceThreshold, UnmaskingPolicy
from dllm_var.sampling.policies.base import take_step


@dataclass(frozen=True)
class BlockStart:
    """A row at the place where its next block begins."""

    answer_length: int  # tokens of the answer so far
    limit: int  # longest answer, in tokens
    block_length: int  # the widest block allowed
    last_length: int = 0  # width of the row's last block, 0 at its first one
    last_steps: int = 0  # denoising steps that one took


class BlockLengthPolicy(Configurable, ABC):
    """Decides how wide each block is; the engine keeps it between 1 and the widest block allowed."""

    @abstractmethod
    def __call__(self, state: BlockStart) -> int:
        """Returns the width at which a row's next block opens."""


@dataclass(eq=False)
class ConstantSteps(BlockLengthPolicy):
    """Makes a block as wide as the last one's tokens per step would fill in a given number of steps.

    Where the text is easy blocks grow, and where it is hard no forward computes masks that would wait for long.

    Args:
        steps: Denoising steps that a block should take.
        min_length: Narrowest block.
    """

    steps: int = 4
    min_length: int = 4

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "steps", "min_length")

    def __call__(self, state: BlockStart) -> int:
        if not state.last_steps:
            return state.block_length
        return max(self.min_length, round(self.steps * state.last_length / state.last_steps))


class BlockEngine(DenoisingEngine[AnyRow]):
    """Rows `prompt | finished blocks | active block | masks`.

    The cache holds the first `cache.lengths` tokens of a row; its `pending` tokens are finished but not cached yet. One
    forward takes the pending tokens and the active block, keeps the keys and values of the former and predicts the
    latter, whether the pending ones are a prompt (prefill), a finished block (`joint_next`) or nothing.

    A block-causal model reads whole blocks of its own grid: beside the active block also what is finished of its block,
    such as the end of the prompt, and the masks up to its end. A shorter active block is a sub-block of it.
    """

    sampler: "BlockDiffusionSampler"
    constant_shape = True

    def __init__(
        self, sampler: "BlockDiffusionSampler", model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        blocks = sampler.blocks_per_forward  # as many may be pending beside them
        self.widest = model.config.grid or sampler.block_length  # tokens that a step reads at most of a row
        super().__init__(sampler, model, prompts, request, slack=2 * blocks * self.widest)
        self.cache = self.add_cache(model)
        assert sampler.policy is not None  # set by its `__post_init__`
        self.use_policy(sampler.policy, sampler.block_length, blocks)
        length = sampler.block_length
        self.offsets = self.lasting("offsets", lambda: torch.arange(length, device=self.device))

    def start(self, slot: int) -> None:
        """Opens the block behind the row's finished tokens, after the prompt and after each block."""
        row = self.rows[slot]
        finished = int(self.cache.lengths[slot]) + row.pending
        self.canvas[slot, finished:] = self.mask_id  # drafts, and tokens behind a terminator that was edited away
        row.width = row.left = self.next_width(slot, finished)
        row.steps = 0
        self.align(slot)

    def align(self, slot: int) -> None:
        """Makes the window of a block-causal model whole blocks; what is finished of the first one stays in it."""
        row, cached, grid = self.rows[slot], int(self.cache.lengths[slot]), self.model.config.grid
        if grid is not None:
            finished = cached + row.pending + row.shown
            row.shown, row.ahead = finished % grid, -(finished + row.width) % grid
            row.pending = finished - row.shown - cached

    def next_width(self, slot: int, finished: int) -> int:
        """Returns the width of a row's block behind its first `finished` tokens."""
        row, length, grid = self.rows[slot], self.sampler.block_length, self.model.config.grid
        width = length - finished % length if grid or self.sampler.grid == "absolute" else length
        width = min(width, row.prompt_length + row.limit - finished, grid - finished % grid if grid else width)
        if grid and self.model.config.token_shift and finished % grid == 0:
            width = min(width, 1)  # predicted where the block before ends, by the forward that stores it (Fast-dLLM v2)
        if self.sampler.block_length_policy is not None:
            done = finished - row.prompt_length
            wanted = self.sampler.block_length_policy(BlockStart(done, row.limit, length, row.width, row.steps))
            width = min(width, max(1, wanted))
        return width

    def in_sight(self, slot: int) -> tuple[int, list[int]]:
        row = self.rows[slot]
        finished = int(self.cache.lengths[slot]) + row.pending + row.shown
        return finished + row.width, [finished]

    def forward(self, batch: Batch[AnyRow]) -> None:
        if self.sampler.kv_commit == "alone":  # a finished block (or prompt) has a forward of its own
            batch.only_pending(batch.pending > 0)
        arena = self.arena_for(batch, self.widest)
        if arena is not None:
            self.settle(batch, self.step_of_constant_shape(batch, arena))
            return
        hidden = self.read_window(batch)
        self.has_read(batch)
        if batch.width.any():
            self.predict(batch, hidden)

    def has_read(self, batch: Batch[AnyRow]) -> None:
        for row in batch.rows:
            row.pending, row.nfe = 0, row.nfe + 1

    def read_window(self, batch: Batch[AnyRow]) -> Tensor:
        """Reads pending tokens and active blocks, and returns their hidden states [R, L, hidden]."""
        return self.read(batch, batch.pending + batch.window, batch.pending)

    def skipped(self, row: AnyRow) -> int:
        """Returns how many of the window's first tokens a forward takes from the cache instead."""
        return 0

    def predict(self, batch: Batch[AnyRow], hidden: Tensor) -> None:
        """Takes the active blocks one denoising step further; ends blocks and rows that are complete."""
        cells, nfe, view = self.view_blocks(batch, hidden)
        self.settle(batch, self.take_step(batch, cells, nfe, view).tolist())  # the one wait for the device

    def take_step(self, batch: Batch[AnyRow], cells: Tensor, nfe: Tensor, view: BlockView) -> Tensor:
        """Writes what the policy decides; returns what `settle` takes, [R, 3]."""
        decision = self.decide(batch, view)
        step = take_step(view, decision, self.mask_id, self.terminators, self.sampler.terminator_last)
        self.write(cells, step.tokens, step.written, nfe, self.wanted_log_probabilities(view, step.tokens))
        return torch.stack((step.left, step.end, step.over), dim=1)

    def step_of_constant_shape(self, batch: Batch[AnyRow], arena: Arena) -> list[Any]:
        """Takes all rows a step further, in shapes that depend on their number and the block length alone."""
        start, wide = self.cache.lengths.clone(), self.widest * (2 if batch.pending.any() else 1)
        self.cache.advance(batch.pending)
        self.has_read(batch)
        numbers, _ = self.number_blocks(batch, wide)
        table = torch.cat((torch.stack((start, batch.pending, batch.window), dim=1), numbers), dim=1)
        reach = reach_of(int(start.max()) + wide, self.capacity)
        constants = wide, reach, self.request.log_probabilities
        return arena.run(lambda given: self.denoise(batch, given, wide, reach), table, *constants)

    def denoise(self, batch: Batch[AnyRow], numbers: Tensor, wide: int, reach: int) -> Tensor:
        """Reads all rows' pending tokens and blocks, and takes the blocks a step further.

        All that differs from step to step is on the device: `numbers` [R, 12] are each row's cached tokens, its pending
        ones, those of its window, and what `number_blocks` says of its block.
        """
        start, pending, window = numbers[:, :1], numbers[:, 1:2], numbers[:, 2:3]
        slots = start + torch.arange(wide, device=self.device)
        last_seen = start + (pending + window).clamp_min(1) - 1  # an idle row reads one token
        if self.model.config.causal_context:  # pending tokens see their own left alone
            last_seen = torch.where(slots < start + pending, slots, last_seen)
        self.cache.open_constant(slots, last_seen, reach)
        hidden = self.model.hidden_states(self.canvas.gather(1, slots), cache=self.cache)
        return self.take_step(batch, *self.view_at(hidden, numbers[:, 3:], None))

    def blocks(self, row: AnyRow, width: int) -> list[tuple[int, int, int, int]]:
        """Returns the blocks that a forward predicts of a row; as many for every row, without positions where not real.

        Of each: where it begins behind the row's cached tokens, its width, its steps, and what tells its draws apart.
        """
        return [(row.shown, width, row.steps, 0)]

    def view_blocks(self, batch: Batch[AnyRow], hidden: Tensor) -> tuple[Tensor, Tensor, BlockView]:
        """Returns where N blocks are in the flat canvas [N, K], their rows' forwards [N], and what a policy sees."""
        numbers, count = self.number_blocks(batch, hidden.size(1))
        return self.view_at(hidden, numbers.to(self.device), count)

    def number_blocks(self, batch: Batch[AnyRow], wide: int) -> tuple[Tensor, int]:
        """Returns nine numbers of each block in a forward of `wide` tokens a row [N, 9], and how many are scored.

        The numbers are where the block begins in the flat canvas and in the flattened forward, its width and steps, the
        number of its draws, and its row's decoded tokens, limit, forwards and window.
        """
        lengths, found, count = self.cache.lengths.tolist(), [], 0
        counts = zip(batch.slots, batch.rows, batch.pending.tolist(), batch.width.tolist(), strict=True)
        for number, (slot, row, pending, width) in enumerate(counts):
            count += self.scored(row) if width else 0
            cached, window = lengths[slot], number * wide + pending - self.skipped(row)
            done, base = cached + row.shown - row.prompt_length, slot * self.capacity + cached
            for start, own, steps, apart in self.blocks(row, width):
                draw = row.key + row.nfe + apart
                told = (row.limit, row.nfe, row.window)
                found.append((base + start, window + start, own, steps, draw, done, *told))
        return torch.tensor(found), count

    def view_at(self, hidden: Tensor, numbers: Tensor, count: int | None) -> tuple[Tensor, Tensor, BlockView]:
        """Returns what `view_blocks` does, from the `numbers` of blocks; without a `count` all positions are scored."""
        cell, place, width, step, key, decoded, limit, nfe, window = numbers.T.contiguous().unbind()
        inside = self.offsets < width[:, None]
        # Positions behind a block's end stand in the canvas's last cell, which no row reaches.
        cells = torch.where(inside, cell[:, None] + self.offsets, self.canvas.numel() - 1)
        tokens = self.canvas.take(cells)
        # Without a count those are scored, too, and must at least stand in the forward.
        places = (place[:, None] + self.offsets).clamp_max(hidden[..., 0].numel() - 1)
        places = self.places(places, (tokens != self.mask_id) & inside, window)
        view = self.view(hidden, places, tokens, inside, count, step=step, progress=decoded / limit, key=key)
        return cells, nfe, view

    def places(self, places: Tensor, committed: Tensor, window: Tensor) -> Tensor:
        """Returns where in the flattened forward the positions that stand at `places` are predicted [N, K]."""
        return places

    def settle(self, batch: Batch[AnyRow], status: list[list[int]]) -> None:
        """Takes of each row how many masks are left, where it ends and if its block is over."""
        for slot, row, decoded, (left, end, over) in zip(
            batch.slots, batch.rows, batch.width.tolist(), status, strict=True
        ):
            if not decoded:
                continue
            row.left, row.steps = left, row.steps + 1
            if over:
                self.end_block(slot, end)
            elif end >= 0:  # kept open for edits: nothing behind the answer's end is decoded any more
                row.width, row.left = end + 1, 0
                self.align(slot)

    def end_block(self, slot: int, end: int) -> None:
        """Ends a row whose answer is complete, at `end` in its block unless that is -1; or begins its next block."""
        row, cached, grid = self.rows[slot], int(self.cache.lengths[slot]), self.model.config.grid
        begin = cached + row.shown
        finished = begin + row.width
        reason = "eos" if end >= 0 else "length" if finished - row.prompt_length >= row.limit else None
        if self.tell(slot, begin + end if end >= 0 else finished, reason):
            return
        if self.sampler.kv_commit == "last_step":  # what the last forward wrote is where it belongs
            self.cache.lengths[slot] = cached = finished - finished % (grid or 1)
        row.pending, row.shown = finished - cached, 0
        self.start(slot)


class CopyEngine(BlockEngine[AnyRow]):
    """Rows `prompt | finished blocks | active block | copy 1 | copy 2 ... | masks`.

    In a forward the copies, versions of the block, stand where the block stands: they repeat its rotary positions. In a
    block-causal model each also repeats what is beside the block in the window.
    """

    @abstractmethod
    def copies(self, row: AnyRow, width: int) -> int:
        """Returns how many copies of a row's block the next forward reads."""

    @abstractmethod
    def sees(self, copy: Tensor, positions: Tensor) -> Tensor:
        """Returns what each token of a window sees of the window [R, L, L].

        `copy` [R, L] is the copy each token belongs to, 0 for the block itself and what is left of it.
        """

    def read_window(self, batch: Batch[AnyRow]) -> Tensor:
        copies = [self.copies(row, width) for row, width in zip(batch.rows, batch.width.tolist(), strict=True)]
        if not any(copies):
            return super().read_window(batch)
        shown = torch.tensor([row.shown for row in batch.rows])
        counts = torch.stack((self.cache.lengths, batch.pending, batch.window, torch.tensor(copies), shown))
        longest = int((batch.pending + batch.window * (1 + counts[3])).max())
        start, pending, window, number, shown = counts.to(self.device)[:, :, None]
        place = torch.arange(longest, device=self.device)
        inside = place - pending  # [R, L], below 0 for what is left of the window
        copy = inside.div(window.clamp_min(1), rounding_mode="floor").clamp_min(0)
        positions = start + place - copy * window
        seen, real = self.sees(copy, positions), inside < window * (1 + number)
        if self.model.config.grid is not None:  # and pending tokens their own block and those before it
            seen = seen & (positions[:, None] <= self.cache.block_ends(positions)[:, :, None])
        if self.model.config.causal_context:  # pending tokens see their own left alone
            seen = seen & ~((inside < 0)[:, :, None] & (positions[:, None] > positions[:, :, None]))
        seen = (seen & real[:, None]) | ~real[:, :, None]  # padding sees everything, so no softmax is empty
        self.cache.open(longest, positions=positions, seen=seen)
        original = positions < start + pending + shown  # what is finished of the block is in the canvas once
        cells = torch.where(original, positions, start + place)
        hidden = self.model.hidden_states(self.canvas.gather(1, cells), cache=self.cache)
        self.cache.advance(batch.pending)
        return hidden


@dataclass(eq=False)
class BlockDiffusionSampler(EngineSampler):
    """Decodes block by block until each row's own terminator.

    Args:
        policy: Decides which masked positions become tokens at each step; `ConfidenceThreshold(0.9)` when None.
        block_length: Tokens decoded together.
        terminator_last: Commits a terminator only when everything left of it is, and nothing right of a sure one.
        kv_commit: How a finished block enters the cache: `joint_next` in one forward with the next block (the paper),
            `alone` in a forward of its own, `last_step` as its last denoising step left it (FreeCache, 2505.21467):
            what that step committed is remembered as masks, so accuracy suffers.
        grid: Where blocks start: at the `prompt`'s end (the paper) or at `absolute` multiples of the block length, as
            those of a block-causal model always do.
        block_length_policy: Decides how wide each block is, `block_length` being the widest; all are when None.
    """

    engine = cast("type[Engine[Any]]", BlockEngine)

    policy: UnmaskingPolicy | None = None
    _: KW_ONLY
    block_length: int = 64
    terminator_last: bool = True
    kv_commit: Literal["joint_next", "alone", "last_step"] = "joint_next"
    grid: Literal["prompt", "absolute"] = "prompt"
    block_length_policy: BlockLengthPolicy | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(1, math.inf, "block_length")
        self.policy = self.policy or ConfidenceThreshold()

    def check_model(self, model: Transformer) -> None:
        super().check_model(model)
        if model.config.token_shift and issubclass(self.engine, CopyEngine):
            raise UserError("this sampler decodes copies of a block, which a model with token_shift cannot do yet")
        if model.config.grid is not None and self.block_length > model.config.grid:
            raise UserError(
                f"sampler.block_length {self.block_length} is longer than the blocks of {model.config.grid} tokens in "
                f"which this checkpoint reads: set it to {model.config.grid}, or to less for sub-blocks"
            )

    @property
    def blocks_per_forward(self) -> int:
        """Most blocks of a row that a forward predicts."""
        return 1
