"""Infilling: tokens for the gaps of a text, with all the rest of it in view on both sides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Generation, OnAnswer, Request, Sampler, check_at_least_one, special_ids
from dllm_var.sampling.commit import choose_commits
from dllm_var.sampling.draw import Draw, request_keys
from dllm_var.sampling.policies import BlockView, ConfidenceThreshold, UnmaskingPolicy
from dllm_var.sampling.scoring import score_positions

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
    batch_size: int = 32,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    suppress: Sequence[int] = (),
    on_answer: OnAnswer | None = None,
) -> list[Infilling]:
    """Fills the gaps of texts by denoising them alone, all gaps of a text together.

    Every forward reads prompt and text whole. Given tokens stay as they are; terminators and the mask are never put in
    a gap.

    Args:
        model: A `Transformer`, or a module that holds one as `.transformer` (a `DiffusionLM`).
        texts: Token ids with the mask id wherever a token is wanted.
        policy: Decides which gap positions become tokens at each step: it sees a text's gaps, one behind the other, as
            its block. `ConfidenceThreshold(0.9)` when null.
        prompts: What stands before each text; nothing when null.
        block_length: Shows a text's end as block diffusion does, by masks behind it up to the end of its last block; at
            least one, where the terminator would be. Nothing is behind it when null.
        tokenizer: Decodes the texts.
        batch_size: Texts filled at a time; those that are full leave the batch.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws; a text's draws do not depend on its batch.
        suppress: Further token ids that are never produced.
        on_answer: Called with (index, infilling) once for each text, when it is full.

    Raises:
        UserError: When the model is causal, a text has no gap, or a setting is out of range.
    """
    check_at_least_one(batch_size=batch_size, block_length=block_length)
    transformer = getattr(model, "transformer", model)
    mask_id, terminators = special_ids(transformer)
    before = [[]] * len(texts) if prompts is None else prompts
    for index, text in enumerate(texts):
        if mask_id not in text:
            raise UserError(f"text {index} has no gap: put one where tokens are wanted")
    spans = [range(len(prompt), len(prompt) + len(text)) for prompt, text in zip(before, texts, strict=True)]
    behind = [0 if block_length is None else block_length - len(text) % block_length for text in texts]
    rows = [[*prompt, *text, *[mask_id] * n] for prompt, text, n in zip(before, texts, behind, strict=True)]
    draw = Draw(temperature, top_k, top_p, seed)
    filler = _GapFiller(policy or ConfidenceThreshold(), batch_size, draw, spans)
    filled = filler.generate(model, rows, tokenizer=tokenizer, suppress=[*suppress, *terminators], on_answer=on_answer)
    return [answer for answer in filled if isinstance(answer, Infilling)]


class _GapFiller(Sampler):
    """`infill` as a sampler whose prompts are rows `prompt | text | masks`; `spans` says where the texts are."""

    def __init__(self, policy: UnmaskingPolicy, batch_size: int, draw: Draw, spans: list[range]) -> None:
        self.policy, self.batch_size, self.draw, self.spans = policy, batch_size, draw, spans

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if model.config.causal or model.config.causal_context:
            raise UserError(
                "this checkpoint reads left to right: infilling needs a model that reads in both directions"
            )
        keys, answers = request_keys(prompts), {}
        for first in range(0, len(prompts), self.batch_size):
            part = slice(first, first + self.batch_size)
            run = _Run(self, model, prompts[part], self.spans[part], keys[part], request)
            while run.rows.size:
                for row in run.step():
                    answers[first + row] = run.answer(row)
                    request.finished(first + row, answers[first + row])
        return [answers[index] for index in range(len(prompts))]


class _Run:
    """A batch of texts; `rows` are those with masks left, and every tensor holds these alone."""

    def __init__(
        self,
        filler: _GapFiller,
        model: Transformer,
        texts: list[list[int]],
        spans: list[range],
        keys: list[int],
        request: Request,
    ) -> None:
        self.filler, self.model, self.texts, self.spans = filler, model, texts, spans
        self.suppressed = request.suppressed
        self.began = time.perf_counter()
        self.mask_id, self.terminators = special_ids(model)
        device = model.embedding.weight.device
        self.rows = np.arange(len(texts))
        self.nfe = np.zeros(len(texts), np.int64)
        self.keys = torch.tensor(keys, device=device)
        lengths = [len(text) for text in texts]
        self.tokens = torch.full((len(texts), max(lengths)), self.mask_id, device=device)  # [R, L]
        self.places = [[at for at in span if text[at] == self.mask_id] for text, span in zip(texts, spans, strict=True)]
        counts = torch.tensor([len(places) for places in self.places], device=device)
        widest = int(counts.max())
        self.gap = torch.zeros(len(texts), widest, dtype=torch.long, device=device)  # [R, K] places in the text
        for row, (text, places) in enumerate(zip(texts, self.places, strict=True)):
            self.tokens[row, : len(text)] = torch.tensor(text, device=device)
            self.gap[row, : len(places)] = torch.tensor(places, device=device)
        self.inside = torch.arange(widest, device=device) < counts[:, None]
        self.tokens_in_row = torch.tensor(lengths, device=device)
        self.padding = torch.arange(max(lengths), device=device) >= self.tokens_in_row[:, None]
        self.left, self.changeable = counts.cpu().numpy(), counts.cpu().numpy()
        self.committed_at = torch.zeros_like(self.gap)
        template = filler.policy.initial_state(widest)
        self.state = {name: value.to(device).repeat(len(texts), *[1] * value.dim()) for name, value in template.items()}
        self.done: dict[int, tuple[list[int], list[int], float]] = {}

    def step(self) -> list[int]:
        """One forward of the texts with masks left; returns those that are full now."""
        self.nfe[self.rows] += 1
        segments = self.padding.long() if bool(self.padding.any()) else None  # padding is a segment of its own
        hidden = self.model.hidden_states(self.tokens, segment_ids=segments)
        hidden = hidden.gather(1, self.gap[:, :, None].expand(-1, -1, hidden.size(2)))  # [R, K, hidden]
        tokens = self.tokens.gather(1, self.gap)
        masked = (tokens == self.mask_id) & self.inside
        all_scored = self.filler.policy.scores_committed
        where = self.inside if all_scored else masked
        count = int((self.changeable if all_scored else self.left).sum())
        nfe = torch.from_numpy(self.nfe[self.rows]).to(tokens.device)
        scored, logits = score_positions(self.model, hidden, where, torch.zeros_like(nfe), count, self.suppressed)
        key = self.keys + nfe
        owner, slot = scored // tokens.size(1), scored % tokens.size(1)  # a draw must not depend on the widest row
        view = BlockView(
            scored_logits=logits,
            scored=scored,
            tokens=tokens,
            masked=masked,
            changeable=self.inside,
            step=nfe - 1,
            progress=torch.zeros(len(self.rows), device=tokens.device),
            key=key,
            sampled=self.filler.draw(logits, key[owner] * self.tokens_in_row[owner] + slot),
        )
        decision = self.filler.policy.decide(view, self.state)
        tokens, masked, written = choose_commits(view, decision, self.mask_id, self.terminators, False)
        self.committed_at = torch.where(written, nfe[:, None], self.committed_at)
        self._write(tokens)
        left = masked.sum(dim=1)
        is_open = left > 0 if decision.keep_open is None else (left > 0) | decision.keep_open
        left_on_host, open_on_host = torch.stack((left, is_open.long())).cpu().numpy()
        self.left = left_on_host
        full = np.flatnonzero(open_on_host == 0)
        for place in full.tolist():
            row = int(self.rows[place])
            filled, steps = tokens[place, : len(self.places[row])], self.committed_at[place, : len(self.places[row])]
            self.done[row] = filled.tolist(), steps.tolist(), time.perf_counter() - self.began
        ended = self.rows[full].tolist()
        if full.size:
            self._keep(np.flatnonzero(open_on_host == 1))
        return ended

    def _write(self, tokens: Tensor) -> None:
        """Puts the gaps' tokens [R, K] in their places."""
        row, slot = self.inside.nonzero(as_tuple=True)
        self.tokens[row, self.gap[row, slot]] = tokens[row, slot]

    def _keep(self, kept: np.ndarray) -> None:
        """Drops all rows but these."""
        index = torch.from_numpy(kept).to(self.tokens.device)
        for name in ("keys", "tokens", "tokens_in_row", "gap", "inside", "padding", "committed_at"):
            setattr(self, name, getattr(self, name)[index])
        self.state = {name: value[index] for name, value in self.state.items()}
        self.rows, self.left, self.changeable = self.rows[kept], self.left[kept], self.changeable[kept]

    def answer(self, row: int) -> Infilling:
        """Returns a full text."""
        filled, steps, seconds = self.done[row]
        tokens, commit_steps = list(self.texts[row]), [0] * len(self.texts[row])
        gaps: list[list[int]] = []
        for before, place, token, step in zip([-1, *self.places[row]], self.places[row], filled, steps, strict=False):
            if not gaps or place != before + 1:
                gaps.append([])
            gaps[-1].append(token)
            tokens[place], commit_steps[place] = token, step
        span = slice(self.spans[row].start, self.spans[row].stop)
        return Infilling(
            tokens=tokens[span],
            finish_reason="filled",
            nfe=int(self.nfe[row]),
            seconds=seconds,
            prompt_length=span.start,
            commit_steps=commit_steps[span],
            gaps=gaps,
        )
