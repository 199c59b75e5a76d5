"""Infilling: tokens for the gaps of a text, with all the rest of it in view on both sides."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Generation, OnAnswer, Request, Sampler, special_ids
from dllm_var.sampling.denoising import DenoisingEngine
from dllm_var.sampling.engine import Batch, EngineSampler, Row
from dllm_var.sampling.policies import ConfidenceThreshold, UnmaskingPolicy
from dllm_var.sampling.policies.base import take_step
from dllm_var.text.tokenizer import Tokenizer


@dataclass
class Infilling(Generation):
    """One text with its gaps filled: `tokens` is all of it, `commit_steps` 0 where given, `finish_reason` `filled`."""

    gaps: list[list[int]] = field(default_factory=list)  # the tokens of each gap, from left to right

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
    log_probabilities: bool = False,
    record: bool = False,
    **settings: Any,
) -> list[Infilling]:
    """Fills the gaps of texts, token ids with the mask id wherever a token is wanted, all gaps of a text together.

    Every forward reads prompt and text whole; a block-causal model sees nothing of what is behind a gap's block. Given
    tokens stay as they are; terminators and the mask are never put in a gap. Raises UserError when the model reads left
    to right, a text has no gap, or a setting is out of range.

    Args:
        policy: Sees a text's gaps, one behind the other, as its block; `ConfidenceThreshold(0.9)` when None.
        prompts: What stands before each text; nothing when None.
        block_length: Shows a text's end as block diffusion does, by masks behind it up to the end of its last block; at
            least one, where the terminator would be. Nothing is behind it when None. A block-causal model has its own
            blocks, of which the last is always filled up.
        settings: `batch_size`, `temperature`, `top_k`, `top_p` and `seed`; the other arguments are those of `generate`.
    """
    transformer = getattr(model, "transformer", model)
    check_fills(transformer)
    if block_length is not None and block_length < 1:
        raise UserError(f"block_length must be at least 1, got {block_length}")
    mask_id, terminators = special_ids(transformer)
    spans, rows = [], []
    before = [[]] * len(texts) if prompts is None else prompts
    for index, (prompt, text) in enumerate(zip(before, texts, strict=True)):
        if mask_id not in text:
            raise UserError(f"text {index} has no gap: put one where tokens are wanted")
        spans.append(range(len(prompt), len(prompt) + len(text)))
        behind = masks_behind(len(prompt), len(text), block_length, transformer.config.grid)
        rows.append([*prompt, *text, *[mask_id] * behind])
    filler = gap_filler(spans, policy, **settings)
    filled = filler.generate(
        model,
        rows,
        tokenizer=tokenizer,
        suppress=[*suppress, *terminators],
        on_answer=on_answer,
        log_probabilities=log_probabilities,
        record=record,
    )
    return [answer for answer in filled if isinstance(answer, Infilling)]


def check_fills(model: Transformer) -> None:
    """Raises UserError for a model that cannot fill gaps."""
    if model.config.causal or model.config.causal_context:
        raise UserError("this checkpoint reads left to right: infilling needs a model that reads in both directions")


def masks_behind(prompt: int, text: int, block_length: int | None, grid: int | None) -> int:
    """Returns how many masks follow a text behind a prompt, of so many tokens, up to the end of its last block."""
    if grid is not None:
        return -(prompt + text) % grid
    return 0 if block_length is None else block_length - text % block_length


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """Returns a sampler's settings that `infill` has too; a sampler with a policy of its own does not lend it."""
    shared = {"policy", "batch_size", "temperature", "top_k", "top_p", "seed"}
    return {name: getattr(sampler, name) for name in shared & {*inspect.signature(type(sampler)).parameters}}


def block_length_of(sampler: Sampler) -> int | None:
    """Returns to which block a sampler would show the end of an answer: that of its blocks, or of its canvas."""
    return getattr(sampler, "block_length", None) or getattr(sampler, "canvas_length", None)


def gap_filler(spans: list[range], policy: UnmaskingPolicy | None = None, **settings: Any) -> EngineSampler:
    """Returns the sampler behind `infill`: its prompts are rows `prompt | text | masks` with their texts at `spans`."""
    return _GapFiller(spans=spans, policy=policy or ConfidenceThreshold(), **settings)


class GapEngine(DenoisingEngine[Row]):
    """Rows `prompt | text | masks` without a cache; the gaps of each, one behind the other, are its block."""

    sampler: "_GapFiller"

    def __init__(self, sampler: "_GapFiller", model: Transformer, prompts: list[list[int]], request: Request) -> None:
        super().__init__(sampler, model, prompts, request)
        self.places = [
            [place for place in span if prompt[place] == self.mask_id]
            for span, prompt in zip(sampler.spans, prompts, strict=True)
        ]
        widest = max(map(len, self.places), default=0)
        # Of each prompt [N, K]: what is no gap is the canvas's last column, which no text reaches.
        padded = [[*places, *[self.capacity - 1] * (widest - len(places))] for places in self.places]
        self.gaps = torch.tensor(padded, dtype=torch.long, device=self.device)
        self.use_policy(sampler.policy, widest)

    def start(self, slot: int) -> None:
        row = self.rows[slot]
        row.prompt_length = self.sampler.spans[row.index].start
        row.left = row.width = len(self.places[row.index])

    def in_sight(self, slot: int) -> tuple[int, list[int]]:
        return self.sampler.spans[self.rows[slot].index].stop, []

    def forward(self, batch: Batch[Row]) -> None:
        batch = batch if batch.index is None else self.batch()
        table = []
        for row in batch.rows:
            row.nfe += 1
            tokens = len(self.prompts[row.index]) if row.index >= 0 else 0
            table.append((row.index, row.nfe, row.key + row.nfe, row.width, tokens))
        lengths = [line[-1] for line in table]
        longest = max(lengths)
        index, nfe, key, width, length = torch.tensor(table, device=self.device).unbind(1)
        padding = torch.arange(longest, device=self.device) >= length[:, None]
        segments = None if min(lengths) == longest else padding.long()  # padding is a segment of its own
        hidden = self.model.hidden_states(self.canvas[:, :longest], segment_ids=segments)
        gaps, number = self.gaps[index], torch.arange(len(batch.rows), device=self.device)[:, None]
        cells = number * self.capacity + gaps
        view = self.view(
            hidden,
            number * longest + gaps,
            self.canvas.take(cells),
            torch.arange(gaps.size(1), device=self.device) < width[:, None],
            sum(map(self.scored, batch.rows)),
            step=nfe - 1,
            progress=torch.zeros_like(nfe, dtype=torch.float),
            key=key,
            spacing=length,  # a draw must not depend on the widest row
        )
        decision = self.decide(batch, view)
        decision.finish_row = None  # a gap is filled whole
        step = take_step(view, decision, self.mask_id, self.terminators, terminator_last=False)
        self.write(cells, step.tokens, step.written, nfe, self.wanted_log_probabilities(view, step.tokens))
        for slot, (left, over) in enumerate(torch.stack((step.left, step.over)).T.tolist()):
            row = self.rows[slot]
            row.left = left
            if over and row.index >= 0:
                span = self.sampler.spans[row.index]
                self.end(slot, self.canvas[slot, span.start : span.stop].tolist(), "filled")

    def answer(self, slot: int, tokens: list[int], reason: str) -> Generation:
        row = self.rows[slot]
        places, gaps = self.places[row.index], list[list[int]]()
        for before, place in zip([-2, *places], places, strict=False):
            if place != before + 1:
                gaps.append([])
            gaps[-1].append(tokens[place - row.prompt_length])
        return Infilling(**vars(super().answer(slot, tokens, reason)), gaps=gaps)


@dataclass(eq=False, kw_only=True)
class _GapFiller(EngineSampler):
    """`infill` as a sampler whose prompts are rows `prompt | text | masks`; `spans` says where the texts are."""

    engine = GapEngine

    policy: UnmaskingPolicy
    spans: list[range]
    max_new_tokens: int = 1  # a column behind the longest text
