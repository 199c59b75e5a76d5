"""Introspective strides: a causal model drafts tokens at masks and verifies them as text (I-DLM, arXiv 2604.11035)."""

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.attention import AttentionRule
from dllm_var.objectives.autoregressive import Autoregressive, next_token_targets
from dllm_var.objectives.base import Batch, KeyedNoise, NoisedBatch, Objective, columns_where, span_starts
from dllm_var.objectives.block_diffusion import after


class IntrospectiveStride(Objective):
    """Predicts each supervised token twice: from the text left of it, and from masks behind an earlier place.

    The model reads `[clean | masks]` from left to right. A copy of the answers consists of nothing but masks, cut into
    strides: a mask sees the clean text left of its stride, and the masks of its stride left of it. Like a clean token
    it predicts the token right of it. So the model learns to draft the tokens behind any place of an answer, and to
    verify such drafts, which is how `StridedSampler` decodes. Half of the answers begin with a whole stride, as
    decoding does behind a prompt. The first stride of the others is cut at a random place, so that tokens are drafted
    from every distance. The loss is the mean cross-entropy of both copies.

    Two things differ from the released code. There the number of masks grows in phases of the whole training; here it
    grows with the number of the row, so that a row's noise stays a pure function of (seed, row). There the weight of
    the clean copy is 0.2 or follows from the two losses; here it is 1, so that the model goes on learning to verify.

    Args:
        stride: Tokens that the sampler hopes to accept in a forward: its `stride`. One of them is predicted from the
            text, the others from `stride - 1` masks.
        share: Share of the strides that are read in a step, chosen at random. Where answers are long, fewer cost much
            less, and the clean copy is trained for more steps in the same time.
        growth_rows: Rows of the training over which the stride grows evenly from 2 to `stride`; 0 for none.
        clean_weight: Weight of each clean token's loss, beside 1 for each mask's. 0 leaves it out, as is right where
            only adapters for masks are trained.
    """

    causal = True
    document_attention_only = True

    def __init__(self, stride: int = 8, share: float = 1.0, growth_rows: int = 0, clean_weight: float = 1.0) -> None:
        if stride < 2 or not 0 < share <= 1 or growth_rows < 0 or clean_weight < 0:
            raise UserError(
                "objective IntrospectiveStride needs stride >= 2, share in (0, 1], growth_rows >= 0 and "
                f"clean_weight >= 0, got {stride}, {share}, {growth_rows} and {clean_weight}"
            )
        self.stride, self.share, self.growth_rows, self.clean_weight = stride, share, growth_rows, clean_weight

    def likelihood(self) -> Objective:
        """The next-token loss of the text, which is the exact likelihood."""
        return Autoregressive().bind(self.specials())

    def corrupt(self, batch: Batch, generator: KeyedNoise) -> NoisedBatch:
        tokens, segments = batch["input_ids"], batch["segment_ids"]
        columns = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        begin = self._stride_starts(batch, columns, generator)
        masked = batch["supervised"]
        if self.share < 1:
            chosen = generator.uniform(batch["row"], tokens.size(1), stream=2) < self.share
            masked = masked & chosen.gather(1, begin)
        column, exists = columns_where(masked)
        targets, scored = next_token_targets(batch)
        read_clean = scored if self.clean_weight else torch.zeros_like(scored)
        input_ids = after(tokens, torch.full_like(column, self.specials().mask_id))
        loss_mask = after(read_clean, scored.gather(1, column) & exists)
        ones = torch.ones_like(input_ids, dtype=torch.float32)
        weights = None
        if self.clean_weight not in (0, 1):
            weights = torch.where(
                torch.arange(ones.size(1), device=ones.device) < tokens.size(1), self.clean_weight, ones
            )
        rule = stride_rule(
            after(columns, column),
            after(columns, begin.gather(1, column) - 1),
            after(segments, segments.gather(1, column).masked_fill(~exists, -2)),  # seen by no token that exists
            input_ids,
            tokens.size(1),
        )
        return NoisedBatch(
            input_ids=input_ids,
            targets=after(targets, targets.gather(1, column)),
            loss_mask=loss_mask,
            mask_rate=ones,
            weights=weights,
            normaliser=loss_mask.sum(),
            position_ids=after(batch["position_ids"], batch["position_ids"].gather(1, column)),
            attention_rule=rule,
        )

    def _stride_starts(self, batch: Batch, columns: Tensor, generator: KeyedNoise) -> Tensor:
        """Draws where strides begin; returns the column of the first mask of each supervised token's stride [B, L]."""
        masks = self.strides(batch["row"])[:, None] - 1  # masks of a stride in each row [B, 1]
        start = span_starts(batch)
        uniform = generator.uniform(batch["row"], columns.size(1), stream=1).gather(1, start)
        phase = ((2 * uniform - 1).clamp_min(0) * masks).long()  # 0 for half of the spans
        return torch.maximum(columns - (columns - start + phase) % masks, start)

    def strides(self, rows: Tensor) -> Tensor:
        """Returns the stride at which rows of these numbers are trained [B]."""
        if not self.growth_rows:
            return torch.full_like(rows, self.stride)
        grown = rows * (self.stride - 1) // self.growth_rows
        return (2 + grown).clamp_max(self.stride)


def stride_rule(column: Tensor, anchor: Tensor, segment: Tensor, tokens: Tensor, clean: int) -> AttentionRule:
    """Returns which of the `clean` tokens and the masks behind them sees which.

    Each stands for a `column` [B, S] of the text; its clean context ends at its `anchor` [B, S], which for a clean
    token is its own column. All masks behind one anchor are a stride.
    """

    def sees(
        column: Tensor, anchor: Tensor, segment: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        its, own = column[row, key], anchor[row, query]
        in_stride = (key >= clean) & (query >= clean) & (anchor[row, key] == own) & (its <= column[row, query])
        return (((key < clean) & (its <= own)) | in_stride) & (segment[row, query] == segment[row, key])

    return AttentionRule(sees, tokens, column, anchor, segment)
