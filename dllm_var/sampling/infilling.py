"""Infilling: tokens for the gaps of a text, with all the rest of it in view on both sides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Generation, OnAnswer, Request, special_ids
from dllm_var.sampling.engine import Batch, Engine, EngineSampler, Row
from dllm_var.sampling.policies import ConfidenceThreshold, UnmaskingPolicy
from dllm_var.sampling.policies.base import take_step

if TYPE_CHECKING:
    from dllm_var.text.tokenizer import Tokenizer


@dataclass
class Infilling(Generation):
    """One text with its gaps filled; the finish reason is `filled`.

    `tokens` is the whole text without its prompt; `commit_steps` is 0 for given tokens.

    Args:
        gaps: The tokens of each gap, from left to right.
    """

    gaps: list[list[int]] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.gaps))


def infill(
    model: Any,
    texts: Sequence[Sequence[int]],
    policy: UnmaskingPolicy | None = None,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    block_length: int | None = None,
    tokenizer: Tokenizer | None = None,
    suppress: Sequence[int] = (),
    on_answer: OnAnswer | None = None,
    **settings: Any,
) -> list[Infilling]:
    """Fills the gaps of texts by denoising them alone, all gaps of a text together.

    Every forward reads prompt and text whole. Given tokens stay as they are; terminators and the mask are never put in
    a gap.

    Args:
        model: A `Transformer`, or a module that holds one as `.transformer` (a `DiffusionLM`).
        texts: Token ids with the mask id wherever a token is wanted.
        policy: Decides which gap positions become tokens at each step: it sees a text's gaps, one behind the other, as
            its block. `ConfidenceThreshold(0.9)` when None.
        prompts: What stands before each text; nothing when None.
        block_length: Shows a text's end as block diffusion does, by masks behind it up to the end of its last block; at
            least one, where the terminator would be. Nothing is behind it when None.
        tokenizer: Decodes the texts.
        suppress: Further token ids that are never produced.
        on_answer: Called with (index, infilling) once for each text, when it is full.
        settings: `batch_size`, `temperature`, `top_k`, `top_p` and `seed`, as those of every sampler.

    Raises:
        UserError: When the model is causal, a text has no gap, or a setting is out of range.
    """
    transformer = getattr(model, "transformer", model)
    if block_length is not None and block_length < 1:
        raise UserError(f"block_length must be at least 1, got {block_length}")
    mask_id, terminators = special_ids(transformer)
    before = [[]] * len(texts) if prompts is None else prompts
    for index, text in enumerate(texts):
        if mask_id not in text:
            raise UserError(f"text {index} has no gap: put one where tokens are wanted")
    spans = [range(len(prompt), len(prompt) + len(text)) for prompt, text in zip(before, texts, strict=True)]
    behind = [0 if block_length is None else block_length - len(text) % block_length for text in texts]
    rows = [[*prompt, *text, *[mask_id] * n] for prompt, text, n in zip(before, texts, behind, strict=True)]
    filler = _GapFiller(spans=spans, policy=policy or ConfidenceThreshold(), **settings)
    filled = filler.generate(model, rows, tokenizer=tokenizer, suppress=[*suppress, *terminators], on_answer=on_answer)
    return [answer for answer in filled if isinstance(answer, Infilling)]


@dataclass(eq=False)
class GapRow(Row):
    """A row `prompt | text | masks` and the places of its gaps' positions."""

    places: list[int] = field(default_factory=list)


class GapEngine(Engine[GapRow]):
    """Rows without a cache, each of whose gaps, one behind the other, are a block."""

    sampler: _GapFiller
    row_class = GapRow

    def __init__(self, sampler: _GapFiller, model: Transformer, prompts: list[list[int]], request: Request) -> None:
        super().__init__(sampler, model, prompts, request)
        self.places = [
            [place for place in span if prompt[place] == self.mask_id]
            for span, prompt in zip(sampler.spans, prompts, strict=True)
        ]
        widest = max(map(len, self.places), default=0)
        # [R, K] in the row: what is no gap is the canvas's last column, which no text reaches.
        self.gaps = torch.full((len(self.rows), widest), self.capacity - 1, device=self.device)
        self.use_policy(sampler.policy, widest)

    def start(self, slot: int) -> None:
        row = self.rows[slot]
        row.places = self.places[row.index]
        row.left = row.width = len(row.places)
        self.gaps[slot, row.width :] = self.capacity - 1
        self.gaps[slot, : row.width] = torch.tensor(row.places, device=self.device)

    def forward(self, batch: Batch[GapRow]) -> None:
        """Reads all texts whole and denoises their gaps by one step."""
        batch = batch if batch.index is None else self.batch()
        for row in batch.rows:
            row.nfe += 1
        nfe, lengths, key, width = torch.tensor(
            [(row.nfe, row.prompt_length, row.key + row.nfe, row.width) for row in batch.rows], device=self.device
        ).unbind(1)
        longest = max(row.prompt_length for row in batch.rows)
        padding = torch.arange(longest, device=self.device) >= lengths[:, None]
        uneven = any(row.prompt_length < longest for row in batch.rows)
        segments = padding.long() if uneven else None  # padding is a segment of its own
        hidden = self.model.hidden_states(self.canvas[:, :longest], segment_ids=segments)
        row_number = torch.arange(len(batch.rows), device=self.device)[:, None]
        cells = row_number * self.capacity + self.gaps
        view = self.view(
            hidden,
            row_number * longest + self.gaps,
            self.canvas.take(cells),
            torch.arange(self.gaps.size(1), device=self.device) < width[:, None],
            sum(map(self.scored, batch.rows)),
            step=nfe - 1,
            progress=torch.zeros_like(nfe, dtype=torch.float),
            key=key,
            spacing=lengths,  # a draw must not depend on the widest row
        )
        decision = self.decide(batch, view)
        decision.finish_row = None  # a gap is filled whole
        step = take_step(view, decision, self.mask_id, self.terminators, terminator_last=False)
        self.write(cells, step.tokens, step.written, nfe)
        for slot, (left, over) in enumerate(torch.stack((step.left, step.over)).T.tolist()):
            row = self.rows[slot]
            row.left = left
            if over and row.index >= 0:
                span = self.sampler.spans[row.index]
                self.end(slot, self.canvas[slot, span.start : span.stop].tolist(), "filled")

    def answer(self, slot: int, tokens: list[int], reason: str) -> Generation:
        row = self.rows[slot]
        span = self.sampler.spans[row.index]
        gaps: list[list[int]] = []
        for before, place in zip([-2, *row.places], row.places, strict=False):
            if place != before + 1:
                gaps.append([])
            gaps[-1].append(tokens[place - span.start])
        return Infilling(
            tokens=tokens,
            finish_reason=reason,
            nfe=row.nfe,
            seconds=time.perf_counter() - row.began,
            prompt_length=span.start,
            commit_steps=self.committed_at[slot, span.start : span.stop].tolist(),
            gaps=gaps,
        )

    def compact(self, kept: list[int]) -> None:
        super().compact(kept)
        self.gaps = self.gaps[kept]


@dataclass(eq=False, kw_only=True)
class _GapFiller(EngineSampler):
    """`infill` as a sampler whose prompts are rows `prompt | text | masks`; `spans` says where the texts are."""

    engine = GapEngine

    policy: UnmaskingPolicy
    spans: list[range]
    max_new_tokens: int = 1  # a column behind the longest text

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if model.config.causal or model.config.causal_context:
            raise UserError(
                "this checkpoint reads left to right: infilling needs a model that reads in both directions"
            )
        return super().decode(model, prompts, request)
