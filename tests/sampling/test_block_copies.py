"""Copies of a block in one forward against forwards of their own."""

import numpy as np
import torch
from test_block_diffusion import random_model

from dllm_var.model import KVCache
from dllm_var.sampling.block_copies import lay_out

PREFIXES, PENDING, WIDTH, COPIES = [4, 7, 2, 5], [0, 3, 0, 0], [3, 3, 2, 0], [2, 0, 1, 0]


def prefilled(model):
    """A cache whose rows hold prompts of different lengths."""
    cache = KVCache(model.config, len(PREFIXES), 32, "cpu", torch.float32)
    prompts = torch.randint(5, 19, (len(PREFIXES), max(PREFIXES)))
    cache.open(max(PREFIXES), np.array(PREFIXES))
    model.hidden_states(prompts, cache=cache)
    cache.advance(np.array(PREFIXES))
    return cache


def test_windows_repeat_the_block_s_positions():
    layout = lay_out(*map(np.array, (PREFIXES, PENDING, WIDTH, COPIES)), torch.device("cpu"))
    assert layout.positions[0].tolist() == [4, 5, 6] * 3  # three versions of a block of three
    assert layout.copy[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert layout.positions[1, :6].tolist() == [7, 8, 9, 10, 11, 12] and not layout.copy[1, :6].any()
    assert layout.positions[2, :4].tolist() == [2, 3, 2, 3]
    assert layout.real.sum(dim=1).tolist() == [9, 6, 4, 0]  # the last row has nothing to forward


def test_copies_that_do_not_see_each_other_equal_forwards_of_their_own():
    torch.manual_seed(1)
    model = random_model()
    with torch.no_grad():
        cache = prefilled(model)
        layout = lay_out(cache.lengths, *map(np.array, (PENDING, WIDTH, COPIES)), torch.device("cpu"))
        tokens = torch.randint(5, 20, layout.copy.shape)
        layout.open(cache, layout.copy[:, :, None] == layout.copy[:, None], causal_context=False)
        together = model.hidden_states(tokens, cache=cache)
        assert torch.isfinite(together).all()
        for row in range(3):
            for copy in range(COPIES[row] + 1):
                mine = (layout.copy[row] == copy) & layout.real[row]
                alone = KVCache(model.config, 1, 32, "cpu", torch.float32)
                alone.storage[:, :, 0], alone.lengths[0] = cache.storage[:, :, row], PREFIXES[row]
                alone.open(int(mine.sum()))
                expected = model.hidden_states(tokens[row, mine][None], cache=alone)
                torch.testing.assert_close(together[row, mine], expected[0], atol=1e-5, rtol=1e-4)
