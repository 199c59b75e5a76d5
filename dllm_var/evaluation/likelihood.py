"""Log-likelihoods of continuations: exact for causal models, Monte-Carlo bounds for diffusion models."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dllm_var.errors import UserError
from dllm_var.model.attention import partly_causal_mask
from dllm_var.model.transformer import Transformer
from dllm_var.objectives.noise import KeyedNoise
from dllm_var.sampling.base import special_ids

T = TypeVar("T")
Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation
LOGITS_PER_CHUNK = 1 << 26  # 256 MiB of float32 logits at a time
_DRAWS_LIMIT = 1 << 20  # so many draws of one pair have noise of their own


class Score(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding of as many tokens gives it."""

    log_likelihood: float
    is_greedy: bool


class Row(NamedTuple):
    """One row of a forward."""

    pair: int  # index of its pair
    tokens: list[int]  # some of them hidden
    start: int  # column where the continuation begins
    columns: list[int]  # scored columns
    targets: list[int]  # true tokens of these
    weight: float  # of its log-probabilities in the sum


@dataclass(frozen=True)
class Likelihood:
    """Scores continuations of contexts.

    A causal model gives log p(x | c) exactly. A diffusion model bounds it: with L tokens in x, l of them hidden,

        log p(x | c) >= -E [ L / l * (cross-entropy summed over the l hidden tokens, given c and the others) ]

    where l is uniform in 1..L and every choice of l positions equally likely (LLaDA, arXiv 2502.09992, equation 6).
    The expectation is the mean over `draws` draws, whose l walk evenly over 1..L from a random start; where there are
    no more than `draws` choices in all (L up to 7 for 128), each is taken once and the bound is exact. A pair's draws
    come from the seed and its own tokens: they do not depend on the other pairs.

    With `block_length` the continuation is scored block by block, each given those before it, as block samplers decode:
    a sum of such bounds. Models that read finished text from left to right (`causal_context`) need it.

    Greedy decoding of a diffusion model, for `is_greedy`, commits the most confident token of the L, one per forward.

    Args:
        draws: Draws per pair.
        batch_size: Rows per forward.
        seed: Seed of the draws.
        canvas: Shows masks behind the continuation, up to a multiple of this length from its start, as block samplers
            do: the likelihood of the continuation, whether or not the text ends there. 0 shows nothing (LLaDA).
        block_length: Tokens scored together; the whole continuation when 0 (LLaDA).

    Raises:
        UserError: When a number is out of range.
    """

    draws: int = 128
    batch_size: int = 32
    seed: int = 0
    canvas: int = 0
    block_length: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= _DRAWS_LIMIT or self.batch_size < 1 or min(self.canvas, self.block_length) < 0:
            raise UserError(
                f"likelihood needs draws in 1..{_DRAWS_LIMIT}, batch_size >= 1, canvas >= 0 and block_length >= 0, got "
                f"{self.draws}, {self.batch_size}, {self.canvas} and {self.block_length}"
            )

    @torch.inference_mode()
    def __call__(
        self,
        model: Transformer,
        pairs: Sequence[Pair],
        decode: bool = True,
        on_pair: Callable[[], None] = lambda: None,
    ) -> list[Score]:
        """Returns the score of each pair; an empty continuation has probability 1.

        Args:
            model: A transformer in eval mode; a causal one needs contexts of at least one token.
            pairs: Contexts and continuations.
            decode: Decodes greedily, too; without it no score of a diffusion model is greedy.
            on_pair: Called once for each finished pair.

        Raises:
            UserError: For a model with `causal_context` and no `block_length`.
        """
        if model.config.causal_context and not self.block_length:
            raise UserError(
                "this checkpoint reads what is finished from left to right (causal_context): its likelihoods need the "
                "block length it was trained with (evaluate --mc-block-length)"
            )
        if self.block_length and not model.config.causal:
            return self._by_blocks(model, pairs, decode, on_pair)
        return self._score(model, pairs, decode, on_pair)

    def _by_blocks(
        self, model: Transformer, pairs: Sequence[Pair], decode: bool, on_pair: Callable[[], None]
    ) -> list[Score]:
        """Scores each block of the continuations with what stands before it as context, and adds up."""
        blocks: list[Pair] = []
        owner: list[int] = []
        for index, (context, continuation) in enumerate(pairs):
            for start in range(0, len(continuation), self.block_length):
                block = continuation[start : start + self.block_length]
                blocks.append(([*context, *continuation[:start]], block))
                owner.append(index)
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for index, score in zip(owner, self._score(model, blocks, decode, lambda: None), strict=True):
            totals[index] += score.log_likelihood
            greedy[index] &= score.is_greedy
        for _ in pairs:
            on_pair()
        return [Score(total, same) for total, same in zip(totals, greedy, strict=True)]

    def _score(
        self, model: Transformer, pairs: Sequence[Pair], decode: bool, on_pair: Callable[[], None]
    ) -> list[Score]:
        order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])), reverse=True)
        causal = model.config.causal
        rows = (row for i in order for row in (causal_rows(i, pairs[i]) if causal else self.rows(i, pairs[i], model)))
        sums = [0.0] * len(pairs)
        greedy = [True] * len(pairs)
        newest = None
        for batch in _chunks(rows, self.batch_size):
            losses, guesses = predict(model, batch)
            for row, loss, guess in zip(batch, losses, guesses, strict=True):
                sums[row.pair] -= row.weight * float(loss.double().sum())
                greedy[row.pair] &= guess.tolist() == row.targets
                if row.pair != newest:  # those before it are done
                    newest = row.pair
                    on_pair()
        if not causal:
            greedy = self.decoded_greedily(model, pairs) if decode else [False] * len(pairs)
        return [Score(total, same) for total, same in zip(sums, greedy, strict=True)]

    def rows(self, index: int, pair: Pair, model: Transformer) -> Iterator[Row]:
        """Yields a diffusion model's rows for one pair; their weighted log-probabilities add up to the estimate."""
        length = len(pair[1])
        if not length:
            return
        for hidden, weight in self.masks(pair):
            yield self._row(index, pair, hidden, weight, model)

    def masks(self, pair: Pair) -> Iterator[tuple[list[int], float]]:
        """Yields which positions of the continuation are hidden, with the weight of what is predicted there."""
        length = len(pair[1])
        if length < 32 and 2**length - 1 <= self.draws:
            for count in range(1, length + 1):
                for hidden in combinations(range(length), count):
                    yield list(hidden), 1 / (count * comb(length, count))
            return
        noise, key = KeyedNoise(self.seed), torch.tensor([_key(pair)])
        start = float(noise.uniform(key, 1, stream=11))
        places = noise.uniform(key + torch.arange(self.draws), length, stream=12).argsort(dim=1).tolist()
        for number, order in enumerate(places):
            count = min(length, int((number + start) / self.draws * length) + 1)
            yield sorted(order[:count]), length / count / self.draws

    def decoded_greedily(self, model: Transformer, pairs: Sequence[Pair]) -> list[bool]:
        """Whether one-by-one decoding gives each continuation; a pair is left at its first other token."""
        same = [True] * len(pairs)
        hidden = {index: list(range(len(pair[1]))) for index, pair in enumerate(pairs) if pair[1]}
        while hidden:
            for batch in _chunks(list(hidden), self.batch_size):
                rows = [self._row(index, pairs[index], hidden[index], 1.0, model) for index in batch]
                for row, (column, token) in zip(rows, most_confident(model, rows), strict=True):
                    place = row.columns.index(column)
                    same[row.pair] = token == row.targets[place]
                    del hidden[row.pair][place]
                    if not same[row.pair] or not hidden[row.pair]:
                        del hidden[row.pair]
        return same

    def _row(self, index: int, pair: Pair, hidden: list[int], weight: float, model: Transformer) -> Row:
        mask, _ = special_ids(model)
        context, continuation = pair
        tail = -len(continuation) % self.canvas if self.canvas else 0
        tokens = [*context, *continuation, *[mask] * tail]
        columns = [len(context) + place for place in hidden]
        for column in columns:
            tokens[column] = mask
        return Row(index, tokens, len(context), columns, [continuation[place] for place in hidden], weight)


def causal_rows(index: int, pair: Pair) -> Iterator[Row]:
    """Yields the one row of a causal model for a pair, none for an empty continuation."""
    context, continuation = pair
    if continuation:
        tokens = [*context, *continuation]
        columns = list(range(len(context) - 1, len(tokens) - 1))
        yield Row(index, tokens[:-1], len(context), columns, list(continuation), 1.0)


def predict(model: Transformer, rows: Sequence[Row]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Returns cross-entropies and most likely tokens of the scored columns, for each row."""
    hidden = _hidden(model, rows)
    targets = torch.tensor([token for row in rows for token in row.targets], device=hidden.device)
    losses, guesses = [], []
    size = _chunk(model)
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.lm_head(part).float()
        losses.append(cross_entropy(logits, wanted, reduction="none").cpu())
        guesses.append(logits.argmax(dim=-1).cpu())
    counts = [len(row.targets) for row in rows]
    return torch.cat(losses).split(counts), torch.cat(guesses).split(counts)


def most_confident(model: Transformer, rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Returns for each row the scored column whose best token has the highest probability, and that token."""
    hidden, (mask, _) = _hidden(model, rows), special_ids(model)
    confidences, tokens = [], []
    for part in hidden.split(_chunk(model)):
        logits = model.lm_head(part).float()
        logits[:, mask] = -torch.inf
        best = logits.softmax(dim=-1).max(dim=-1)
        confidences.append(best.values.cpu())
        tokens.append(best.indices.cpu())
    counts = [len(row.columns) for row in rows]
    found = []
    for row, confidence, token in zip(
        rows, torch.cat(confidences).split(counts), torch.cat(tokens).split(counts), strict=True
    ):
        place = int(confidence.argmax())
        found.append((row.columns[place], int(token[place])))
    return found


def _hidden(model: Transformer, rows: Sequence[Row]) -> Tensor:
    """Returns the last hidden states at the scored columns [M, hidden]; rows do not see their padding."""
    device = model.embedding.weight.device
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    padding = torch.ones(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        padding[number, : len(row.tokens)] = 0
    places = [number * longest + column for number, row in enumerate(rows) for column in row.columns]
    asked = torch.tensor(places, device=device)
    if model.config.causal_context:
        before = torch.arange(longest) < torch.tensor([row.start for row in rows])[:, None]
        seen = partly_causal_mask(torch.zeros_like(before), padding) | (~before[:, :, None] & (padding == 0)[:, None])
        return model.hidden_states(tokens.to(device), attention_mask=seen.to(device), asked=asked)
    segments = padding.to(device) if not model.config.causal and bool(padding.any()) else None
    return model.hidden_states(tokens.to(device), segment_ids=segments, asked=asked)


def _chunk(model: Transformer) -> int:
    """Returns for how many positions the head runs at a time."""
    return max(1, LOGITS_PER_CHUNK // model.lm_head.out_features)


def _key(pair: Pair) -> int:
    """Returns a number for a pair that leaves room for its draws."""
    tokens = array("q", [len(pair[0]), *pair[0], *pair[1]]).tobytes()
    return (int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little") >> 21) * _DRAWS_LIMIT


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
