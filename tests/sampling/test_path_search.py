"""The search for a draft against trying every path, and its n-gram model against counting by hand."""

from itertools import product
from math import exp, log

import pytest
import torch

from dllm_var.sampling.diffuspec import CONCENTRATION, NGramModel, search_path

END = 9


def test_probabilities_are_those_of_the_counts_and_sum_to_one():
    model = NGramModel(10)
    model.add([1, 2, 3, 1, 2, 4])
    unigram = {token: ([1, 2, 3, 1, 2, 4].count(token) + 1) / 16 for token in range(10)}
    behind_2 = {t: ((t in (3, 4)) + CONCENTRATION * unigram[t]) / (2 + CONCENTRATION) for t in range(10)}
    behind_12 = {t: ((t in (3, 4)) + CONCENTRATION * behind_2[t]) / (2 + CONCENTRATION) for t in range(10)}
    for context, expected in [((), unigram), ((7,), unigram), ((7, 2), behind_2), ((5, 1, 2), behind_12)]:
        for token in range(10):
            assert model.log_probability(context, token) == pytest.approx(log(expected[token]))
        assert sum(exp(model.log_probability(context, token)) for token in range(10)) == pytest.approx(1)


def test_text_in_pieces_counts_like_text_in_one():
    whole, pieces = NGramModel(10), NGramModel(10)
    whole.add([1, 2, 3, 4, 5])
    pieces.add([1, 2])
    pieces.add([3], [1, 2])
    pieces.add([4, 5], [1, 2, 3])
    assert whole.counts == pieces.counts


def test_shared_counts_add_to_a_request_s_own_and_stay_as_they_are():
    shared, together = NGramModel(10), NGramModel(10)
    shared.add([1, 2, 3])
    own = NGramModel(10, shared)
    own.add([1, 2, 4])
    together.add([1, 2, 3])
    together.add([1, 2, 4])
    for token in range(10):
        assert own.log_probability((1, 2), token) == together.log_probability((1, 2), token)
    assert shared.counts[(1, 2, 4)] == 0


def every_path(candidates, context, proxy, mix):
    """All paths of the lattice with their score per token: up to a terminator, or to the lattice's end."""
    last = next((i for i, options in enumerate(candidates) if options[0][0] == END), len(candidates) - 1)
    found = {}
    for choice in product(*candidates[: last + 1]):
        ends = [i for i, (token, _) in enumerate(choice) if token == END]
        choice = choice[: ends[0] + 1] if ends else choice
        tokens = [token for token, _ in choice]
        scores = [
            mix * log_p + (1 - mix) * proxy.log_probability([*context, *tokens[:i]][-2:], token)
            for i, (token, log_p) in enumerate(choice)
        ]
        found[tuple(tokens)] = sum(scores) / len(scores)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_a_beam_as_wide_as_the_lattice_finds_the_best_path(seed, mix):
    generator = torch.Generator().manual_seed(seed)
    proxy = NGramModel(10)
    proxy.add(torch.randint(0, 10, (200,), generator=generator).tolist())
    candidates = []
    for _ in range(4):
        log_p = (2 * torch.randn(10, generator=generator)).log_softmax(0).sort(descending=True)
        candidates.append(list(zip(log_p.indices.tolist()[:3], log_p.values.tolist()[:3], strict=True)))
    found = search_path(candidates, [3, 4], proxy, 3**4, mix, (END,))
    scores = every_path(candidates, [3, 4], proxy, mix)
    assert scores[tuple(found)] == pytest.approx(max(scores.values()))


def test_a_narrow_beam_keeps_the_best_prefixes_only():
    """The best path begins with the second best token; a beam of one cannot find it."""
    proxy = NGramModel(10)
    proxy.add([2, 5] * 200)
    candidates = [[(1, log(0.5)), (2, log(0.5))], [(5, log(0.5)), (6, log(0.5))]]
    proxy_free = search_path(candidates, [], proxy, 1, 1.0, (END,))
    assert proxy_free == [1, 5]
    assert search_path(candidates, [], proxy, 2, 0.5, (END,)) == [2, 5]


def test_no_path_goes_beyond_the_drafter_s_own_end():
    likely, unlikely = log(0.9), log(0.05)
    candidates = [[(1, likely), (END, unlikely)], [(END, likely), (2, unlikely)], [(3, likely)], [(4, likely)]]
    assert search_path(candidates, [], NGramModel(10), 3, 1.0, (END,)) == [1, END]
    assert search_path(candidates[:1], [], NGramModel(10), 3, 1.0, (END,)) == [1]
    assert search_path([], [], NGramModel(10), 3, 1.0, (END,)) == []
