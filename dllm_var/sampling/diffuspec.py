"""Speculative decoding with a diffusion model as drafter (DiffuSpec, arXiv 2510.02358)."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.autoregressive import ADMIT_SHARE
from dllm_var.sampling.auxiliary import AuxiliaryModel
from dllm_var.sampling.base import Generation, Request, Sampler, check_at_least_one, special_ids
from dllm_var.sampling.path_search import NGramModel, search_path
from dllm_var.sampling.scoring import score_positions

GROWTH = 10  # delta of equation 11: how much longer the next draft is while everything is accepted
SMOOTHING = 0.5  # rho of equation 10: weight of the latest draft in the running means


class DiffuSpecSampler(Sampler):
    """Decodes an autoregressive model greedily; a diffusion model drafts for it, many tokens at once.

    One forward of the drafter predicts the next tokens all at once. A beam search picks the draft that also a causal
    n-gram model finds likely. The longest part of it that the model would have said itself is accepted, and the token
    that the model says behind it. So the text is the model's own, token for token.

    Args:
        drafter: Checkpoint of a diffusion model with the same tokenizer: run folder, `.ckpt` or exported folder.
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        shortest_draft: Least number of tokens drafted.
        longest_draft: Largest number; in between, drafts are as long as the drafter's answers have been lately, and
            longer while all of them is accepted. For a drafter trained on blocks, no more than their length.
        nucleus: Probability that a position's candidates have together.
        candidates: Most candidates of a position.
        beam: Drafts kept at each position of the search.
        mix: Weight of the drafter's log-probability in the search, against the n-gram model's.
        corpus: Text file, one text a line, that the n-gram model counts beside each request's own tokens.

    Raises:
        UserError: When a setting is out of range; when decoding starts, if there is no such checkpoint or file, or the
            drafter is not a diffusion model or has another tokenizer.
    """

    def __init__(
        self,
        drafter: str,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        shortest_draft: int = 20,
        longest_draft: int = 30,
        nucleus: float = 0.8,
        candidates: int = 15,
        beam: int = 3,
        mix: float = 0.5,
        corpus: str | None = None,
    ) -> None:
        check_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size, shortest_draft=shortest_draft)
        check_at_least_one(candidates=candidates, beam=beam)
        if longest_draft < shortest_draft:
            raise UserError(f"sampler.longest_draft {longest_draft} is below shortest_draft {shortest_draft}: raise it")
        if not (0 < nucleus <= 1 and 0 <= mix <= 1):
            raise UserError(f"sampler needs nucleus in (0, 1] and mix in [0, 1], got {nucleus} and {mix}")
        self.drafter, self.max_new_tokens, self.batch_size = drafter, max_new_tokens, batch_size
        self.shortest_draft, self.longest_draft = shortest_draft, longest_draft
        self.nucleus, self.candidates, self.beam, self.mix, self.corpus = nucleus, candidates, beam, mix, corpus
        self.auxiliary = AuxiliaryModel("drafter", drafter, causal=False)
        self._shared: NGramModel | None = None

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if not model.config.causal:
            raise UserError(
                "DiffuSpec decodes an autoregressive checkpoint, and this one is bidirectional: it can be the drafter"
            )
        run = _Run(self, model, prompts, request)
        while run.waiting or run.in_flight.any():
            run.admit()
            run.step()
        return [run.answers[index] for index in range(len(prompts))]

    def counts(self, vocab_size: int) -> NGramModel | None:
        """Returns the n-gram model of the corpus, counted once; null without a corpus."""
        if self.corpus is not None and self._shared is None:
            try:
                lines = Path(self.corpus).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                raise UserError(f"sampler.corpus: cannot read '{self.corpus}': {reason}") from error
            tokenizer = self.auxiliary.tokenizer
            self._shared = NGramModel(vocab_size)
            for tokens in tokenizer.encode_batch([line for line in lines if line.strip()]):
                self._shared.add([*tokens, tokenizer.terminator_id])
        return self._shared


class _Run:
    """One call of `generate`: the rows in flight, one per slot of the two caches.

    The target's cache holds all of a row but its newest token. The drafter's lacks all that came since the last draft:
    a forward takes that and the masks behind it, and keeps the keys and values of the former.
    """

    per_slot = (
        *("in_flight", "prompt", "prompt_length", "length", "text", "committed_at"),
        *("nfe", "drafted", "draft_length", "mean_drafted", "mean_accepted", "began"),
    )

    def __init__(
        self, sampler: DiffuSpecSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        self.sampler, self.model, self.prompts, self.request = sampler, model, prompts, request
        self.drafter = sampler.auxiliary.beside(model, request)
        self.mask_id, self.terminators = special_ids(model)
        self.limit = limit = request.max_new_tokens or sampler.max_new_tokens
        self.waiting = deque(range(len(prompts)))
        self.answers: dict[int, Generation] = {}
        slots = min(sampler.batch_size, len(prompts))
        weight = model.embedding.weight
        self.device = weight.device
        # The slack is for padding: what the drafter has not read yet, and a draft behind it, beside rows near the end.
        capacity = max(map(len, prompts), default=0) + limit + 2 * sampler.longest_draft + 1
        self.target_cache = model.new_cache(slots, capacity)
        self.drafter_cache = self.drafter.new_cache(slots, capacity)
        assert model.config.vocab_size is not None
        self.vocab_size = model.config.vocab_size
        self.shared = sampler.counts(self.vocab_size)
        self.proxies = [NGramModel(self.vocab_size) for _ in range(slots)]
        # Host-side bookkeeping, one entry per slot; `text` is the row, then masks.
        self.in_flight = np.zeros(slots, dtype=bool)
        self.text = np.full((slots, capacity), self.mask_id)
        self.committed_at = np.zeros((slots, capacity), dtype=np.int32)
        self.prompt, self.prompt_length, self.length, self.nfe, self.drafted, self.draft_length = (
            np.zeros(slots, dtype=np.int64) for _ in "123456"
        )
        self.mean_drafted, self.mean_accepted, self.began = (np.zeros(slots) for _ in "123")

    def admit(self) -> None:
        """Gives free slots to waiting prompts, several at a time, and takes their first step together."""
        free = np.flatnonzero(~self.in_flight)
        if not self.waiting or ADMIT_SHARE * free.size < self.in_flight.size:
            return
        free = free[: len(self.waiting)]
        for slot in free.tolist():
            index = self.waiting.popleft()
            tokens = self.prompts[index]
            self.text[slot] = self.mask_id
            self.text[slot, : len(tokens)] = tokens
            self.in_flight[slot], self.prompt[slot] = True, index
            self.prompt_length[slot] = self.length[slot] = len(tokens)
            self.nfe[slot] = self.drafted[slot] = self.mean_drafted[slot] = self.mean_accepted[slot] = 0
            self.draft_length[slot] = self.sampler.longest_draft
            self.target_cache.free(slot)
            self.drafter_cache.free(slot)
            self.proxies[slot] = NGramModel(self.vocab_size, self.shared)
            self.proxies[slot].add(tokens)
            self.began[slot] = time.perf_counter()
        self._advance(free if free.size < self.in_flight.size else None)

    def step(self) -> None:
        """A draft and its verification for every row in flight."""
        count = np.count_nonzero(self.in_flight)
        if not count:
            return
        if not self.waiting and count <= 0.75 * self.in_flight.size:
            self._compact(np.flatnonzero(self.in_flight))
        self._advance(None)

    def _advance(self, slots: np.ndarray | None) -> None:
        """Takes some slots (free ones until now) or all of them one draft further."""
        rows = np.arange(self.in_flight.size) if slots is None else slots
        left = self.limit - (self.length - self.prompt_length)[rows]
        # One token comes from the target itself, so the last one is never drafted.
        wanted = np.where(self.in_flight[rows], np.minimum(self.draft_length[rows], left - 1), 0)
        drafts, lengths = self._draft(rows, slots, wanted)
        expected = self._verify(rows, slots, drafts)
        for slot, draft, length, said in zip(rows.tolist(), drafts, lengths, expected, strict=True):
            if self.in_flight[slot]:
                self._accept(slot, draft, length, said)

    def _draft(
        self, rows: np.ndarray, slots: np.ndarray | None, wanted: np.ndarray
    ) -> tuple[list[list[int]], list[int]]:
        """Returns a draft of at most `wanted` [R] tokens for each row, and how many the drafter put before its end."""
        if not wanted.any():
            return [[] for _ in rows], [0] * rows.size
        pending = np.where(wanted > 0, self.length[rows] - self.drafter_cache.lengths[rows], 0)
        hidden = self._forward(self.drafter, self.drafter_cache, rows, slots, np.maximum(pending + wanted, 1))
        self.drafter_cache.advance(pending, slots)
        self.drafted[rows] += wanted > 0
        logits = self._score(self.drafter, hidden, pending, wanted)
        top = logits.log_softmax(dim=-1).topk(min(self.sampler.candidates, self.vocab_size))
        mass = top.values.exp()
        count = (mass.cumsum(dim=1) - mass < self.sampler.nucleus).sum(dim=1, keepdim=True)
        # The draft's one wait for the device; a double holds any token id.
        table = torch.cat((top.values.double(), top.indices.double(), count.double()), dim=1).cpu().numpy()
        width = top.values.size(1)
        counts = table[:, -1].astype(np.int64).tolist()
        log_p, tokens = table[:, :width].tolist(), table[:, width:-1].astype(np.int64).tolist()
        options = [list(zip(t[:n], p[:n], strict=True)) for t, p, n in zip(tokens, log_p, counts, strict=True)]
        drafts, lengths, start = [], [], 0
        for slot, number in zip(rows.tolist(), wanted.tolist(), strict=True):
            candidates = options[start : start + number]
            start += number
            ends = (place for place, [(token, _), *_] in enumerate(candidates) if token in self.terminators)
            lengths.append(next(ends, number))
            context = self.text[slot, max(0, self.length[slot] - 2) : self.length[slot]].tolist()
            search = (self.sampler.beam, self.sampler.mix, self.terminators)
            drafts.append(search_path(candidates, context, self.proxies[slot], *search))
        return drafts, lengths

    def _verify(self, rows: np.ndarray, slots: np.ndarray | None, drafts: list[list[int]]) -> list[list[int]]:
        """Returns what the target says at each place of each draft, and behind it."""
        active = self.in_flight[rows]
        length = np.array([len(draft) for draft in drafts])
        for slot, draft in zip(rows, drafts, strict=True):
            self.text[slot, self.length[slot] : self.length[slot] + len(draft)] = draft
        pending = self.length[rows] - self.target_cache.lengths[rows]
        windows = np.where(active, pending + length, 1)
        hidden = self._forward(self.model, self.target_cache, rows, slots, windows)
        self.target_cache.advance(np.where(active, pending, 0), slots)
        self.nfe[rows] += active
        places = np.where(active, length + 1, 0)
        said = self._score(self.model, hidden, pending - 1, places).argmax(dim=-1)
        said_on_host = said.cpu().numpy()  # the verification's one wait for the device
        return [part.tolist() for part in np.split(said_on_host, np.cumsum(places)[:-1])]

    def _forward(
        self, model: Transformer, cache: KVCache, rows: np.ndarray, slots: np.ndarray | None, windows: np.ndarray
    ) -> Tensor:
        """Returns the hidden states [R, L, hidden] of the `windows` [R] behind what the cache holds."""
        longest = int(windows.max())
        text = self.length[rows] - cache.lengths[rows] if model.config.causal_context else None
        cache.open(longest, windows, slots, left_to_right=text)
        place = cache.lengths[rows][:, None] + np.arange(longest)
        tokens = np.take_along_axis(self.text[rows], place, axis=1)
        return model.hidden_states(torch.from_numpy(tokens).to(self.device), cache=cache)

    def _score(self, model: Transformer, hidden: Tensor, shift: np.ndarray, counts: np.ndarray) -> Tensor:
        """Returns the logits [M, V] of the `counts` [R] places that begin `shift` [R] into the forward."""
        where = torch.from_numpy(np.arange(int(counts.max())) < counts[:, None]).to(self.device)
        starts = torch.from_numpy(shift).to(self.device)
        return score_positions(model, hidden, where, starts, int(counts.sum()), self.request.suppressed)[1]

    def _accept(self, slot: int, draft: list[int], drafted: int, said: list[int]) -> None:
        """Adds what the target confirms of a draft and its own next token; ends the row when it is complete."""
        accepted = next((n for n, token in enumerate(draft) if token != said[n]), len(draft))
        new = said[: accepted + 1]
        end = next((n for n, token in enumerate(new) if token in self.terminators), -1)
        new = new[:end] if end >= 0 else new
        self._adapt(slot, drafted, accepted)
        start = int(self.length[slot])
        self.proxies[slot].add(new, self.text[slot, max(0, start - 2) : start].tolist())
        stop = start + len(new)
        self.text[slot, start : start + len(draft) + 1] = self.mask_id
        self.text[slot, start:stop], self.committed_at[slot, start:stop] = new, self.nfe[slot]
        self.length[slot] = stop
        self.target_cache.lengths[slot] = start + accepted
        index, begin = int(self.prompt[slot]), int(self.prompt_length[slot])
        over = end >= 0 or stop - begin == self.limit
        if not over and self.request.on_block is None and self.request.stop is None:
            return
        answer = self.text[slot, begin:stop].tolist()
        if self.request.on_block is not None:
            self.request.on_block(index, answer)
        if not over and not self.request.stopped(index, answer):
            return
        self.answers[index] = Generation(
            tokens=answer,
            finish_reason="eos" if end >= 0 else "length",
            nfe=int(self.nfe[slot]),
            seconds=time.perf_counter() - float(self.began[slot]),
            prompt_length=begin,
            commit_steps=self.committed_at[slot, begin:stop].tolist(),
            auxiliary_nfe=int(self.drafted[slot]),
        )
        self.request.finished(index, self.answers[index])
        self.in_flight[slot] = False

    def _adapt(self, slot: int, drafted: int, accepted: int) -> None:
        """Sets the length of the row's next draft from running means of the last ones (equations 10 and 11)."""
        self.mean_drafted[slot] += SMOOTHING * (drafted - self.mean_drafted[slot])
        self.mean_accepted[slot] += SMOOTHING * (accepted - self.mean_accepted[slot])
        growth = GROWTH if self.mean_accepted[slot] >= self.mean_drafted[slot] else 0
        length = int(self.mean_drafted[slot]) + growth
        self.draft_length[slot] = min(max(length, self.sampler.shortest_draft), self.sampler.longest_draft)

    def _compact(self, rows: np.ndarray) -> None:
        """Drops the free slots; done when a quarter is free, so that the copies cost little in all."""
        self.target_cache.keep(rows)
        self.drafter_cache.keep(rows)
        self.proxies = [self.proxies[slot] for slot in rows]
        for name in self.per_slot:
            setattr(self, name, getattr(self, name)[rows])
