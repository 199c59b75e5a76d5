"""Training with matrix products in 8 bits, through torchao: weights, gradients and checkpoints stay what they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer

# Compute capability from which there are such products: Ada and Hopper, and Hopper for scales by the row.
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}
MULTIPLE = 16  # of both sides of a matrix, which the hardware asks for


@dataclass
class Float8:
    """Matrix products of the layers in 8-bit floats, forward and backward, scaled anew each time (torchao.float8).

    Args:
        recipe: What shares a scale: a tensor (`tensorwise`, the fastest), a row (`rowwise`, closer to 16 bits), or a
            row with gradients of weights in 16 bits (`rowwise_with_gw_hp`, the closest).
        emulate: Rounds to 8 bits and multiplies as ever: on any device, slowly, to see what it does to the loss.
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    emulate: bool = False


def check_float8(float8: Float8, device: torch.device, precision: str | int) -> None:
    """Raises UserError when activations are not in bfloat16, or device or machine lack what it needs.

    Args:
        float8: What is asked for.
        device: Where training runs.
        precision: `trainer.precision`.
    """
    if not float8.emulate:
        _check_device(float8.recipe, device, precision)
    if find_spec("torchao") is None:
        raise UserError('model.float8 needs torchao: pip install "dllm-var[float8]"')


def _check_device(recipe: str, device: torch.device, precision: str | int) -> None:
    if precision not in ("bf16-mixed", "bf16-true"):
        raise UserError(f"model.float8 needs trainer.precision bf16-mixed or bf16-true, not {precision}")
    least = CAPABILITY[recipe]
    wanted = ".".join(map(str, least))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < least:
        found = device.type if capability is None else "one of {}.{}".format(*capability)
        raise UserError(
            f"model.float8.recipe {recipe} needs a CUDA device of compute capability {wanted}, such as an H100, and "
            f"found {found}: leave model.float8 out, or try it with --model.float8.emulate=true"
        )


def use_float8(transformer: Transformer, float8: Float8) -> None:
    """Makes matrix products of a transformer's layers 8-bit ones; names and types of its weights stay.

    Args:
        transformer: Changed in place, before it is sharded, compiled or given adapters; may be on the meta device.
        float8: How.

    Raises:
        UserError: When no matrix has sides that the hardware can do.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = float8_matrices(transformer)
    if not names:
        raise UserError(
            f"model.float8: no matrix of this model has both sides a multiple of {MULTIPLE}: choose such a "
            "transformer.hidden_size and intermediate_size, or leave float8 out"
        )
    config = Float8LinearConfig.from_recipe_name(float8.recipe)
    # Gradients of weights are products over all tokens of a batch, whose number need not be a multiple.
    config = replace(config, emulate=float8.emulate, pad_inner_dim=True)
    convert_to_float8_training(transformer, config=config, module_filter_fn=lambda _, name: name in names)


def float8_matrices(transformer: Transformer) -> set[str]:
    """Returns the modules whose products are to be 8-bit: all matrices of the blocks that the hardware can do.

    Embedding and head stay: the head runs on the few positions that have a loss, and is what accuracy hangs on most.
    """
    return {
        name
        for name, module in transformer.named_modules()
        if name.startswith("model.layers.")
        and isinstance(module, nn.Linear)
        and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    }
