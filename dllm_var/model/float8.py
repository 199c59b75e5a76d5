"""Training with matrix products in 8 bits, through torchao: weights, gradients and checkpoints stay what they are."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from dllm_var.errors import UserError
from dllm_var.model.experts import refuse_experts
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
    """Raises UserError when `trainer.precision` is not bfloat16, or device or machine lack what `float8` needs."""
    least = CAPABILITY[float8.recipe]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if precision not in ("bf16-mixed", "bf16-true") and not float8.emulate:
        raise UserError(f"model.float8 needs trainer.precision bf16-mixed or bf16-true, not {precision}")
    if capability < least and not float8.emulate:
        found = "one of {}.{}".format(*capability) if device.type == "cuda" else device.type
        raise UserError(
            f"model.float8.recipe {float8.recipe} needs a CUDA device of compute capability {least[0]}.{least[1]}, "
            f"such as an H100, and found {found}: leave model.float8 out, or try it with --model.float8.emulate=true"
        )
    if find_spec("torchao") is None:
        raise UserError('model.float8 needs torchao: pip install "dllm-var[float8]"')


def use_float8(transformer: Transformer, float8: Float8) -> None:
    """Makes matrix products of the layers 8-bit ones, in place; names and types of the weights stay.

    The transformer may be on the meta device, and must not have been sharded, compiled or given adapters. Raises
    UserError when no matrix has sides that the hardware can do, or the model has experts.
    """
    refuse_experts(transformer.config, "model.float8")
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
    """Returns the names of all matrices of the layers whose sides the hardware can do.

    Embedding and head stay: the head runs on the few positions that have a loss, and accuracy hangs on it most.
    """
    return {
        name
        for name, module in transformer.layers.named_modules(prefix="model.layers")
        if isinstance(module, nn.Linear) and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    }
