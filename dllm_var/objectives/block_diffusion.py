"""Block diffusion: blocks are denoised behind clean text, as a sampler with a cache meets them (arXiv 2503.09573)."""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.attention import AttentionRule
from dllm_var.objectives.autoregressive import next_token_targets
from dllm_var.objectives.base import (
    SMALLEST_RATE,
    Batch,
    Certainty,
    KeyedNoise,
    NoisedBatch,
    Objective,
    check_rates,
    columns_where,
    golden_fractions,
    is_one_of,
    span_starts,
)

CLEAN, FIRST_COPY = 0, 1  # which copy a token belongs to


class Blocks(NamedTuple):
    """The supervised blocks of a batch; N is the most that a row has, K their length."""

    number: Tensor  # block of each clean token [B, L]: counts up along the row, an unsupervised span being one block
    group: Tensor  # number of the block that begins each clean token's group [B, L]: of blocks that see each other
    start: Tensor  # column where the answer starts in each supervised block [B, N]
    offset: Tensor  # tokens of the block that are left of it, such as the end of a prompt [B, N]
    inside: Tensor  # which of the K places they have, as rows have fewer blocks or shorter ones [B, N, K]
    column: Tensor  # column of each of their tokens [B, N, K]; a column inside the row also where there is no token
    answer: Tensor  # which of these tokens belong to the answer; those behind its end do not [B, N, K]
    shown: Tensor  # which are left of it, and never masked [B, N, K]
    of_grid: Tensor | None = None  # number of each clean token's block of the grid [B, L], where there is one

    @property
    def clean(self) -> Tensor:
        """The number by which clean tokens see each other [B, L]: none sees a higher one."""
        return self.number if self.of_grid is None else self.of_grid

    @property
    def hidden(self) -> Tensor:
        """The number from which on clean tokens are hidden from the copies of a token's block [B, L]."""
        return self.group if self.of_grid is None else self.of_grid

    def take(self, values: Tensor) -> Tensor:
        """Returns `values` [B, L] at the blocks' tokens [B, N, K]."""
        return values.gather(1, self.column.flatten(1)).view(self.column.shape)


class BlockDiffusion(Certainty):
    """Masks tokens of every block of an answer; a block sees itself and the clean text before it, nothing behind it.

    The model reads `[clean | copies of the answers' blocks]` at once (BD3-LM, arXiv 2503.09573, section 3). A clean
    token sees its own block and those before it; a copied token sees its own copy of its block, and the clean blocks
    before. Blocks are counted from each answer's start, and the prompt is one block, because that is how
    `BlockDiffusionSampler` decodes. If `block_causal`, they are counted from the start of the text instead.
    Masks fill what an answer leaves free in its last block. Each block has a mask rate t ~ U(t_min, t_max) of its own;
    terminators are always masked. The loss is the mean cross-entropy over the masked tokens of all copies.

    Args:
        block_length: The sampler's `block_length`.
        kv_commit: The sampler's `kv_commit`. With `joint_next` clean tokens also see the next block as nothing but
            masks. That takes one more copy, which is scored too: it is the first step of every block. It makes no
            difference with `causal_context` or `block_causal`, whose clean tokens see nothing behind them.
        t_min: Smallest mask rate.
        t_max: Largest mask rate.
        whole_share: Fraction of the blocks whose mask rate is 1 instead: all masks, as in the sampler's first step.
        causal_context: Clean tokens see only their left, as in an autoregressive model (NBDiff, arXiv 2512.06776); the
            model remembers it for its samplers.
        autoregressive_weight: Weight of each clean token's prediction of the next one, beside the masked tokens' (0.5
            in NBDiff); needs `causal_context`.
        token_shift: Predicts each token at the position left of it, as an autoregressive model does (Fast-dLLM v2), the
            first of a block at the clean token before; sets `transformer.token_shift`. The first token of a text
            without prompt is then not predicted.
        complementary: Adds to each copy one that masks what it shows, so that every token is predicted (Fast-dLLM v2,
            arXiv 2509.26328, section 3).
        right_heavy: Masks as many tokens, but further right: offset i of a block is drawn with weight
            exp(right_heavy * (1 - t) * i) (Efficient-DLM, arXiv 2512.14067). 0 draws all offsets evenly.
        exact_count: Masks round(t * K) of a block's K answer tokens (Efficient-DLM), not each with probability t.
        certainty: Weight of the entropy of predictions that are already right (dParallel, arXiv 2509.26488, section 3).
        certainty_temperature: Divides the logits before that entropy.
        start_length: Block length of the first row when it grows.
        growth_rows: Rows of the training over which the block length grows evenly from `start_length` to `block_length`
            (1 to 32 in NBDiff, 16 to 32 in d3LLM); 0 for none. Validation has the full length.
        block_causal: Counts blocks from the start of each text, prompt included, and lets a prompt's token see its own
            block and those before it (SDAR, LLaDA 2.0, Fast-dLLM v2, dllm's BD3LM); the model remembers it. The end of
            a prompt that shares a block with the answer is shown in its copy. What follows an answer in its block, such
            as a user's next turn, is masked there and not scored, as it is when the block is decoded; the released
            codes show it.
    """

    document_attention_only = True
    even: ClassVar[bool] = False  # whether all tokens are masked alike, and nothing else is scored

    def __init__(
        self,
        block_length: int = 32,
        kv_commit: Literal["joint_next", "alone"] = "joint_next",
        t_min: float = 0.1,
        t_max: float = 1.0,
        whole_share: float = 0.0,
        causal_context: bool = False,
        autoregressive_weight: float = 0.0,
        token_shift: bool = False,
        complementary: bool = False,
        right_heavy: float = 0.0,
        exact_count: bool = False,
        certainty: float = 0.0,
        certainty_temperature: float = 0.5,
        start_length: int = 1,
        growth_rows: int = 0,
        block_causal: bool = False,
    ) -> None:
        super().__init__(certainty, certainty_temperature)
        name = type(self).__name__
        check_rates(name, t_min, t_max)
        if not 1 <= start_length <= block_length or growth_rows < 0 or right_heavy < 0 or not 0 <= whole_share < 1:
            raise UserError(
                f"objective {name} needs 1 <= start_length <= block_length, growth_rows >= 0, right_heavy >= 0 and "
                f"0 <= whole_share < 1, got {start_length}, {block_length}, {growth_rows}, {right_heavy}, {whole_share}"
            )
        if autoregressive_weight < 0 or (autoregressive_weight > 0 and not causal_context):
            raise UserError(
                f"objective {name} autoregressive_weight {autoregressive_weight} must not be below 0; above "
                "0 it needs causal_context: what sees the next token cannot learn to predict it"
            )
        if block_causal and causal_context:
            raise UserError(f"objective {name} takes block_causal or causal_context, not both: leave one out")
        self.block_length, self.kv_commit, self.grid = block_length, kv_commit, block_length if block_causal else None
        self.t_min, self.t_max, self.whole_share = t_min, t_max, whole_share
        self.causal_context, self.autoregressive_weight = causal_context, autoregressive_weight
        self.token_shift, self.complementary = token_shift, complementary
        self.right_heavy, self.exact_count = right_heavy, exact_count
        self.start_length, self.growth_rows = start_length, growth_rows

    def likelihood(self) -> Objective:
        """The same blocks and contexts, with rates and weights that bound the likelihood (BD3-LM, equation 8)."""
        return EvenBlockMasking(self).bind(self.specials())

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        lengths = self.block_lengths(batch["row"]) if self.growth_rows else self.block_length
        blocks = find_blocks(batch, lengths, self.grid is not None)
        rate = self.rates(batch, blocks, generator)[:, :, None].expand_as(blocks.column)
        masked = self._draw_masked(batch, blocks, rate, generator)
        ends = torch.zeros_like(masked) if self.even else self.terminators(batch, blocks)
        copies = [(masked | ends, rate)]
        if self.complementary:
            copies.append(((blocks.answer & ~masked) | ends, 1 - rate))
        if self.clean_sees_masks:  # the first copy is the one that clean tokens see
            copies.insert(0, (blocks.answer, torch.ones_like(rate)))
        return self.lay_out(batch, blocks, *(torch.stack(parts, dim=1) for parts in zip(*copies, strict=True)))

    def block_lengths(self, rows: Tensor) -> Tensor:
        """Returns the block length at which rows of these numbers are trained while it grows [B]."""
        grown = rows * (self.block_length - self.start_length + 1) // self.growth_rows
        return (self.start_length + grown).clamp_max(self.block_length)

    def terminators(self, batch: Batch, blocks: Blocks) -> Tensor:
        """Returns which of the blocks' tokens end an answer [B, N, K]."""
        return is_one_of(blocks.take(batch["input_ids"]), self.specials().terminator_ids) & blocks.answer

    @property
    def clean_sees_masks(self) -> bool:
        """Whether clean tokens see the block behind theirs as masks."""
        return self.kv_commit == "joint_next" and not self.causal_context and self.grid is None

    def rates(self, batch: Batch, blocks: Blocks, generator: KeyedNoise) -> Tensor:
        """Draws the mask rate of each block [B, N], keyed by the column where it starts."""
        uniform = generator.uniform(batch["row"], batch["input_ids"].size(1), stream=1).gather(1, blocks.start)
        rate = self.t_min + (self.t_max - self.t_min) * uniform / (1 - self.whole_share)
        return torch.where(uniform < 1 - self.whole_share, rate, 1.0)

    def _draw_masked(self, batch: Batch, blocks: Blocks, rate: Tensor, generator: KeyedNoise) -> Tensor:
        """Draws which answer tokens of the blocks are masked [B, N, K]."""
        rows, length = batch["row"], batch["input_ids"].size(1)
        if self.exact_count:
            count = (rate[..., :1] * blocks.answer.sum(dim=-1, keepdim=True)).round()
        else:
            masked = (blocks.take(generator.uniform(rows, length, stream=2)) < rate) & blocks.answer
            if self.right_heavy == 0:
                return masked
            count = masked.sum(dim=-1, keepdim=True)
        # The tokens with the largest log weight + Gumbel noise are a draw without replacement.
        uniform = blocks.take(generator.uniform(rows, length, stream=3)).clamp_min(1e-7)
        offset = torch.arange(rate.size(-1), device=rate.device)
        keys = self.right_heavy * (1 - rate) * offset - (-uniform.log()).log()
        keys = keys.masked_fill(~blocks.answer, -torch.inf)
        place = keys.argsort(dim=-1, descending=True).argsort(dim=-1)
        return (place < count) & blocks.answer

    def lay_out(self, batch: Batch, blocks: Blocks, masked: Tensor, rate: Tensor) -> NoisedBatch:
        """Returns the batch as `[clean | copy | copy ...]`, of S = L + C * N * K tokens.

        The C copies mask the tokens `masked`, which had the probability `rate` of it, each [B, C, N, K].
        """
        tokens, segments = batch["input_ids"], batch["segment_ids"]
        answers = blocks.take(tokens)[:, None].expand_as(masked)
        read = torch.where((blocks.shown | blocks.answer)[:, None] & ~masked, answers, self.specials().mask_id)
        offsets = torch.arange(masked.size(-1), device=tokens.device)
        positions = (batch["position_ids"].gather(1, blocks.start) - blocks.offset)[:, None, :, None] + offsets
        scored = masked.clone()
        if self.even and self.clean_sees_masks:
            scored[:, 0] = False  # the copy that is nothing but masks
        next_token, clean_scored = next_token_targets(batch)
        weight = torch.full(tokens.shape, self.autoregressive_weight, device=tokens.device)
        if self.token_shift:  # what a group predicts moves one to the left, its first token to the clean one before it
            group = blocks.group.gather(1, blocks.start)
            goes_on = F.pad(group[:, 1:] == group[:, :-1], (0, 1))[:, None, :, None]
            answers, scored, rate = (
                torch.cat((values[..., 1:], F.pad(values[:, :, 1:, :1], (0, 0, 0, 1)) * goes_on), dim=-1)
                for values in (answers, scored, rate)
            )
            before_group = clean_scored & (blocks.hidden != blocks.hidden.roll(-1, dims=1))
            weight = weight.masked_fill(before_group, 1.0)
        loss_mask = after(clean_scored & (weight > 0), scored)
        input_ids = after(tokens, read)
        return NoisedBatch(
            input_ids=input_ids,
            targets=after(next_token, answers),
            loss_mask=loss_mask,
            mask_rate=after(torch.ones_like(weight), rate),
            weights=None if self.autoregressive_weight in (0, 1) else after(weight, torch.ones_like(rate)),
            normaliser=loss_mask.sum(),
            position_ids=after(batch["position_ids"], positions.expand_as(masked)),
            attention_rule=self._attention_rule(input_ids, segments, blocks, masked.shape),
        )

    def _attention_rule(self, tokens: Tensor, segments: Tensor, blocks: Blocks, copied: torch.Size) -> AttentionRule:
        """Returns which token of `[clean | copies]` sees which; `copied` is the shape [B, C, N, K] of the copies."""
        # A place without a block sees itself, so that no softmax is empty, and no other, so that few tiles are read.
        nowhere = -1 - torch.arange(blocks.inside[0].numel(), device=tokens.device).view(blocks.inside.shape[1:])
        number, group, hidden = (
            torch.where(blocks.inside, values.gather(1, blocks.start)[:, :, None], nowhere)[:, None].expand(copied)
            for values in (blocks.number, blocks.group, blocks.hidden)
        )
        block, first = after(blocks.clean, number), after(blocks.clean, group)
        end = after(blocks.clean + 1, hidden)  # of the clean blocks that a token sees
        segment = after(segments, segments.gather(1, blocks.start)[:, None, :, None].expand(copied))
        copies = torch.arange(FIRST_COPY, FIRST_COPY + copied[1], device=tokens.device)
        copy = after(torch.full_like(segments, CLEAN), copies[:, None, None].expand(copied))[0]
        sees_masks, causal_context = self.clean_sees_masks, self.causal_context

        def sees(
            block: Tensor,
            first: Tensor,
            end: Tensor,
            segment: Tensor,
            copy: Tensor,
            row: Tensor,
            head: Tensor,
            query: Tensor,
            key: Tensor,
        ) -> Tensor:
            own, its, clean = block[row, query], block[row, key], copy[key] == CLEAN
            in_group = (first[row, query] <= its) & (its <= own) & (copy[query] == copy[key])
            seen = in_group | ((its < end[row, query]) & clean)
            if sees_masks:
                seen = seen | ((own + 1 == its) & (copy[query] == CLEAN) & (copy[key] == FIRST_COPY))
            if causal_context:
                seen = torch.where((copy[query] == CLEAN) & clean, query >= key, seen)
            return seen & (segment[row, query] == segment[row, key])

        return AttentionRule(sees, tokens, block, first, end, segment, copy)


class EvenBlockMasking(BlockDiffusion):
    """Masks every supervised token of an objective's blocks with a rate that walks evenly over (0, 1).

    Losses are weighted by 1 / rate.
    """

    even = True

    def __init__(self, objective: BlockDiffusion) -> None:
        super().__init__(objective.block_length, objective.kv_commit, SMALLEST_RATE)
        self.grid = objective.grid
        self.causal_context, self.token_shift = objective.causal_context, objective.token_shift

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        noised = super().corrupt(batch, generator)
        noised.weights = 1 / noised.mask_rate.clamp_min(self.t_min)
        noised.normaliser = batch["supervised"].sum()
        return noised

    def rates(self, batch: Batch, blocks: Blocks, generator: KeyedNoise) -> Tensor:
        first = golden_fractions(batch["row"])[:, None]
        even = (first + golden_fractions(torch.arange(blocks.start.size(1), device=first.device))) % 1
        return self.t_min + (1 - self.t_min) * even


def after(clean: Tensor, copies: Tensor) -> Tensor:
    """Returns values of the clean tokens [B, L], and behind them those of copies [B, ...], as [B, S]."""
    return torch.cat([clean, copies.flatten(1)], dim=1)


def find_blocks(batch: Batch, block_length: int | Tensor, on_grid: bool = False) -> Blocks:
    """Finds the blocks of every supervised span, counted from where it starts, each a group of its own.

    `on_grid` counts them from where its text starts: a block that the span shares with what is before it is shorter.
    `block_length` is that of all rows, or of each [B]; a GPU is then waited for to find the longest.
    """
    supervised, position = batch["supervised"], batch["position_ids"]
    length, longest = supervised.size(1), block_length if isinstance(block_length, int) else int(block_length.max())
    lengths = block_length if isinstance(block_length, int) else block_length[:, None]
    place = torch.arange(length, device=supervised.device) - span_starts(batch)  # in its span
    grid = position % lengths if on_grid else place % lengths  # in its block
    begins = (place == 0) | (supervised & (grid == 0))
    number = begins.cumsum(dim=1)
    start, exists = columns_where(begins & supervised)
    offset = grid.gather(1, start)
    offsets = torch.arange(longest, device=start.device)
    inside = exists[:, :, None] & (offsets < lengths).view(-1, 1, len(offsets))
    column = (start - offset)[:, :, None] + offsets
    shown = inside & (offsets < offset[:, :, None])
    answer = inside & ~shown & (column < length)
    of_grid = (grid == 0).cumsum(dim=1) if on_grid else None
    blocks = Blocks(number, number, start, offset, inside, column.clamp(0, length - 1), answer, shown, of_grid)
    return blocks._replace(answer=answer & (blocks.take(number) == number.gather(1, start)[:, :, None]))
