"""Drawing tokens: the right distribution, and the same draws whatever the batch."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold
from dllm_var.sampling.drawing import LOGITS_PER_CHUNK, keep_likely, request_keys


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.5, 0, 1.0), (2.0, 6, 1.0), (1.0, 0, 0.8), (0.5, 6, 0.9)]
)
def test_tokens_are_drawn_from_the_tempered_distribution(temperature, top_k, top_p):
    """Pearson's chi-square against the softmax over the tokens that are kept; 15 chunks."""
    logits = torch.cat((torch.linspace(2.0, -2.5, 15), torch.tensor([-torch.inf])))[torch.randperm(16)]
    draws = 120_000
    tokens = BlockDiffusionSampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=3).draw(
        logits.expand(draws, -1), torch.arange(draws)
    )
    observed = torch.bincount(tokens, minlength=16).double()

    probabilities = (logits.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = order[: top_k or 16]
    within = probabilities[kept] / probabilities[kept].sum()
    kept = kept[(within.cumsum(0) - within) < top_p]
    kept = kept[probabilities[kept] > 0]
    expected = torch.zeros(16, dtype=torch.double)
    expected[kept] = draws * probabilities[kept] / probabilities[kept].sum()
    assert observed[expected == 0].sum() == 0 and expected[kept].min() > 5
    statistic = ((observed - expected)[kept].square() / expected[kept]).sum()
    chance = torch.special.gammaincc(torch.tensor((len(kept) - 1) / 2, dtype=torch.double), statistic / 2)
    assert chance > 1e-3


class PeakBytes(TorchDispatchMode):
    """Adds up the storages that operations make beside `given`, as long as they live; `most` is the largest sum."""

    def __init__(self, given):
        super().__init__()
        self.alive, self.now, self.most = {id(given.untyped_storage())}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.alive:
                storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
                self.alive.add(id(storage))
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, id(storage), size)
        return result

    def forget(self, storage, size):
        self.alive.remove(storage)
        self.now -= size


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 9}])
def test_drawing_needs_a_fraction_of_the_logits_memory(settings, monkeypatch):
    logits = torch.randn(256, 2048)
    draw, whole = BlockDiffusionSampler(temperature=1.0, **settings).draw, PeakBytes(logits)
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", logits.numel())
    with whole:
        expected = draw(logits, torch.arange(256))
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", logits.numel() // 32)
    with PeakBytes(logits) as chunked:
        tokens = draw(logits, torch.arange(256))
    assert torch.equal(tokens, expected)
    assert logits.nbytes < whole.most < 9 * logits.nbytes
    assert chunked.most < 0.3 * logits.nbytes


def test_top_k_and_top_p_keep_the_likely_tokens():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert keep_likely(logits, 1.0, 2, 1.0).isfinite().tolist() == [[False, True, True, False]]
    assert keep_likely(logits, 1.0, 0, 0.65).isfinite().tolist() == [[False, True, True, False]]
    assert keep_likely(logits, 1.0, 0, 0.71).isfinite().tolist() == [[False, True, True, True]]
    assert keep_likely(logits, 1.0, 0, 0.01).isfinite().tolist() == [[False, True, False, False]]
    # A low temperature sharpens the distribution before the nucleus is cut.
    assert keep_likely(logits, 0.1, 0, 0.9).isfinite().tolist() == [[False, True, False, False]]


def model():
    torch.manual_seed(0)
    config = TransformerConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=20, mask_id=19, terminator_ids=[3])
    config.initializer_range = 0.2
    return Transformer(config).eval()


def test_a_row_s_draws_do_not_depend_on_its_batch_but_on_the_seed():
    prompts = [[5, 6], [7], [8, 9, 10], [11, 12]]
    settings = dict(policy=ConfidenceThreshold(0.5), block_length=4, max_new_tokens=10, temperature=1.0)
    sampler = BlockDiffusionSampler(**settings, batch_size=2)
    together = [answer.tokens for answer in sampler.generate(model(), prompts)]
    assert together == [sampler.generate(model(), [prompt])[0].tokens for prompt in prompts]
    assert together != [a.tokens for a in BlockDiffusionSampler(**settings, seed=1).generate(model(), prompts)]
    assert together != [
        a.tokens for a in BlockDiffusionSampler(**{**settings, "temperature": 0.0}).generate(model(), prompts)
    ]


def test_the_same_prompt_twice_gets_two_samples():
    sampler = BlockDiffusionSampler(ConfidenceThreshold(0.5), block_length=4, max_new_tokens=10, temperature=1.0)
    first, second = sampler.generate(model(), [[5, 6], [5, 6]])
    assert first.tokens != second.tokens
    assert len(set(request_keys([[1], [1], [2], [1]]))) == 4


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        BlockDiffusionSampler(**settings)
