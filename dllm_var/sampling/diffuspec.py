"""Speculative decoding with a diffusion model as drafter (DiffuSpec, arXiv 2510.02358)."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dllm_var.files import read_text
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.auxiliary import AuxiliaryModel
from dllm_var.sampling.base import Request
from dllm_var.sampling.drawing import log_probabilities
from dllm_var.sampling.engine import Batch, Engine, EngineSampler, Row

GROWTH = 10  # delta of equation 11: how much longer the next draft is while everything is accepted
SMOOTHING = 0.5  # rho of equation 10: weight of the latest draft in the running means
ORDER = 3  # trigrams, as in the paper
CONCENTRATION = 4.0  # how many counts the shorter context's prediction is worth


class NGramModel:
    """A causal language model: counts of n-grams in a request's text, and in one that all requests share.

    Each order is smoothed with the next shorter one (Dirichlet prior, MacKay and Peto 1995), single tokens with the
    uniform distribution, one count each.
    """

    def __init__(self, vocab_size: int, shared: "NGramModel | None" = None) -> None:
        self.vocab_size = vocab_size
        self.counts: Counter[tuple[int | None, ...]] = Counter()  # `(*context, None)`: of all tokens behind a context
        self.shared = Counter() if shared is None else shared.counts

    def add(self, tokens: Sequence[int], context: Sequence[int] = ()) -> None:
        """Counts tokens that stand behind a context."""
        row = [*context, *tokens]
        for place in range(len(context), len(row)):
            for start in range(max(0, place - ORDER + 1), place + 1):
                behind = row[start:place]
                self.counts.update([(*behind, row[place]), (*behind, None)])

    def log_probability(self, context: Sequence[int], token: int) -> float:
        probability = 1 / self.vocab_size
        for length in range(min(len(context), ORDER - 1) + 1):
            behind = context[len(context) - length :]
            gram, every = (*behind, token), (*behind, None)
            weight = CONCENTRATION if length else self.vocab_size
            seen, total = self.counts[gram] + self.shared[gram], self.counts[every] + self.shared[every]
            probability = (seen + weight * probability) / (total + weight)
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

    A beam search from left to right keeps `beam` paths. A path's score is the sum over its tokens of `mix` times the
    diffusion model's log-probability and `1 - mix` times the proxy's (section 4.2, equation 8). `candidates` has for
    each position tokens and their log-probabilities, the most likely one first. A path that takes a terminator ends
    there, and no path goes beyond the first position where a terminator is the most likely candidate; paths of
    different length are compared by their score per token.
    """
    paths: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for options in candidates:
        longer = []
        for score, path in paths:
            before = [*context, *path][-(ORDER - 1) :]
            for token, log_p in options:
                gain = mix * log_p + (1 - mix) * proxy.log_probability(before, token)
                longer.append((score + gain, [*path, token]))
        longer.sort(key=lambda entry: -entry[0])  # stable: of equals the first
        paths = []
        for entry in longer[:beam]:
            (ended if entry[1][-1] in terminators else paths).append(entry)
        if not paths or options[0][0] in terminators:
            break
    return max([*ended, *paths], key=lambda entry: entry[0] / max(len(entry[1]), 1))[1]


@dataclass(eq=False)
class SpeculativeRow(Row):
    tokens: list[int] = field(default_factory=list)  # the prompt and the answer so far
    draft_length: int = 0  # most tokens of the next draft
    mean_drafted: float = 0.0  # running mean of how many tokens the drafter put before its end
    mean_accepted: float = 0.0  # running mean of how many tokens of a draft were accepted
    proxy: NGramModel = field(default_factory=lambda: NGramModel(1))


class SpeculativeEngine(Engine[SpeculativeRow]):
    """Rows `prompt | answer | draft | masks` with two caches.

    The model's cache holds all of a row but its newest token; the drafter's lacks all that came since the last draft.
    """

    sampler: "DiffuSpecSampler"
    row_class = SpeculativeRow
    free_share = 0.25

    def __init__(
        self, sampler: "DiffuSpecSampler", model: Transformer, prompts: list[list[int]], request: Request
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
        row.tokens, row.draft_length = [*self.prompts[row.index]], self.sampler.longest_draft
        row.proxy = NGramModel(self.vocab_size, self.shared)
        row.proxy.add(row.tokens)

    def forward(self, batch: Batch[SpeculativeRow]) -> None:
        drafts, lengths = self._draft(batch)
        for slot, row, draft in zip(batch.slots, batch.rows, drafts, strict=True):
            self._write(slot, len(row.tokens), draft)
            row.nfe += row.index >= 0
        # What the model says at each place of each draft, and behind it.
        logits = self._predict(batch, self.model, self.cache, torch.tensor([len(draft) for draft in drafts]), before=1)
        best = logits.argmax(dim=-1)
        known = log_probabilities(logits, best) if self.request.log_probabilities else torch.zeros(len(best))
        said, place = best.tolist(), 0  # the verification's one wait for the device
        for slot, row, draft, length in zip(batch.slots, batch.rows, drafts, lengths, strict=True):
            if row.index >= 0:
                own = slice(place, place + len(draft) + 1)
                self._accept(slot, draft, length, said[own], known[own])
                place = own.stop

    def _draft(self, batch: Batch[SpeculativeRow]) -> tuple[list[list[int]], list[int]]:
        """Returns a draft for each row, and how many tokens the drafter put before its end."""
        # One token comes from the model itself, so the last one is never drafted.
        left = [row.limit - (len(row.tokens) - row.prompt_length) - 1 for row in batch.rows]
        wanted = [min(row.draft_length, most) for row, most in zip(batch.rows, left, strict=True)]
        if not any(wanted):
            return [[] for _ in wanted], wanted
        logits = self._predict(batch, self.drafter, self.drafter_cache, torch.tensor(wanted))
        top = logits.log_softmax(dim=-1).topk(min(self.sampler.candidates, self.vocab_size))
        mass = top.values.exp()
        outside = mass.cumsum(dim=1) - mass >= self.sampler.nucleus
        # The draft's one wait for the device; a double holds any token id.
        table = torch.stack((top.indices.double(), top.values.double().masked_fill(outside, -math.inf)), dim=2).tolist()
        options = iter([[(int(token), log_p) for token, log_p in line if log_p > -math.inf] for line in table])
        search = (self.sampler.beam, self.sampler.mix, self.terminators)
        drafts, lengths = list[list[int]](), list[int]()
        for row, number in zip(batch.rows, wanted, strict=True):
            row.auxiliary_nfe += number > 0
            candidates = [next(options) for _ in range(number)]
            best = [position[0][0] for position in candidates]
            lengths.append(next((n for n, token in enumerate(best) if token in self.terminators), number))
            drafts.append(search_path(candidates, row.tokens[-2:], row.proxy, *search))
        return drafts, lengths

    def _predict(
        self, batch: Batch[SpeculativeRow], model: Transformer, cache: KVCache, behind: Tensor, before: int = 0
    ) -> Tensor:
        """Reads what a cache lacks of each row, and the `behind` [R] tokens of the canvas behind it, which it drops.

        Returns the logits [M, V] at the latter, and at the last `before` of the former, of all rows in use.
        """
        unread = torch.tensor([len(row.tokens) for row in batch.rows]) - cache.lengths[batch.slots]
        hidden = self.read(batch, unread + behind, unread, model, cache)
        counts = (behind + before) * torch.tensor([row.index >= 0 for row in batch.rows])
        offsets = torch.arange(int(counts.max()))
        places = (torch.arange(len(counts)) * hidden.size(1) + unread - before)[:, None] + offsets
        where = offsets < counts[:, None]
        return self.score(model, hidden, places.to(self.device), where.to(self.device), int(counts.sum()))[1]

    def _write(self, slot: int, place: int, tokens: list[int]) -> None:
        self.canvas[slot, place : place + len(tokens)] = torch.tensor(tokens, dtype=torch.long, device=self.device)

    def _accept(self, slot: int, draft: list[int], drafted: int, said: list[int], known: Tensor) -> None:
        """Adds what the model confirms of a draft and its own next token; ends the row when it is complete.

        `said` is what the model says at each place of the draft and behind it, `known` the log-probabilities of that.
        """
        row, start = self.rows[slot], len(self.rows[slot].tokens)
        accepted = next((n for n, token in enumerate(draft) if token != said[n]), len(draft))
        row.drafted, row.accepted = row.drafted + len(draft), row.accepted + accepted
        new = said[: accepted + 1]
        end = next((n for n, token in enumerate(new) if token in self.terminators), None)
        new = new[:end]
        # The next draft's length, from running means of the last ones (equations 10 and 11).
        row.mean_drafted += SMOOTHING * (drafted - row.mean_drafted)
        row.mean_accepted += SMOOTHING * (accepted - row.mean_accepted)
        length = int(row.mean_drafted) + (GROWTH if row.mean_accepted >= row.mean_drafted else 0)
        row.draft_length = min(max(length, self.sampler.shortest_draft), self.sampler.longest_draft)
        row.proxy.add(new, row.tokens[-(ORDER - 1) :])
        row.tokens += new
        stop = len(row.tokens)
        self._write(slot, start, [*new, *[self.mask_id] * (len(draft) + 1 - len(new))])
        self.committed_at[slot, start:stop] = row.nfe
        if self.request.log_probabilities:
            self.log_probabilities[slot, start:stop] = known[: stop - start]
        self.cache.lengths[slot] = start + accepted
        reason = "eos" if end is not None else "length" if stop - row.prompt_length == row.limit else None
        self.tell(slot, stop, reason)


@dataclass(eq=False)
class DiffuSpecSampler(EngineSampler):
    """Decodes an autoregressive model greedily; a diffusion model drafts for it, many tokens at once.

    One forward of the drafter predicts the next tokens. A beam search picks the draft that also a causal n-gram model
    finds likely. The longest part of it that the model would have said itself is accepted, and the token that the
    model says behind it. So the text is the model's own, token for token.

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
        self.check_range(self.shortest_draft, math.inf, "longest_draft")
        self.check_range(0, 1, "mix")
        if not 0 < self.nucleus <= 1:
            self.refuse("nucleus", "in (0, 1]")
        self.auxiliary = AuxiliaryModel("drafter", self.drafter, causal=False)
        self._shared: NGramModel | None = None

    def counts(self, vocab_size: int) -> NGramModel | None:
        if self.corpus is not None and self._shared is None:
            lines = [line for line in read_text(Path(self.corpus)).splitlines() if line.strip()]
            tokenizer, self._shared = self.auxiliary.loaded[1], NGramModel(vocab_size)
            for tokens in tokenizer.encode_batch(lines):
                self._shared.add([*tokens, tokenizer.terminator_id])
        return self._shared
