"""Opens checkpoints: published models by folder or hub name, folders of ours, runs, their checkpoints, and adapters.

Weights are read one at a time, when they are asked for. No code that comes with a checkpoint is run.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_var.checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    merge_adapters,
    named_as_in_model,
    read_adapter_settings,
    read_lora,
)
from dllm_var.checkpoints.archive import is_shard_folder, read_state, read_weights
from dllm_var.checkpoints.checkpoint import Checkpoint, Readers, decoding_config, weight_shapes
from dllm_var.checkpoints.config_json import family_of, read_config, read_settings, released_sampler
from dllm_var.checkpoints.families import EXTRAS, OTHER, Family
from dllm_var.checkpoints.quantised import (
    QUANTIZATION,
    dequantised,
    read_quantization,
    unpacked,
)
from dllm_var.checkpoints.run_checkpoint import check_or_offer, newest_checkpoint, read_identity, step_of
from dllm_var.checkpoints.weight_layout import as_ours, layout_of
from dllm_var.errors import UserError, one_line
from dllm_var.files import fits, read_object
from dllm_var.model.build import outline
from dllm_var.model.config import SIZES, TransformerConfig
from dllm_var.model.initialise import fill
from dllm_var.model.lora import Lora, is_adapter, plain_name
from dllm_var.model.quantised import Integers, QuantisedLinear, QuantizeName
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.text.tokenizer_files import TOKENIZER_FILES, download, is_hub_name

CONFIG, EXPORT_FOLDER = "config.json", "model"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
PREFIX = "transformer."  # of the weights' names in a checkpoint of a run
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]


def load_checkpoint(
    path: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: QuantizeName | None = None,
) -> tuple[Transformer, Tokenizer, dict[str, Any]]:
    """Loads a checkpoint to decode with: the transformer, its tokenizer, and what else it remembers (`sampler`, ...).

    `path` is a run folder, a `.ckpt`, a folder with `config.json` (our own or that of a published model, see
    docs/checkpoints.md), a published model's name on the hub, or what `open_checkpoint` returned. `dtype` converts the
    weights, and `quantize` keeps the matrices of the layers in 8 or 4 bits, as those of a quantised folder always are.
    A published model without a mask token gets one. Raises UserError for what is missing, damaged or not fully
    understood.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    tokenizer = checkpoint.load_tokenizer()
    model = _load(checkpoint, decoding_config(checkpoint, tokenizer), device, dtype, quantize)
    return model, tokenizer, checkpoint.meta


def load_pretrained(path: str | Path, causal: bool = False) -> Transformer:
    """Loads what `load_checkpoint` loads as a bare model from token ids [B, L] to logits [B, L, V].

    With `causal` it reads left to right, as published Llama and Qwen models were trained to; one of our own checkpoints
    that was trained causally always does. It is in eval mode and laid out for decoding: call `train()` to train it.
    """
    checkpoint = open_checkpoint(path)
    causal = causal or (checkpoint.config.causal and not checkpoint.published) or checkpoint.lora is not None
    return _load(checkpoint, replace(checkpoint.config, causal=causal))


def _load(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: QuantizeName | None = None,
) -> Transformer:
    """Builds a transformer without weights, fills it one weight at a time and lays them out for decoding."""
    transformer = outline(config, checkpoint.lora, checkpoint.stored_as(quantize))
    transformer.to(dtype or checkpoint.dtype)
    transformer.to_empty(device=device)
    transformer.tie_weights()
    copy_weights(transformer, checkpoint)
    transformer.fuse_projections()
    return transformer.eval()


@torch.no_grad()
def copy_weights(transformer: Transformer, checkpoint: Checkpoint) -> None:
    """Fills the transformer's weights, which may be sharded, one at a time; adapters that it lacks keep theirs.

    Quantised ones are taken over from a checkpoint that has such, else they are rounded.
    """
    own = {plain_name(name): value for name, value in transformer.state_dict().items()}
    modules = {plain_name(f"{name}.weight"): module for name, module in transformer.named_modules()}
    for name in weight_shapes(transformer.config, checkpoint.lora):
        matrix = modules.get(name)
        if isinstance(matrix, QuantisedLinear):
            shape = [matrix.out_features, matrix.in_features]
            weight, scale = checkpoint.integers(name, shape, matrix.integers, matrix.scale)
            matrix.weight.copy_(weight)
            matrix.scale.copy_(scale)
        else:
            fill(own[name], checkpoint.weight(name, list(own[name].shape)))


def open_checkpoint(path: str | Path, adapters: tuple[Path, ...] = ()) -> Checkpoint:
    """Looks at what `load_checkpoint` takes, and raises what it raises, without reading weights.

    The folder of an adapter means the model that it was trained on with the adapter merged in, or beside it where it
    acts on masks only, and then with `adapters`, by which it was named.
    """
    place = locate_checkpoint(path)
    if place in adapters:
        raise UserError(f"the adapter {place} is named as the checkpoint below itself: correct {ADAPTER_CONFIG}")
    if (place / ADAPTER_CONFIG).is_file():
        return _open_adapter(place, (*adapters, place))
    return _open_run_checkpoint(place) if place.is_file() or is_shard_folder(place) else _open_folder(place)


def locate_checkpoint(path: str | Path, files: list[str] = MODEL_FILES) -> Path:
    """Returns the model folder or the `.ckpt` that `path` means; the newest when a run has several.

    A hub name means a folder that has these files of the model.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if "/" in str(path) and is_hub_name(path):
            return download(str(path), "checkpoint", files)
        raise UserError(f"no checkpoint at {place}: give a run folder, a .ckpt file, a model folder or a hub name")
    if place.is_file() or is_shard_folder(place) or any((place / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        return place
    export = place / EXPORT_FOLDER
    newest = newest_checkpoint(place / "checkpoints") or newest_checkpoint(place)
    if (export / CONFIG).is_file() and (newest is None or not _goes_beyond(newest, export / CONFIG)):
        return export
    if newest is None:
        runs = {path.parent for name in ("checkpoints", EXPORT_FOLDER) for path in place.glob(f"**/version_*/{name}")}
        hint = f"; did you mean {max(runs, key=lambda run: run.stat().st_mtime)}?" if runs else ""
        raise UserError(f"no checkpoint in {place}: neither {EXPORT_FOLDER}/{CONFIG} nor a .ckpt file is there{hint}")
    return newest


def _goes_beyond(checkpoint: Path, export: Path) -> bool:
    """Whether a checkpoint holds a later step than an export; by the time of writing where a step cannot be read."""
    exported, step = (read_object(export).get(EXTRAS) or {}).get("step"), step_of(checkpoint)
    if isinstance(exported, int) and step is not None:
        return step > exported
    return checkpoint.stat().st_mtime_ns > export.stat().st_mtime_ns


def _open_folder(folder: Path) -> Checkpoint:
    values = read_object(folder / CONFIG)
    config, extras = read_config(values, folder / CONFIG), values.get(EXTRAS)
    family, files = family_of(values, folder / CONFIG), _weight_files(folder)
    lora = read_lora((extras or {}).get("lora"), folder / CONFIG)
    if lora is not None:
        files.append(folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS)
    weights = {named_as_in_model(name): read for file in files for name, read in _open_tensors(file).items()}
    integers = read_quantization(values.get(QUANTIZATION), folder / CONFIG)
    if integers is not None:
        weights = unpacked(weights, integers)
    size = sum(file.stat().st_size for file in files)
    weights = _matched(config, weights, size, folder, family, lora, integers)
    tokenizer, meta = partial(Tokenizer.from_pretrained, folder), _meta(extras)
    if extras is None and (sampler := released_sampler(family, config)) is not None:
        meta["sampler"] = sampler
    return Checkpoint(folder, config, weights, tokenizer, meta, extras is None, lora=lora, quantised=integers)


def _meta(ours: dict[str, Any] | None) -> dict[str, Any]:
    apart = ("transformer", "tokenizer", "lora", "quantize")
    return {name: value for name, value in (ours or {}).items() if name not in apart}


def _open_adapter(folder: Path, adapters: tuple[Path, ...]) -> Checkpoint:
    settings, path = read_adapter_settings(folder)
    base, own = open_checkpoint(path, adapters), _open_tensors(folder / ADAPTER_WEIGHTS)
    lora = settings if settings.on_masks_only else None
    if lora is not None:
        own = {named_as_in_model(name): read for name, read in own.items()}
        if set(own) != set(filter(is_adapter, weight_shapes(base.config, lora))):
            raise UserError(f"the adapter {folder} does not have the weights that its {ADAPTER_CONFIG} names")
        weights = {**{name: read for name, read in base.weights.items() if not is_adapter(name)}, **own}
    elif base.lora is not None:
        raise UserError(f"the adapter {folder} cannot be merged into {path}, which has adapters on masks only")
    else:
        weights = merge_adapters({**dequantised(base.weights), **own}, settings.scaling)
        base = replace(base, quantised=None)
    if not (folder / CONFIG).is_file():  # peft's own
        return replace(base, place=folder, weights=weights, lora=lora)
    values = read_object(folder / CONFIG)
    config = read_config(values, folder / CONFIG)
    rows, known = config.vocab_size or 0, base.config.vocab_size or 0
    more = "vocab_size" if known <= rows <= 2 * known else None  # tokens that the base has not, such as a mask
    for name in SIZES:
        if getattr(config, name) != getattr(base.config, name) and name != more:
            raise UserError(f"{folder / CONFIG} has another {name} than {path}, which the adapter was trained on")
    tokenizer = partial(Tokenizer.from_pretrained, folder)
    return Checkpoint(folder, config, weights, tokenizer, _meta(values.get(EXTRAS)), base.published, known, lora)


def _open_run_checkpoint(path: Path) -> Checkpoint:
    check_or_offer(path)
    checkpoint = read_state(path)
    if path.is_dir():
        checkpoint["state_dict"] = read_weights(path)
    ours, state = read_identity(checkpoint, path), checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no weights: its 'state_dict' is not a dictionary of tensors")
    own = {plain_name(name): value.detach for name, value in state.items() if name.startswith(PREFIX)}
    weights = {name.removeprefix(PREFIX): read for name, read in own.items()}
    numbers = dequantised(weights)
    halves = 2 if len(numbers) < len(weights) else 1  # of a byte, which a number takes at least
    weights = numbers
    config, lora = read_settings(ours.get("transformer"), path), read_lora(ours.get("lora"), path)
    if lora is not None and not lora.on_masks_only:
        weights, lora = merge_adapters(weights, lora.scaling), None
    parts = [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]
    size = halves * sum(part.stat().st_size for part in parts)
    weights = _matched(config, weights, size, path, lora=lora)
    tokenizer = partial(_tokenizer_of, ours.get("tokenizer"), path)
    return Checkpoint(path, config, weights, tokenizer, _meta(ours), lora=lora)


def _tokenizer_of(values: Any, path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_dict(values)
    except Exception as error:  # the Rust side raises a bare Exception
        raise UserError(f"{path} holds a tokenizer that cannot be read: {one_line(error)}") from error


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those that its index names, or the only one."""
    if (folder / INDEX).is_file():
        names: Any = read_object(folder / INDEX).get("weight_map")
        if not fits(names, dict[str, str]) or any(Path(name).name != name for name in names.values()):
            raise UserError(f"{folder / INDEX} is damaged: its weight_map must name a file beside it for each weight")
        return [folder / name for name in sorted(set(names.values()))]
    if not (folder / WEIGHTS).is_file() and any(next(folder.glob(kind), None) for kind in PICKLED):
        raise UserError(
            f"{folder} has pickled weights only, and a pickle can run code: convert them with transformers, "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    return [folder / WEIGHTS]


def _open_tensors(file: Path) -> Readers:
    if file.is_fifo():  # whoever reads it waits for its writer
        raise UserError(f"cannot read {file}: it is a pipe")
    try:
        opened = safe_open(file, framework="pt")
        return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}; it is damaged or missing: copy or export it again") from error


def _matched(
    config: TransformerConfig,
    weights: Readers,
    size: int,
    place: Path,
    family: Family = OTHER,
    lora: Lora | None = None,
    integers: Integers | None = None,
) -> Readers:
    """Returns the weights of a model under our names; nothing of its size is made before they are known to fit.

    `size` is how many bytes the weights take on the disk, where they have the names of a family.
    """
    beside = f"and beside it are {len(weights):,} tensors of {size:,} bytes: config and weights do not belong together"
    for name in SIZES:
        if (getattr(config, name) or 0) > (len(weights) if name == "num_layers" else size):
            raise UserError(f"{place} has {name}={getattr(config, name)}, {beside}")
    shapes = weight_shapes(config, lora, integers)
    needed = sum(map(math.prod, shapes.values()))
    if needed > size:  # a number takes a byte at least
        raise UserError(f"{place} describes a model of {needed:,} weights, {beside}")
    layout = layout_of(family, shapes)
    found = {name: read for name, read in weights.items() if not name.endswith(".rotary_emb.inv_freq")}
    head = found.pop(family.theirs("lm_head.weight"), None) if config.tie_embeddings else None
    missing, unknown = sorted(layout.keys() - found.keys()), sorted(found.keys() - layout.keys())
    if missing:
        raise UserError(f"{place} lacks {len(missing)} weights of its config, such as {missing[0]}")
    if unknown:
        raise UserError(f"{place} has {len(unknown)} weights that its config does not name, such as {unknown[0]}")
    found = as_ours(layout, shapes, found)
    if head is not None and not torch.equal(head(), found["model.embed_tokens.weight"]()):
        raise UserError(f"{place} ties lm_head.weight to the embedding, but holds another lm_head.weight")
    return found
