"""Log-likelihoods of continuations: exact for causal models, Monte-Carlo bounds for diffusion models."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dllm_var.errors import UserError
from dllm_var.model.attention import AttentionRule
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.objectives.base import KeyedNoise
from dllm_var.sampling.base import special_ids

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation
LOGITS_PER_CHUNK = 1 << 26  # 256 MiB of float32 logits at a time
_DRAWS_LIMIT = 1 << 20  # so many draws of one pair have noise of their own


class Score(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding of as many tokens gives it."""

    log_likelihood: float
    is_greedy: bool


class Part(NamedTuple):
    """A continuation, or one block of it behind those before it."""

    pair: int  # index of the pair it belongs to
    context: list[int]
    continuation: list[int]


class Row(NamedTuple):
    """One row of a forward."""

    part: Part
    tokens: list[int]  # some of them hidden
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
    a sum of such bounds. Models that read finished text from left to right (`causal_context`) need it; a block-causal
    model has its own blocks, and `canvas` then fills up the last one.

    Greedy decoding of a diffusion model, for `is_greedy`, commits the most confident token of the L, one per forward.

    Args:
        draws: Draws per pair.
        batch_size: Rows per forward.
        seed: Seed of the draws.
        canvas: Shows masks behind the continuation, up to a multiple of this length from its start, as block samplers
            do: the likelihood of the continuation, whether or not the text ends there. 0 shows nothing (LLaDA).
        block_length: Tokens scored together; the whole continuation when 0 (LLaDA).
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
        self, model: Transformer, pairs: Sequence[Pair], decode: bool = True, quiet: bool = True
    ) -> list[Score]:
        """Returns the score of each pair; an empty continuation has probability 1.

        The model is in eval mode; a causal one needs contexts of at least one token. Without `decode` no score of a
        diffusion model is greedy.
        """
        if model.config.causal_context and not self.block_length:
            raise UserError(
                "this checkpoint reads what is finished from left to right (causal_context): its likelihoods need the "
                "block length it was trained with (evaluate --mc-block-length)"
            )
        causal = model.config.causal
        totals, greedy = [0.0] * len(pairs), [causal or decode] * len(pairs)
        parts = [part for index, pair in enumerate(pairs) for part in self._parts(index, pair, model.config)]
        longest_first = sorted(parts, key=lambda part: len(part.context) + len(part.continuation), reverse=True)
        bar = tqdm(longest_first, unit=" likelihoods", disable=quiet)
        for batch in _chunks((row for part in bar for row in self._rows(part, model)), self.batch_size):
            for row, (log_probability, likeliest, _) in zip(batch, predict(model, batch), strict=True):
                totals[row.part.pair] += row.weight * float(log_probability.double().sum())
                if causal:
                    greedy[row.part.pair] = likeliest.tolist() == row.targets
        if decode and not causal:
            self._decode_greedily(model, parts, greedy)
        return list(map(Score, totals, greedy))

    def _parts(self, index: int, pair: Pair, config: TransformerConfig) -> Iterator[Part]:
        context, continuation = pair
        whole = max(len(continuation), 1)
        length = config.grid or (whole if config.causal else self.block_length or whole)
        first = len(context) % length if config.grid else 0  # tokens of the context in the first block
        for start in range(-first if continuation else 0, len(continuation), length):
            block = list(continuation[max(start, 0) : start + length])
            yield Part(index, [*context, *continuation[: max(start, 0)]], block)

    def _rows(self, part: Part, model: Transformer) -> Iterator[Row]:
        """Yields the rows of a part; their weighted log-probabilities add up to its score."""
        length = len(part.continuation)
        if model.config.causal:
            first = len(part.context) - 1
            tokens = [*part.context, *part.continuation[:-1]]
            yield Row(part, tokens, list(range(first, first + length)), part.continuation, 1.0)
        elif 2**length - 1 <= self.draws:
            for count in range(1, length + 1):
                for hidden in combinations(range(length), count):
                    yield self._row(part, hidden, 1 / (count * comb(length, count)), model)
        else:
            noise, key = KeyedNoise(self.seed), torch.tensor([_key(part)])
            start = float(noise.uniform(key, 1, stream=11))
            places = noise.uniform(key + torch.arange(self.draws), length, stream=12).argsort(dim=1).tolist()
            for number, order in enumerate(places):
                count = min(length, int((number + start) / self.draws * length) + 1)
                yield self._row(part, sorted(order[:count]), length / count / self.draws, model)

    def _decode_greedily(self, model: Transformer, parts: Sequence[Part], greedy: list[bool]) -> None:
        """Notes for each pair whether one-by-one decoding gives it; a pair is left at its first other token."""
        mask, _ = special_ids(model)
        hidden = {number: list(range(len(part.continuation))) for number, part in enumerate(parts)}
        while hidden:
            for batch in _chunks(list(hidden), self.batch_size):
                rows = [self._row(parts[number], hidden[number], 1.0, model) for number in batch]
                predicted = predict(model, rows, mask)
                for number, row, (_, likeliest, confidence) in zip(batch, rows, predicted, strict=True):
                    place = int(confidence.argmax())
                    greedy[row.part.pair] &= int(likeliest[place]) == row.targets[place]
                    del hidden[number][place]
                    if not greedy[row.part.pair] or not hidden[number]:
                        del hidden[number]

    def _row(self, part: Part, hidden: Sequence[int], weight: float, model: Transformer) -> Row:
        mask, _ = special_ids(model)
        tail = -len(part.continuation) % self.canvas if self.canvas else 0
        if self.canvas and model.config.grid:
            tail = -(len(part.context) + len(part.continuation)) % model.config.grid
        tokens = [*part.context, *part.continuation, *[mask] * tail]
        columns = [len(part.context) + place for place in hidden]
        for column in columns:
            tokens[column] = mask
        return Row(part, tokens, columns, [part.continuation[place] for place in hidden], weight)


def predict(model: Transformer, rows: Sequence[Row], banned: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Yields for each row, at its scored columns: log-probabilities of the targets, the likeliest tokens, and theirs.

    A `banned` token has probability 0. The head runs for some columns at a time: all logits would not fit into memory.
    """
    targets = torch.tensor([token for row in rows for token in row.targets], device=model.embedding.weight.device)
    size = max(1, LOGITS_PER_CHUNK // model.lm_head.out_features)
    pieces = []
    for hidden, wanted in zip(_hidden(model, rows).split(size), targets.split(size), strict=True):
        logits = model.lm_head(hidden).float()
        if banned is not None:
            logits[:, banned] = -torch.inf
        log_probabilities = logits.log_softmax(dim=-1)
        best = log_probabilities.max(dim=-1)
        pieces.append((log_probabilities.gather(1, wanted[:, None])[:, 0], best.indices, best.values))
    counts = [len(row.columns) for row in rows]
    return zip(*(torch.cat(part).cpu().split(counts) for part in zip(*pieces, strict=True)), strict=True)


def _hidden(model: Transformer, rows: Sequence[Row]) -> Tensor:
    """Returns the last hidden states at the scored columns [M, hidden]; rows do not see their padding."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(row.tokens) for row in rows])
    longest = int(lengths.max())
    tokens = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows], device=device)
    padding = (torch.arange(longest) >= lengths[:, None]).long().to(device)
    places = [number * longest + column for number, row in enumerate(rows) for column in row.columns]
    asked = torch.tensor(places, device=device)
    if not model.config.causal_context:
        segments = padding if not model.config.causal and int(lengths.min()) < longest else None
        return model.hidden_states(tokens, segment_ids=segments, asked=asked)
    starts = torch.tensor([len(row.part.context) for row in rows], device=device)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Left to right before the continuation; in it, all of the row."""
        to_the_left = (query >= key) & (padding[row, query] == padding[row, key])
        return to_the_left | ((query >= starts[row]) & (padding[row, key] == 0))

    return model.hidden_states(tokens, attention_rule=AttentionRule(sees, padding), asked=asked)


def _key(part: Part) -> int:
    """Returns a number for a context and a continuation, apart from the next one by as many as there may be draws."""
    tokens = array("q", [len(part.context), *part.context, *part.continuation]).tobytes()
    return (int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little") >> 21) * _DRAWS_LIMIT


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
