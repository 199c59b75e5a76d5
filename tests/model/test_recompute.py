"""Activation checkpointing: the same gradients from less memory, also with documents, causal and compiled."""

import pytest
import torch

from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.attention import LEAST_LENGTH
from dllm_var.module import can_compile

SHAPE = dict(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=50, initializer_range=0.2)


def gradients(policy, segments=None, compiled=False, **changes):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SHAPE, **changes}))
    model.recompute_activations(policy)
    if compiled:
        model.compile_layers()
    length = 48 if segments is None else segments.size(1)
    tokens = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))
    model(tokens, None, segments).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("length", [None, 48, LEAST_LENGTH])  # everything, documents with a mask, one by one
@pytest.mark.parametrize("changes", [{}, {"causal": True, "qk_norm": True}])
def test_gradients_are_the_same(policy, length, changes):
    segments = None if length is None else torch.arange(length).expand(2, -1) // 7
    for ours, kept in zip(gradients(policy, segments, **changes), gradients("none", segments, **changes), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
@pytest.mark.parametrize(("policy", "length"), [("full", None), ("none", 48), ("selective", LEAST_LENGTH)])
def test_compiled_gradients_are_the_same(policy, length):
    segments = None if length is None else torch.arange(length).expand(2, -1) // 7
    for ours, eager in zip(gradients(policy, segments, compiled=True), gradients("none", segments), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)


def test_less_is_kept():
    """Bytes that the graph holds between forward and backward, counted by their storages."""

    def kept(policy):
        model = Transformer(TransformerConfig(**{**SHAPE, "num_layers": 6}))
        model.recompute_activations(policy)
        with Storages() as storages:
            loss = model(torch.zeros(2, 64, dtype=torch.long)).square().mean()
        held = storages.alive()
        loss.backward()
        return held

    everything, selective, full = kept("none"), kept("selective"), kept("full")
    assert full < selective < everything
    assert selective < 0.7 * everything and full < 0.25 * everything


class Storages(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every storage that operations make, and which of them are still alive."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = (torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage))
        return result

    def alive(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())
