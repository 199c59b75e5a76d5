"""One token per forward, left to right, with a KV cache: the baseline."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Generation, Request, Sampler, check_at_least_one
from dllm_var.sampling.draw import Draw, request_keys

ADMIT_SHARE = 4  # waiting prompts enter when one in this many places is free: a prefill costs as much as a step


class AutoregressiveSampler(Sampler):
    """Next-token decoding of a causal transformer; finished rows leave the batch and waiting prompts enter.

    Args:
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws; a row's draws do not depend on its batch.

    Raises:
        UserError: When a length or the batch size is below 1, or a setting of the draws is out of range.
    """

    def __init__(
        self,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.draw = Draw(temperature, top_k, top_p, seed)

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if not model.config.causal:
            raise UserError("this checkpoint is bidirectional: decode it with dllm_var.sampling.BlockDiffusionSampler")
        run = _Run(self, model, prompts, request)
        while run.waiting or run.in_flight.any():
            run.admit()
            run.step()
        return [run.answers[index] for index in range(len(prompts))]


class _Run:
    """One call of `generate`: the rows in flight, one per slot of the cache.

    The cache holds all of a row but its newest token, which is what the next forward reads. The answers are kept on
    the host, where every token arrives anyway to be compared with the terminators.
    """

    def __init__(
        self, sampler: AutoregressiveSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        self.sampler, self.model, self.prompts, self.request = sampler, model, prompts, request
        self.limit = limit = request.max_new_tokens or sampler.max_new_tokens
        self.waiting = deque(range(len(prompts)))
        self.answers: dict[int, Generation] = {}
        slots = min(sampler.batch_size, len(prompts))
        config, weight = model.config, model.embedding.weight
        assert config.vocab_size is not None
        self.device = weight.device
        capacity = max(map(len, prompts), default=0) + limit
        self.cache = model.new_cache(slots, capacity)
        banned = {*request.suppressed} if config.mask_id is None else {config.mask_id, *request.suppressed}
        self.banned = torch.tensor(sorted(banned), dtype=torch.long, device=self.device)
        self.is_terminator = np.zeros(config.vocab_size, dtype=bool)
        self.is_terminator[config.terminator_ids or []] = True
        self.keys = np.array(request_keys(prompts), dtype=np.int64) if sampler.temperature else None
        self.newest = torch.zeros(slots, dtype=torch.long, device=self.device)
        # Host-side bookkeeping, one entry per slot; `prompt` is the index of the row's prompt.
        self.in_flight = np.zeros(slots, dtype=bool)
        self.prompt = np.zeros(slots, dtype=np.int64)
        self.tokens = np.zeros((slots, limit), dtype=np.int64)
        self.length = np.zeros(slots, dtype=np.int64)
        self.began = np.zeros(slots)

    def admit(self) -> None:
        """Gives free slots to waiting prompts, several at a time, and prefills them together."""
        if not self.waiting:
            return
        free = np.flatnonzero(~self.in_flight)
        if ADMIT_SHARE * free.size < self.in_flight.size:
            return
        free = free[: len(self.waiting)]
        indices = [self.waiting.popleft() for _ in free]
        lengths = np.array([len(self.prompts[index]) for index in indices])
        tokens = np.zeros((free.size, int(lengths.max())), dtype=np.int64)
        for row, index in enumerate(indices):
            tokens[row, : lengths[row]] = self.prompts[index]
        self.in_flight[free], self.prompt[free], self.length[free] = True, indices, 0
        self.began[free] = time.perf_counter()
        rows = None if free.size == self.in_flight.size else free
        self.cache.open(tokens.shape[1], lengths, rows)
        hidden = self.model.hidden_states(torch.from_numpy(tokens).to(self.device), cache=self.cache)
        self.cache.advance(lengths, rows)
        ends = torch.from_numpy(lengths - 1).to(self.device)
        self._append(free, hidden[torch.arange(free.size, device=self.device), ends])

    def step(self) -> None:
        """One forward of every row in flight, one token further."""
        count = np.count_nonzero(self.in_flight)
        if not count:
            return
        if not self.waiting and count <= 0.75 * self.in_flight.size:
            self._compact(np.flatnonzero(self.in_flight))
        self.cache.open(1)
        hidden = self.model.hidden_states(self.newest[:, None], cache=self.cache)
        self.cache.advance(self.in_flight)
        self._append(None, hidden[:, 0])

    def _append(self, rows: np.ndarray | None, hidden: Tensor) -> None:
        """Gives each of the rows (all when null) its next token, and ends those that are complete.

        Args:
            rows: The slots.
            hidden: Their last hidden states [R, hidden].
        """
        where = slice(None) if rows is None else rows
        self.length[where] += self.in_flight[where]
        logits = self.model.lm_head(hidden).float().index_fill_(1, self.banned, -torch.inf)
        drawn = None
        if self.keys is not None:
            keys = torch.from_numpy(self.keys[self.prompt[where]] + self.length[where])
            drawn = self.sampler.draw(logits, keys.to(self.device))
        chosen = logits.argmax(dim=-1) if drawn is None else drawn
        if rows is None:
            self.newest = chosen
        else:
            self.newest[torch.from_numpy(rows).to(self.device)] = chosen
        tokens = chosen.cpu().numpy()  # the step's one wait for the device
        slots = np.arange(tokens.size) if rows is None else rows
        self.tokens[slots, self.length[where] - 1] = tokens
        ended = self.is_terminator[tokens]
        over = ended | (self.length[where] == self.limit)
        if self.request.on_block is not None or self.request.stop is not None:
            for place in np.flatnonzero(self.in_flight[where] & ~ended):
                over[place] |= self._tell(int(slots[place]))
        over &= self.in_flight[where]
        for place in np.flatnonzero(over):
            self._end(int(slots[place]), bool(ended[place]))

    def _tell(self, slot: int) -> bool:
        """Streams a row's tokens so far; says whether a stop string is among them."""
        index, tokens = int(self.prompt[slot]), self.tokens[slot, : self.length[slot]].tolist()
        if self.request.on_block is not None:
            self.request.on_block(index, tokens)
        return self.request.stopped(index, tokens)

    def _end(self, slot: int, by_terminator: bool) -> None:
        index, nfe = int(self.prompt[slot]), int(self.length[slot])
        tokens = self.tokens[slot, : nfe - by_terminator].tolist()
        self.answers[index] = Generation(
            tokens=tokens,
            finish_reason="eos" if by_terminator else "length",
            nfe=nfe,
            seconds=time.perf_counter() - float(self.began[slot]),
            prompt_length=len(self.prompts[index]),
            commit_steps=list(range(1, len(tokens) + 1)),
        )
        self.request.finished(index, self.answers[index])
        self.in_flight[slot], self.length[slot] = False, 0
        self.cache.free(slot)

    def _compact(self, rows: np.ndarray) -> None:
        """Drops the free slots; done when a quarter is free, so that the copies cost little in all."""
        self.cache.keep(rows)
        self.newest = self.newest[torch.from_numpy(rows).to(self.device)]
        for name in ("in_flight", "prompt", "tokens", "length", "began"):
            setattr(self, name, getattr(self, name)[rows])
