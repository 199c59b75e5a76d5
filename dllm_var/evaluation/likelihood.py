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

    part: int  # index of the continuation, or of its block
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
            on_pair: Called once for each pair with a continuation, as its turn comes.

        Raises:
            UserError: For a model with `causal_context` and no `block_length`.
        """
        if model.config.causal_context and not self.block_length:
            raise UserError(
                "this checkpoint reads what is finished from left to right (causal_context): its likelihoods need the "
                "block length it was trained with (evaluate --mc-block-length)"
            )
        causal = model.config.causal
        parts: list[Pair] = []  # scored on their own: whole continuations, or their blocks given those before them
        owners: list[int] = []
        for index, (context, continuation) in enumerate(pairs):
            length = self.block_length if self.block_length and not causal else max(len(continuation), 1)
            for start in range(0, len(continuation), length):
                parts.append(([*context, *continuation[:start]], continuation[start : start + length]))
                owners.append(index)
        order = sorted(range(len(parts)), key=lambda part: sum(map(len, parts[part])), reverse=True)
        rows = (row for part in order for row in self._rows(part, parts[part], model))
        sums, greedy = [0.0] * len(parts), [True] * len(parts)
        begun: set[int] = set()
        for batch in _chunks(rows, self.batch_size):
            for row, loss, guess in zip(batch, *predict(model, batch), strict=True):
                sums[row.part] -= row.weight * float(loss.double().sum())
                greedy[row.part] &= guess.tolist() == row.targets
                if owners[row.part] not in begun:
                    begun.add(owners[row.part])
                    on_pair()
        if not causal:
            greedy = self.decoded_greedily(model, parts) if decode else [False] * len(parts)
        totals, same = [0.0] * len(pairs), [causal or decode] * len(pairs)
        for owner, total, is_greedy in zip(owners, sums, greedy, strict=True):
            totals[owner] += total
            same[owner] &= is_greedy
        return [Score(total, is_greedy) for total, is_greedy in zip(totals, same, strict=True)]

    def _rows(self, part: int, pair: Pair, model: Transformer) -> Iterator[Row]:
        """Yields the rows of a continuation; their weighted log-probabilities add up to its score."""
        context, continuation = pair
        if model.config.causal:
            tokens = [*context, *continuation]
            columns = list(range(len(context) - 1, len(tokens) - 1))
            yield Row(part, tokens[:-1], len(context), columns, list(continuation), 1.0)
            return
        for hidden, weight in self.masks(pair):
            yield self._row(part, pair, hidden, weight, model)

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
                    same[row.part] = token == row.targets[place]
                    del hidden[row.part][place]
                    if not same[row.part] or not hidden[row.part]:
                        del hidden[row.part]
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


def predict(model: Transformer, rows: Sequence[Row]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Returns cross-entropies and most likely tokens of the scored columns, for each row."""
    targets = torch.tensor([token for row in rows for token in row.targets], device=model.embedding.weight.device)

    def read(logits: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        return cross_entropy(logits, targets[positions], reduction="none"), logits.argmax(dim=-1)

    return _from_logits(model, rows, read)


def most_confident(model: Transformer, rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Returns for each row the scored column whose best token has the highest probability, and that token."""
    mask, _ = special_ids(model)

    def read(logits: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        logits[:, mask] = -torch.inf
        best = logits.softmax(dim=-1).max(dim=-1)
        return best.values, best.indices

    found = []
    for row, confidence, tokens in zip(rows, *_from_logits(model, rows, read), strict=True):
        place = int(confidence.argmax())
        found.append((row.columns[place], int(tokens[place])))
    return found


def _from_logits(
    model: Transformer, rows: Sequence[Row], read: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Returns two numbers for each scored column, row by row; `read` gives them for some logits [M, vocabulary].

    The head runs for some positions at a time: all logits at once would not fit into memory.
    """
    hidden = _hidden(model, rows)
    size = max(1, LOGITS_PER_CHUNK // model.lm_head.out_features)
    pieces = []
    for start in range(0, len(hidden), size):
        positions = slice(start, start + size)
        pieces.append([numbers.cpu() for numbers in read(model.lm_head(hidden[positions]).float(), positions)])
    counts = [len(row.columns) for row in rows]
    first, second = (torch.cat(numbers).split(counts) for numbers in zip(*pieces, strict=True))
    return first, second


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


def _key(pair: Pair) -> int:
    """Returns a number for a pair that leaves room for its draws."""
    tokens = array("q", [len(pair[0]), *pair[0], *pair[1]]).tobytes()
    return (int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little") >> 21) * _DRAWS_LIMIT


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
