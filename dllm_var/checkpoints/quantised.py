"""Quantised weights in files: as compressed-tensors packs them, which transformers, vLLM and SGLang read, too."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.quantised import Integers, dequantise

QUANTIZATION = "quantization_config"  # the entry of config.json
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"  # behind the name of a matrix
# What the entry may say of the weights beside bits and group; a key that is missing has the first value. `static` and
# `weight` reorder the columns while they are quantised, and not in the file.
_WEIGHTS: dict[str, tuple[Any, ...]] = {"type": ("int",), "symmetric": (True,), "dynamic": (False,)}
_WEIGHTS |= {"actorder": (None, "static", "weight")}

Readers = Mapping[str, Callable[[], Tensor]]


def write_quantization(integers: Integers, unquantised: list[str]) -> dict[str, Any]:
    """Returns the entry of config.json for a model whose linear layers but `unquantised` are integers."""
    strategy = "channel" if integers.group is None else "group"
    weights = {"num_bits": integers.bits, "type": "int", "symmetric": True, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": integers.group, "dynamic": False}}
    kind = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return {**kind, "config_groups": {"group_0": group}, "ignore": unquantised}


def read_quantization(values: Any, file: Path) -> Integers | None:
    """Returns how a folder's matrices are stored; raises UserError for a way that is not known here."""
    if values is None:
        return None
    try:
        (group,) = values["config_groups"].values()
        weights = group["weights"]
        bits, size, strategy = weights["num_bits"], weights.get("group_size"), weights["strategy"]
        activations = group.get("input_activations") or group.get("output_activations") or values.get("kv_cache_scheme")
        known = all(weights.get(key, allowed[0]) in allowed for key, allowed in _WEIGHTS.items()) and not activations
        whole = size is None if strategy == "channel" else strategy == "group" and isinstance(size, int) and size > 0
        if known and whole and values["format"] == "pack-quantized" and bits in (4, 8):
            return Integers(bits, size)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"{file} has a {QUANTIZATION} that is not known here; known are weights of 4 or 8 bits as export --quantize "
        "writes them (compressed-tensors, pack-quantized, symmetric)"
    )


def pack(weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of a file, by what follows the matrix's name, for integers of a `QuantisedLinear`."""
    halves = weight.dtype == torch.uint8
    shape = torch.tensor([len(weight), weight.size(1) * (2 if halves else 1)])
    # In files, integers are counted from the least one.
    shifted = weight.view(torch.uint8) ^ (0x88 if halves else 0x80)
    return {PACKED: shifted.contiguous().view(torch.int32), SCALE: scale, SHAPE: shape}


def unpacked(readers: Readers, integers: Integers) -> dict[str, Callable[[], Tensor]]:
    """Returns readers of a folder's weights, in which packed matrices are `weight` and `scale` as in a model."""

    def integers_of(name: str) -> Tensor:
        packed = readers[name]()
        if packed.dtype != torch.int32 or packed.dim() != 2:
            raise UserError(
                f"weight {name} is of type {packed.dtype} and shape {list(packed.shape)}, where a matrix of packed "
                "int32 is expected: the file is damaged, or not of its config"
            )
        shifted = packed.view(torch.uint8) ^ (0x88 if integers.bits == 4 else 0x80)
        return shifted if integers.bits == 4 else shifted.view(torch.int8)

    result: dict[str, Callable[[], Tensor]] = {}
    for name, read in readers.items():
        if name.endswith(SHAPE):
            continue
        matrix = name.removesuffix(PACKED)
        ours = f"{matrix}.weight" if matrix != name else name.removesuffix(SCALE) + ".scale" * name.endswith(SCALE)
        if ours in result:
            raise UserError(f"the files hold {ours} twice, packed and as it was: export the model again")
        result[ours] = read if matrix == name else partial(integers_of, name)
    return result


def read_numbers(readers: Readers, name: str) -> Tensor:
    """Reads a weight; a matrix of integers as the numbers that they stand for."""
    value, read_scale = readers[name](), readers.get(scale_of(name))
    if read_scale is None:
        return value
    scale = read_scale()
    return dequantise(value, scale, scale.dtype)


def dequantised(readers: Readers) -> dict[str, Callable[[], Tensor]]:
    """Returns readers of the weights as numbers, without the scales."""
    return {name: partial(read_numbers, readers, name) for name in readers if not name.endswith(".scale")}


def scale_of(name: str) -> str:
    """Returns the name of the scales of a quantised weight."""
    return name.removesuffix(".weight") + ".scale"
