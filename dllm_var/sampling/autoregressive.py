"""One token per forward, left to right, with a KV cache: the baseline."""

from dataclasses import dataclass

import torch

from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.engine import Batch, Engine, EngineSampler, Row


class AutoregressiveEngine(Engine[Row]):
    """Rows `prompt | answer`: the cache holds all of a row but its newest token, which the next forward reads."""

    free_share = 0.25  # prompts enter several at a time: a prefill costs as much as a step

    def __init__(self, sampler: EngineSampler, model: Transformer, prompts: list[list[int]], request: Request) -> None:
        super().__init__(sampler, model, prompts, request)
        self.cache = self.add_cache(model)

    def forward(self, batch: Batch[Row]) -> None:
        """Gives rows their next token, and ends those that are complete."""
        hidden = self.read(batch, batch.pending, batch.pending)
        last = hidden[torch.arange(len(batch.rows)), (batch.pending - 1).clamp_min(0)]
        logits = self.model.lm_head(last).float().index_fill_(1, self.banned, -torch.inf)
        table = []
        for slot, row in zip(batch.slots, batch.rows, strict=True):
            row.nfe += row.index >= 0
            cell = slot * self.capacity + max(row.prompt_length + row.nfe - 1, 0)
            table.append((cell, row.nfe, row.key + row.nfe))
        cells, nfe, keys = torch.tensor(table, device=self.device).unbind(1)
        tokens = logits.argmax(dim=-1) if self.sampler.temperature == 0 else self.sampler.draw(logits, keys)
        self.canvas.put_(cells, tokens)
        self.committed_at.put_(cells, nfe)
        for slot, row, token in zip(batch.slots, batch.rows, tokens.tolist(), strict=True):  # the one wait
            if row.index < 0:
                continue
            row.pending = 1
            stop = row.prompt_length + row.nfe
            if token in self.terminators:  # the answer is as it was last streamed
                self.end(slot, self.canvas[slot, row.prompt_length : stop - 1].tolist(), "eos")
            else:
                self.tell(slot, stop, "length" if row.nfe == self.limit else None)


@dataclass(eq=False)
class AutoregressiveSampler(EngineSampler):
    """Next-token decoding of a causal transformer; finished rows leave the batch and waiting prompts enter."""

    engine = AutoregressiveEngine
    causal = True
