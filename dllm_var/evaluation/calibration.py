"""Quantising a checkpoint for the inputs that its matrices have: documents with hidden tokens, as it is scored on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dllm_var.checkpoints.checkpoint import Checkpoint
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.evaluation.likelihood import Likelihood, Pair
from dllm_var.model.experts import refuse_experts
from dllm_var.model.gptq import gptq
from dllm_var.model.quantised import KINDS, QuantisedLinear, QuantizeName

RECORDS = 64  # that calibrate
LAYERS = 8  # whose inputs are summed together: as many sums take 8 GB in an 8B model


def calibrated(
    checkpoint: Checkpoint, pairs: Sequence[Pair], likelihood: Likelihood, quantize: QuantizeName, device: Any = "cpu"
) -> Checkpoint:
    """Returns the checkpoint with the matrices of its layers quantised by GPTQ, some layers after the others.

    Their inputs are those of the rows that score the pairs (QDLM, arXiv 2508.14896, calibrates on masked inputs, too),
    in the model whose earlier layers are quantised already.
    """
    integers = KINDS[quantize]
    model, _, _ = load_checkpoint(checkpoint, device)
    refuse_experts(model.config, f"the setting quantize {quantize}")
    model.train().eval()  # weights have memory of their own again
    for start in range(0, len(model.layers), LAYERS):
        layers: Any = model.layers[start : start + LAYERS]
        inputs = inputs_of(layers, lambda: likelihood(model, pairs, decode=False))
        for part in list(layers.modules()):
            for name, matrix in list(part.named_children()):
                if isinstance(matrix, nn.Linear):
                    quantised = QuantisedLinear(matrix, integers)
                    quantised.weight.data, quantised.scale.data = gptq(matrix.weight, inputs[matrix], integers)
                    setattr(part, name, quantised)
    state = model.state_dict().items()
    readers: dict[str, Callable[[], Tensor]] = {name: partial(Tensor.cpu, value) for name, value in state}
    return replace(checkpoint, weights=readers, quantised=integers, rows=model.config.vocab_size)


@torch.no_grad()
def inputs_of(layers: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Tensor]:
    """Returns for each linear layer in a module the sum of x x^T over its inputs x while a function runs."""
    sums: dict[nn.Module, Tensor] = {}

    def add(matrix: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        sums[matrix] = sums.get(matrix, 0) + x.t() @ x

    hooks = [part.register_forward_pre_hook(add) for part in layers.modules() if isinstance(part, nn.Linear)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sums
