"""Attention that grows from causal to bidirectional while a causal model is adapted."""

import pytest
import torch

from dllm_var import DiffusionLM
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import TransformerConfig
from dllm_var.model.attention import document_rule
from dllm_var.model.build import build_transformer
from dllm_var.model.transformer import left_neighbours
from dllm_var.objectives import Autoregressive, BlockDiffusion

SMALL = TransformerConfig(hidden_size=16, num_layers=2, num_heads=2, initializer_range=0.3)


class AtStep:
    """What the module asks of a trainer."""

    def __init__(self, global_step):
        self.global_step = global_step


def module(attention="document", steps=10, token_shift=False, **settings):
    torch.manual_seed(0)
    config = TransformerConfig(**{**vars(SMALL), "token_shift": token_shift})
    model = DiffusionLM(config, attention=attention, attention_annealing=steps, **settings)
    data = PackedDataModule(batch_size=4, context_length=48, packing="best_fit", overhang=4)
    model.use_tokenizer(data.tokenizer)
    model.transformer = build_transformer(model.config)
    return model, data.rows("train").__getitems__(list(range(4)))


def hidden(model, batch, step):
    model._trainer = AtStep(step)
    noised = model.objective.corrupt(batch, model.noise)
    return model.hidden_at_loss(batch, noised), noised


def test_the_mask():
    shown = torch.tensor([[True, False, False, True]])
    expected = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(document_rule(torch.zeros(1, 4), True, shown).mask[0, 0], expected)
    segments = torch.tensor([[0, 0, 1, 1]])
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(document_rule(segments, True, shown).mask[0, 0], expected)


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("attention", ["document", "full"])
def test_it_begins_causal_and_ends_as_without(attention, token_shift):
    model, batch = module(attention, token_shift=token_shift)
    whole, noised = hidden(module(attention, steps=0, token_shift=token_shift)[0], batch, 0)
    begun, _ = hidden(model, batch, 0)
    half, _ = hidden(model, batch, 5)
    done, _ = hidden(model, batch, 10)
    assert torch.equal(done, whole)
    assert not torch.allclose(begun, whole, atol=1e-2) and not torch.allclose(half, whole, atol=1e-3)
    assert not torch.allclose(half, begun, atol=1e-3)
    # At first no token behind a position makes a difference to it: a causal model's own reading.
    position_ids, segment_ids = (
        (batch["position_ids"], batch["segment_ids"]) if attention == "document" else (None,) * 2
    )
    model.transformer.config.causal = True
    causal = model.transformer.hidden_states(noised.input_ids, position_ids, segment_ids)
    if token_shift:
        causal = causal.flatten(0, 1)[left_neighbours(noised.input_ids, segment_ids)]
    torch.testing.assert_close(begun, causal[noised.loss_mask], atol=1e-5, rtol=1e-5)


def test_what_is_shown_grows_and_does_not_depend_on_the_batch():
    model, batch = module()
    rows = batch["row"]
    seen = [(model.noise.uniform(rows, 48, 21) < step / 10) for step in range(11)]
    assert all((later | ~earlier).all() for earlier, later in zip(seen, seen[1:], strict=False))
    assert not seen[0].any() and seen[10].all()
    together, noised = hidden(model, batch, 5)
    alone, _ = hidden(model, {name: value[1:2] for name, value in batch.items()}, 5)
    mine = noised.loss_mask.nonzero()[:, 0] == 1
    torch.testing.assert_close(together[mine], alone, atol=1e-5, rtol=1e-5)


def test_validation_measures_the_model_as_it_will_be():
    model, batch = module()
    model.eval()
    whole, _ = hidden(module(steps=0)[0].eval(), batch, 0)
    assert torch.equal(hidden(model, batch, 0)[0], whole)


@pytest.mark.parametrize(("objective", "steps"), [(Autoregressive(), 5), (BlockDiffusion(), 5), (None, -1)])
def test_what_it_does_not_go_with(objective, steps):
    with pytest.raises(UserError, match="attention_annealing"):
        DiffusionLM(SMALL, objective, attention_annealing=steps)
