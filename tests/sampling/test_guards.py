"""A model whose predictions are not numbers: every sampler says so, and tells no answer."""

import pytest
import torch

from dllm_var.sampling import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    DiffuSpecSampler,
    FixedLengthSampler,
    FreeDaveSampler,
    GuidedSampler,
    MultiBlockSampler,
    StridedSampler,
    WinoSampler,
)
from dllm_var.sampling.guards import NotFinite
from dllm_var.sampling.infilling import infill
from tests.sampling.tiny_models import MASK, random_model, save


def broken(causal, harm):
    """A model with NaN in one weight, or with weights whose products are too large for their type."""
    model = random_model(causal=causal)
    with torch.no_grad():
        if harm == "NaN":
            model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
        else:
            model.model.norm.weight.fill_(1e20)
            model.lm_head.weight.mul_(1e20)
    return model


@pytest.mark.parametrize(
    ("kind", "causal", "harm"),
    [
        (AutoregressiveSampler, True, "overflow"),
        (DiffuSpecSampler, True, "NaN"),
        (BlockDiffusionSampler, False, "NaN"),
        (BlockDiffusionSampler, False, "overflow"),
        (FixedLengthSampler, False, "NaN"),
        (FreeDaveSampler, False, "overflow"),
        (GuidedSampler, False, "NaN"),
        (MultiBlockSampler, False, "NaN"),
        (StridedSampler, True, "NaN"),
        (WinoSampler, False, "overflow"),
        (None, False, "NaN"),
    ],
)
def test_predictions_that_are_no_numbers_are_no_answer(kind, causal, harm, tmp_path):
    model, told = broken(causal, harm), []
    second = [save(random_model(1, causal=not causal), tmp_path)] if kind in (DiffuSpecSampler, GuidedSampler) else []
    telling = {"on_answer": lambda *answer: told.append(answer)}
    if kind is not None:
        telling |= {"on_block": telling["on_answer"], "max_new_tokens": 12}
    decode = infill if kind is None else kind(*second).generate
    with pytest.raises(NotFinite, match="not numbers"):
        decode(model, [[5, MASK, 6], [7, MASK]], **telling)
    assert not told
    assert not model.lm_head._forward_hooks  # it is watched no longer
