"""One token per forward, left to right, with a KV cache: the baseline."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.sampling.captured import reach_of
from dllm_var.sampling.drawing import log_probabilities
from dllm_var.sampling.engine import Batch, Engine, EngineSampler, Row


class AutoregressiveEngine(Engine[Row]):
    """Rows `prompt | answer`: the cache holds all of a row but its newest token, which the next forward reads."""

    free_share = 0.25  # prompts enter several at a time: a prefill costs as much as a step
    constant_shape = True

    def __init__(self, sampler: EngineSampler, model: Transformer, prompts: list[list[int]], request: Request) -> None:
        super().__init__(sampler, model, prompts, request)
        self.cache = self.add_cache(model)

    def forward(self, batch: Batch[Row]) -> None:
        """Gives rows their next token, and ends those that are complete."""
        table = []
        for slot, row in zip(batch.slots, batch.rows, strict=True):
            row.nfe += row.index >= 0
            cell = slot * self.capacity + max(row.prompt_length + row.nfe - 1, 0)
            table.append((cell, row.nfe, row.key + row.nfe))
        arena = self.arena_for(batch, most=1)
        if arena is not None:
            reach = reach_of(int(self.cache.lengths.max()) + 1, self.capacity)
            numbers = torch.cat((torch.tensor(table), self.cache.lengths[:, None]), dim=1)
            constants = reach, self.request.log_probabilities
            tokens = arena.run(lambda given: self.read_one(given, reach), numbers, *constants)
            self.cache.advance(batch.pending)
        else:
            hidden = self.read(batch, batch.pending, batch.pending)
            last = hidden[torch.arange(len(batch.rows)), (batch.pending - 1).clamp_min(0)]
            tokens = self.put_next(last, torch.tensor(table, device=self.device)).tolist()  # the one wait
        for slot, row, token in zip(batch.slots, batch.rows, tokens, strict=True):
            if row.index < 0:
                continue
            row.pending = 1
            stop = row.prompt_length + row.nfe
            if token in self.terminators:  # the answer is as it was last streamed
                self.end(slot, self.canvas[slot, row.prompt_length : stop - 1].tolist(), "eos")
            else:
                self.tell(slot, stop, "length" if row.nfe == row.limit else None)

    def read_one(self, numbers: Tensor, reach: int) -> Tensor:
        """Reads every row's newest token; `numbers` [R, 4] are those of `put_next` and how many are in the cache."""
        place = numbers[:, 3:]
        self.cache.open_constant(place, place, reach)
        hidden = self.model.hidden_states(self.canvas.gather(1, place), cache=self.cache)
        return self.put_next(hidden[:, 0], numbers[:, :3])

    def put_next(self, hidden: Tensor, numbers: Tensor) -> Tensor:
        """Returns each row's next token [R] after its last hidden state [R, hidden], and writes it.

        `numbers` [R, 3] are the cell of the flat canvas, the number of the forward, and that of the draw.
        """
        cells, nfe, keys = numbers.unbind(1)
        logits = self.model.lm_head(hidden).float().index_fill_(1, self.banned, -torch.inf)
        tokens = logits.argmax(dim=-1) if self.sampler.temperature == 0 else self.sampler.draw(logits, keys)
        self.canvas.put_(cells, tokens)
        self.committed_at.put_(cells, nfe)
        if self.request.log_probabilities:
            self.log_probabilities.put_(cells, log_probabilities(logits, tokens))
        return tokens


@dataclass(eq=False)
class AutoregressiveSampler(EngineSampler):
    """Next-token decoding of a causal transformer; finished rows leave the batch and waiting prompts enter."""

    engine = AutoregressiveEngine
    causal = True
