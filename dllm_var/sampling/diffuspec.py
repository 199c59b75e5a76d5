"""Speculative decoding with a diffusion model as drafter (DiffuSpec, arXiv 2510.02358)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.auxiliary import AuxiliaryModel
from dllm_var.sampling.base import Generation, Request
from dllm_var.sampling.engine import Engine, EngineSampler, Row
from dllm_var.sampling.path_search import NGramModel, search_path

GROWTH = 10  # delta of equation 11: how much longer the next draft is while everything is accepted
SMOOTHING = 0.5  # rho of equation 10: weight of the latest draft in the running means


@dataclass(eq=False)
class SpeculativeRow(Row):
    """A row of `length` tokens, its n-gram model, and how its drafts have fared.

    Args:
        length: Tokens of the row so far.
        draft_length: How many the next draft may have.
        mean_drafted: Running mean of how many tokens the drafter put before its end.
        mean_accepted: Running mean of how many of a draft were accepted.
        proxy: Counts of the row's n-grams.
    """

    length: int = 0
    draft_length: int = 0
    mean_drafted: float = 0.0
    mean_accepted: float = 0.0
    proxy: NGramModel | None = None


class SpeculativeEngine(Engine[SpeculativeRow]):
    """Rows with two caches; the canvas is the row, then its draft, then masks.

    The model's cache holds all of a row but its newest token. The drafter's lacks all that came since the last draft: a
    forward takes that and the masks behind it, and keeps the keys and values of the former.
    """

    sampler: DiffuSpecSampler
    row_class = SpeculativeRow
    free_share = 0.25

    def __init__(
        self, sampler: DiffuSpecSampler, model: Transformer, prompts: list[list[int]], request: Request
    ) -> None:
        self.drafter = sampler.auxiliary.beside(model, request)
        # The slack is for padding: what the drafter has not read yet, and a draft behind it, beside rows near the end.
        super().__init__(sampler, model, prompts, request, slack=2 * sampler.longest_draft + 1)
        self.drafter_cache = self.drafter.new_cache(len(self.rows), self.capacity)
        assert model.config.vocab_size is not None
        self.vocab_size = model.config.vocab_size
        self.shared = sampler.counts(self.vocab_size)

    def start(self, slot: int) -> None:
        row = self.rows[slot]
        row.length, row.draft_length = row.prompt_length, self.sampler.longest_draft
        row.proxy = NGramModel(self.vocab_size, self.shared)
        row.proxy.add(self.prompts[row.index])
        self.drafter_cache.free(slot)

    def compact(self, kept: list[int]) -> None:
        super().compact(kept)
        self.drafter_cache.keep(torch.tensor(kept))

    def forward(self, slots: list[int] | None) -> None:
        """Takes rows one draft and its verification further."""
        where = list(range(len(self.rows))) if slots is None else slots
        index = None if slots is None else torch.tensor(slots)
        # One token comes from the model itself, so the last one is never drafted.
        wanted = [
            min(row.draft_length, self.limit - (row.length - row.prompt_length) - 1) if row.index >= 0 else 0
            for row in (self.rows[slot] for slot in where)
        ]
        drafts, lengths = self._draft(where, index, torch.tensor(wanted))
        expected = self._verify(where, index, drafts)
        for slot, draft, length, said in zip(where, drafts, lengths, expected, strict=True):
            if self.rows[slot].index >= 0:
                self._accept(slot, draft, length, said)

    def _draft(self, slots: list[int], index: Tensor | None, wanted: Tensor) -> tuple[list[list[int]], list[int]]:
        """Returns a draft of at most `wanted` [R] tokens for each row, and how many the drafter put before its end."""
        rows = [self.rows[slot] for slot in slots]
        if not wanted.any():
            return [[] for _ in rows], [0] * len(rows)
        behind = torch.tensor([row.length for row in rows]) - self.drafter_cache.lengths[slots]
        pending = behind.masked_fill(wanted == 0, 0)
        hidden = self._hidden(self.drafter, self.drafter_cache, slots, index, (pending + wanted).clamp_min(1))
        self.drafter_cache.advance(pending, index)
        for row, number in zip(rows, wanted.tolist(), strict=True):
            row.auxiliary_nfe += number > 0
        logits = self._logits(self.drafter, hidden, pending, wanted)
        top = logits.log_softmax(dim=-1).topk(min(self.sampler.candidates, self.vocab_size))
        mass = top.values.exp()
        count = (mass.cumsum(dim=1) - mass < self.sampler.nucleus).sum(dim=1, keepdim=True)
        # The draft's one wait for the device; a double holds any token id.
        table = torch.cat((top.values.double(), top.indices.double(), count.double()), dim=1).tolist()
        width = top.values.size(1)
        options = [
            [(int(token), log_p) for token, log_p in zip(line[width:], line[: int(line[-1])], strict=False)]
            for line in table
        ]
        drafts, lengths, start = [], [], 0
        for slot, row, number in zip(slots, rows, wanted.tolist(), strict=True):
            candidates = options[start : start + number]
            start += number
            ends = (place for place, [(token, _), *_] in enumerate(candidates) if token in self.terminators)
            lengths.append(next(ends, number))
            context = self.canvas[slot, max(0, row.length - 2) : row.length].tolist()
            assert row.proxy is not None or not candidates
            search = (self.sampler.beam, self.sampler.mix, self.terminators)
            drafts.append(search_path(candidates, context, row.proxy, *search) if row.proxy is not None else [])
        return drafts, lengths

    def _verify(self, slots: list[int], index: Tensor | None, drafts: list[list[int]]) -> list[list[int]]:
        """Returns what the model says at each place of each draft, and behind it."""
        rows = [self.rows[slot] for slot in slots]
        idle = torch.tensor([row.index < 0 for row in rows])
        for slot, row, draft in zip(slots, rows, drafts, strict=True):
            self.canvas[slot, row.length : row.length + len(draft)] = torch.tensor(
                draft, dtype=torch.long, device=self.device
            )
            row.nfe += row.index >= 0
        length = torch.tensor([len(draft) for draft in drafts])
        pending = torch.tensor([row.length for row in rows]) - self.cache.lengths[slots]
        hidden = self._hidden(self.model, self.cache, slots, index, (pending + length).masked_fill(idle, 1))
        self.cache.advance(pending.masked_fill(idle, 0), index)
        places = (length + 1).masked_fill(idle, 0)
        said = iter(self._logits(self.model, hidden, pending - 1, places).argmax(dim=-1).tolist())  # a wait
        return [[next(said) for _ in range(number)] for number in places.tolist()]

    def _hidden(
        self, model: Transformer, cache: KVCache, slots: list[int], index: Tensor | None, windows: Tensor
    ) -> Tensor:
        """Returns the hidden states [R, L, hidden] of the `windows` [R] behind what the cache holds."""
        text = None
        if model.config.causal_context:
            text = torch.tensor([self.rows[slot].length for slot in slots]) - cache.lengths[slots]
        cache.open(int(windows.max()), windows, index, left_to_right=text)
        canvas = self.canvas if index is None else self.canvas[slots]
        return model.hidden_states(canvas.gather(1, cache.positions), cache=cache)

    def _logits(self, model: Transformer, hidden: Tensor, shift: Tensor, counts: Tensor) -> Tensor:
        """Returns the logits [M, V] of the `counts` [R] places that begin `shift` [R] into the forward."""
        offsets = torch.arange(int(counts.max()))
        places = (torch.arange(len(counts)) * hidden.size(1) + shift)[:, None] + offsets
        where = offsets < counts[:, None]
        return self.score(model, hidden, places.to(self.device), where.to(self.device), int(counts.sum()))[1]

    def _accept(self, slot: int, draft: list[int], drafted: int, said: list[int]) -> None:
        """Adds what the model confirms of a draft and its own next token; ends the row when it is complete."""
        row, start = self.rows[slot], self.rows[slot].length
        accepted = next((n for n, token in enumerate(draft) if token != said[n]), len(draft))
        new = said[: accepted + 1]
        end = next((n for n, token in enumerate(new) if token in self.terminators), -1)
        new = new[:end] if end >= 0 else new
        self._adapt(row, drafted, accepted)
        assert row.proxy is not None
        row.proxy.add(new, self.canvas[slot, max(0, start - 2) : start].tolist())
        row.length = stop = start + len(new)
        self.canvas[slot, start : start + len(draft) + 1] = self.mask_id
        self.canvas[slot, start:stop] = torch.tensor(new, dtype=torch.long, device=self.device)
        self.committed_at[slot, start:stop] = row.nfe
        self.cache.lengths[slot] = start + accepted
        reason = "eos" if end >= 0 else "length" if stop - row.prompt_length == self.limit else None
        self.tell(slot, stop, reason)

    def _adapt(self, row: SpeculativeRow, drafted: int, accepted: int) -> None:
        """Sets the length of the row's next draft from running means of the last ones (equations 10 and 11)."""
        row.mean_drafted += SMOOTHING * (drafted - row.mean_drafted)
        row.mean_accepted += SMOOTHING * (accepted - row.mean_accepted)
        length = int(row.mean_drafted) + (GROWTH if row.mean_accepted >= row.mean_drafted else 0)
        row.draft_length = min(max(length, self.sampler.shortest_draft), self.sampler.longest_draft)


@dataclass(eq=False)
class DiffuSpecSampler(EngineSampler):
    """Decodes an autoregressive model greedily; a diffusion model drafts for it, many tokens at once.

    One forward of the drafter predicts the next tokens all at once. A beam search picks the draft that also a causal
    n-gram model finds likely. The longest part of it that the model would have said itself is accepted, and the token
    that the model says behind it. So the text is the model's own, token for token.

    Args:
        drafter: Checkpoint of a diffusion model with the same tokenizer: run folder, `.ckpt` or exported folder.
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

    engine: ClassVar[type[Engine[Any]]] = SpeculativeEngine
    causal: ClassVar[bool] = True

    drafter: str
    _: KW_ONLY
    shortest_draft: int = 20
    longest_draft: int = 30
    nucleus: float = 0.8
    candidates: int = 15
    beam: int = 3
    mix: float = 0.5
    corpus: str | None = None
    temperature: float = field(init=False, default=0.0)
    top_k: int = field(init=False, default=0)
    top_p: float = field(init=False, default=1.0)
    seed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least_one("shortest_draft", "candidates", "beam")
        if self.longest_draft < self.shortest_draft:
            raise UserError(
                f"sampler.longest_draft {self.longest_draft} is below shortest_draft {self.shortest_draft}: raise it"
            )
        if not (0 < self.nucleus <= 1 and 0 <= self.mix <= 1):
            raise UserError(f"sampler needs nucleus in (0, 1] and mix in [0, 1], got {self.nucleus} and {self.mix}")
        self.auxiliary = AuxiliaryModel("drafter", self.drafter, causal=False)
        self._shared: NGramModel | None = None

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if not model.config.causal:
            raise UserError(
                "DiffuSpec decodes an autoregressive checkpoint, and this one is bidirectional: it can be the drafter"
            )
        return super().decode(model, prompts, request)

    def counts(self, vocab_size: int) -> NGramModel | None:
        """Returns the n-gram model of the corpus, counted once; None without a corpus."""
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
