"""One token per forward, left to right, with a KV cache: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.engine import Engine, EngineSampler, Row
from dllm_var.sampling.settings import DecodingSettings


class AutoregressiveEngine(Engine[Row]):
    """Rows `prompt | answer`: the cache holds all of a row but its newest token, which the next forward reads."""

    free_share = 0.25  # prompts enter several at a time: a prefill costs as much as a step

    def __init__(
        self, sampler: DecodingSettings, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        super().__init__(sampler, model, prompts, request)
        self.is_terminator = frozenset(self.terminators)

    def forward(self, slots: list[int] | None) -> None:
        """Gives rows their next token, and ends those that are complete."""
        where = list(range(len(self.rows))) if slots is None else slots
        rows = [self.rows[slot] for slot in where]
        index = None if slots is None else torch.tensor(slots)
        pending = torch.tensor([row.pending for row in rows])
        longest = int(pending.max())
        self.cache.open(longest, None if longest == 1 else pending.clamp_min(1), index)
        canvas = self.canvas if slots is None else self.canvas[slots]
        hidden = self.model.hidden_states(canvas.gather(1, self.cache.positions), cache=self.cache)
        self.cache.advance(pending, index)
        last = hidden[:, 0] if longest == 1 else hidden[torch.arange(len(rows)), (pending - 1).clamp_min(0)]
        logits = self.model.lm_head(last).float().index_fill_(1, self.banned, -torch.inf)
        tokens = None
        for row in rows:
            row.nfe += row.index >= 0
        if self.sampler.temperature > 0:
            keys = torch.tensor([row.key + row.nfe for row in rows], device=self.device)
            tokens = self.sampler.draw(logits, keys)
        tokens = logits.argmax(dim=-1) if tokens is None else tokens
        cells = [
            slot * self.capacity + max(row.prompt_length + row.nfe - 1, 0)
            for slot, row in zip(where, rows, strict=True)
        ]
        place, nfe = torch.tensor([cells, [row.nfe for row in rows]], device=self.device)
        self.canvas.put_(place, tokens)
        self.committed_at.put_(place, nfe)
        for slot, row, token in zip(where, rows, tokens.tolist(), strict=True):  # the step's one wait for the device
            if row.index < 0:
                continue
            row.pending = 1
            stop = row.prompt_length + row.nfe
            if token in self.is_terminator:  # the answer is as it was last streamed
                self.end(slot, self.canvas[slot, row.prompt_length : stop - 1].tolist(), "eos")
            else:
                self.tell(slot, stop, "length" if row.nfe == self.limit else None)


@dataclass(eq=False)
class AutoregressiveSampler(EngineSampler):
    """Next-token decoding of a causal transformer; finished rows leave the batch and waiting prompts enter."""

    engine: ClassVar[type[Engine[Any]]] = AutoregressiveEngine
    causal: ClassVar[bool] = True
