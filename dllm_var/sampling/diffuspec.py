"""Speculative decoding with a diffusion model as drafter (DiffuSpec, arXiv 2510.02358)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.files import read_text
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.auxiliary import AuxiliaryModel
from dllm_var.sampling.base import Request
from dllm_var.sampling.engine import Batch, Engine, EngineSampler, Row

GROWTH = 10  # delta of equation 11: how much longer the next draft is while everything is accepted
SMOOTHING = 0.5  # rho of equation 10: weight of the latest draft in the running means
ORDER = 3  # trigrams, as in the paper
CONCENTRATION = 4.0  # how many counts the shorter context's prediction is worth


class NGramModel:
    """Counts of n-grams, in text shared by all requests and in one request's own, as a causal language model.

    Each order is smoothed with the next shorter one's prediction (Dirichlet prior, MacKay and Peto 1995), single tokens
    with the uniform distribution, one count each.

    Args:
        vocab_size: Number of token ids.
        shared: Another model whose counts count, too.
    """

    def __init__(self, vocab_size: int, shared: NGramModel | None = None) -> None:
        self.vocab_size = vocab_size
        self.counts: Counter[tuple[int, ...]] = Counter()
        self.contexts: Counter[tuple[int, ...]] = Counter()
        self.sources = [self] if shared is None else [shared, self]

    def add(self, tokens: Iterable[int], context: Sequence[int] = ()) -> None:
        """Counts tokens that stand behind a context."""
        row = [*context[-(ORDER - 1) :]] if context else []
        for token in tokens:
            for length in range(min(len(row), ORDER - 1) + 1):
                before = tuple(row[len(row) - length :])
                gram = (*before, token)
                self.counts[gram] += 1
                self.contexts[before] += 1
            row = [*row, token][-(ORDER - 1) :]

    def log_probability(self, context: Sequence[int], token: int) -> float:
        """Returns the logarithm of a token's probability behind a context, of which the last two tokens count."""
        seen = sum(source.counts[(token,)] for source in self.sources)
        probability = (seen + 1) / (sum(source.contexts[()] for source in self.sources) + self.vocab_size)
        for length in range(1, min(len(context), ORDER - 1) + 1):
            before = tuple(context[len(context) - length :])
            total = sum(source.contexts[before] for source in self.sources)
            if not total:
                break
            gram = (*before, token)
            seen = sum(source.counts[gram] for source in self.sources)
            probability = (seen + CONCENTRATION * probability) / (total + CONCENTRATION)
        return math.log(probability)


def search_path(
    candidates: Sequence[Sequence[tuple[int, float]]],
    context: Sequence[int],
    proxy: NGramModel,
    beam: int,
    mix: float,
    terminators: Sequence[int],
) -> list[int]:
    """Returns the draft on which the diffusion model and a causal proxy agree best: causal-consistency path search.

    A beam search from left to right; a path's score is the sum over its tokens of `mix` times the diffusion model's
    log-probability and `1 - mix` times the proxy's (section 4.2, equation 8). A path that takes a terminator ends
    there, and no path goes beyond the first position where a terminator is the most likely candidate; paths of
    different length are compared by their score per token.

    Args:
        candidates: For each position, tokens and their log-probabilities, the most likely one first.
        context: The tokens left of the draft.
        proxy: Predicts each token from those left of it.
        beam: Paths kept at each position.
        mix: Weight of the diffusion model, from 0 to 1.
        terminators: Tokens that end an answer.
    """
    paths: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    context = list(context[-(ORDER - 1) :])
    for options in candidates:
        longer = [
            (
                score + mix * log_p + (1 - mix) * proxy.log_probability([*context, *path[-(ORDER - 1) :]], token),
                path,
                token,
            )
            for score, path in paths
            for token, log_p in options
        ]
        longer.sort(key=lambda entry: -entry[0])  # stable: of equals the first
        paths = []
        for score, path, token in longer[:beam]:
            (ended if token in terminators else paths).append((score, [*path, token]))
        if not paths or options[0][0] in terminators:
            break
    best = max([*ended, *paths], key=lambda entry: entry[0] / max(len(entry[1]), 1))
    return best[1]


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
        # The slack is for padding: what the drafter has not read yet, and a draft behind it, beside rows near the end.
        super().__init__(sampler, model, prompts, request, slack=2 * sampler.longest_draft + 1)
        self.drafter = sampler.auxiliary.beside(model, request)
        self.cache, self.drafter_cache = self.add_cache(model), self.add_cache(self.drafter)
        assert model.config.vocab_size is not None
        self.vocab_size = model.config.vocab_size
        self.shared = sampler.counts(self.vocab_size)

    def start(self, slot: int) -> None:
        row = self.rows[slot]
        row.length, row.draft_length = row.prompt_length, self.sampler.longest_draft
        row.proxy = NGramModel(self.vocab_size, self.shared)
        row.proxy.add(self.prompts[row.index])

    def forward(self, batch: Batch[SpeculativeRow]) -> None:
        """Takes rows one draft and its verification further."""
        # One token comes from the model itself, so the last one is never drafted.
        wanted = [
            min(row.draft_length, self.limit - (row.length - row.prompt_length) - 1) if row.index >= 0 else 0
            for row in batch.rows
        ]
        drafts, lengths = self._draft(batch, torch.tensor(wanted))
        expected = self._verify(batch, drafts)
        for slot, draft, length, said in zip(batch.slots, drafts, lengths, expected, strict=True):
            if self.rows[slot].index >= 0:
                self._accept(slot, draft, length, said)

    def _unread(self, batch: Batch[SpeculativeRow], cache: KVCache) -> Tensor:
        """Returns how many tokens of each row a cache lacks [R]."""
        return torch.tensor([row.length for row in batch.rows]) - cache.lengths[batch.slots]

    def _draft(self, batch: Batch[SpeculativeRow], wanted: Tensor) -> tuple[list[list[int]], list[int]]:
        """Returns a draft of at most `wanted` [R] tokens for each row, and how many the drafter put before its end."""
        if not wanted.any():
            return [[] for _ in batch.rows], [0] * len(batch.rows)
        unread = self._unread(batch, self.drafter_cache).masked_fill(wanted == 0, 0)
        hidden = self.read(batch, unread + wanted, unread, self.drafter, self.drafter_cache)
        logits = self._logits(self.drafter, hidden, unread, wanted)
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
        for slot, row, number in zip(batch.slots, batch.rows, wanted.tolist(), strict=True):
            candidates = options[start : start + number]
            start += number
            row.auxiliary_nfe += number > 0
            ends = (place for place, [(token, _), *_] in enumerate(candidates) if token in self.terminators)
            lengths.append(next(ends, number))
            context = self.canvas[slot, max(0, row.length - 2) : row.length].tolist()
            search = (self.sampler.beam, self.sampler.mix, self.terminators)
            drafts.append([] if row.proxy is None else search_path(candidates, context, row.proxy, *search))
        return drafts, lengths

    def _verify(self, batch: Batch[SpeculativeRow], drafts: list[list[int]]) -> list[list[int]]:
        """Returns what the model says at each place of each draft, and behind it."""
        for slot, row, draft in zip(batch.slots, batch.rows, drafts, strict=True):
            self.canvas[slot, row.length : row.length + len(draft)] = self._tensor(draft)
            row.nfe += row.index >= 0
        length = torch.tensor([len(draft) for draft in drafts])
        unread = self._unread(batch, self.cache)
        hidden = self.read(batch, unread + length, unread)
        places = (length + 1).masked_fill(torch.tensor([row.index < 0 for row in batch.rows]), 0)
        said = iter(self._logits(self.model, hidden, unread - 1, places).argmax(dim=-1).tolist())  # a wait
        return [[next(said) for _ in range(number)] for number in places.tolist()]

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.long, device=self.device)

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
        self.canvas[slot, start:stop] = self._tensor(new)
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

    engine = SpeculativeEngine
    causal = True

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
        self.check_range(1, math.inf, "shortest_draft", "candidates", "beam")
        self.check_range(0, 1, "mix")
        if self.longest_draft < self.shortest_draft:
            raise UserError(
                f"sampler.longest_draft {self.longest_draft} is below shortest_draft {self.shortest_draft}: raise it"
            )
        if not 0 < self.nucleus <= 1:
            raise UserError(f"sampler.nucleus must be in (0, 1], got {self.nucleus}")
        self.auxiliary = AuxiliaryModel("drafter", self.drafter, causal=False)
        self._shared: NGramModel | None = None

    def counts(self, vocab_size: int) -> NGramModel | None:
        """Returns the n-gram model of the corpus, counted once; None without a corpus."""
        if self.corpus is not None and self._shared is None:
            try:
                lines = read_text(Path(self.corpus)).splitlines()
            except UserError as error:
                raise UserError(f"sampler.corpus: {error}") from error
            tokenizer = self.auxiliary.tokenizer
            self._shared = NGramModel(vocab_size)
            for tokens in tokenizer.encode_batch([line for line in lines if line.strip()]):
                self._shared.add([*tokens, tokenizer.terminator_id])
        return self._shared
