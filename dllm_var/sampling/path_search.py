"""From a diffusion model's candidates to one draft that reads well from left to right (DiffuSpec, 2510.02358)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

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
