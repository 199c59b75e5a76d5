"""Model folders: a trained model as config, safetensors and tokenizer, in a form that transformers and others open."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dllm_var.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ON_MASKS, PEFT_PREFIX
from dllm_var.checkpoints.checkpoint import Checkpoint, decoding_config, weight_shapes
from dllm_var.checkpoints.config_json import natural_family, write_config
from dllm_var.checkpoints.families import EXTRAS, Family
from dllm_var.checkpoints.pretrained import CONFIG, INDEX, WEIGHTS
from dllm_var.checkpoints.quantised import QUANTIZATION, pack, scale_of, write_quantization
from dllm_var.checkpoints.weight_layout import layout_of, stored, stored_shape
from dllm_var.errors import UserError
from dllm_var.files import write_atomically, write_text
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora, is_adapter
from dllm_var.model.quantised import QuantizeName
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer

SHARD_BYTES = 2 * 1024**3


def save_checkpoint_folder(
    path: str | Path,
    transformer: Transformer,
    tokenizer: Tokenizer,
    meta: dict[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a model as a folder, which transformers opens, too, where it has such a model; returns the folder's path.

    `meta` is plain data to keep beside the weights, such as `{"sampler": {...}}`. `state` are weights to save in place
    of the transformer's own (gathered from a sharded strategy).
    """
    folder, weights = Path(path), dict(state or transformer.state_dict())
    if transformer.config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    save_tensors(weights, folder / WEIGHTS)
    save_settings(folder, transformer, tokenizer, meta)  # last: it makes the folder a checkpoint
    return folder


def save_settings(
    folder: Path, transformer: Transformer, tokenizer: Tokenizer, meta: dict[str, Any] | None = None
) -> None:
    """Writes `config.json`, with `meta` in it, and the tokenizer of a folder of weights or of adapters."""
    tokenizer.save(folder)
    config, dtype = transformer.config, str(transformer.embedding.weight.dtype).removeprefix("torch.")
    values = write_config(natural_family(config), config, dtype)
    values[EXTRAS] |= meta or {}
    write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def save_adapter(folder: Path, weights: Mapping[str, Tensor], lora: Lora, base: str) -> None:
    """Writes the adapters of a state dict as peft does, without the weights of the checkpoint `base` below them.

    Those that act on masks only are written in the same form, under a type that peft refuses.
    """
    adapters = {PEFT_PREFIX + name.replace(".default.", "."): weights[name] for name in weights if is_adapter(name)}
    save_tensors(adapters, folder / ADAPTER_WEIGHTS)
    if lora.on_masks_only:
        values = {"peft_type": ON_MASKS, "base_model_name_or_path": base, "r": lora.r, "lora_alpha": lora.alpha}
        values |= {"lora_dropout": lora.dropout, "target_modules": lora.targets}
        write_text(folder / ADAPTER_CONFIG, json.dumps(values, indent=2) + "\n")
        return
    config = lora.peft_config()
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)  # peft's set would be written in another order each time
    config.save_pretrained(str(folder))


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that is there whole or not at all; raises UserError when it cannot be written."""
    try:
        with write_atomically(file) as unfinished:
            plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file(plain, unfinished, metadata={"format": "pt"})
            unfinished.chmod(mode)  # safetensors 0.8 writes files that only their owner may read
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file}: {error}") from error


def export_checkpoint(
    checkpoint: Checkpoint,
    family: Family,
    output: Path,
    decoding: dict[str, Any],
    dtype: torch.dtype | None = None,
    quantize: QuantizeName | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> TransformerConfig:
    """Writes a checkpoint as a model of a published family, a shard at a time; the folder appears when it is complete.

    `decoding` is how the model is meant to be decoded (`block_length`, `threshold`), kept beside the weights; `dtype`
    converts them, where None leaves their type, and `quantize` rounds the matrices of the layers. Returns the settings
    of the model that was written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # slow to import

    if output.exists():
        raise UserError(f"--output {output} exists: give a folder that does not")
    if checkpoint.lora is not None:
        raise UserError(
            f"{checkpoint.place} has adapters on masks only, which no published family holds: export the checkpoint "
            "that they were trained on, whose text is the same, or use the folder `model` of the run"
        )
    tokenizer = checkpoint.load_tokenizer()
    config = decoding_config(checkpoint, tokenizer)
    kind = dtype or checkpoint.dtype
    values = write_config(family, config, str(kind).removeprefix("torch."))
    values[EXTRAS] = {**checkpoint.meta, **values[EXTRAS], **decoding}
    ids = {"eos_token_id": list(tokenizer.terminator_ids), "pad_token_id": tokenizer.pad_id}
    generation = {**ids, "mask_token_id": tokenizer.mask_id, **_sampling(checkpoint.meta.get("sampler")), **decoding}
    settings = {CONFIG: values, "generation_config.json": generation}
    shapes, integers = weight_shapes(config), checkpoint.stored_as(quantize)
    quantised = weight_shapes(config, integers=integers)
    if integers is not None:
        values[QUANTIZATION] = write_quantization(integers, [family.theirs("lm_head")])
    like = torch.empty(0, dtype=kind)
    layout = layout_of(family, shapes)
    outline = {
        theirs: torch.empty(
            stored_shape(parts, quantised),
            dtype=torch.uint8 if scale_of(parts[0][0]) in quantised else kind,
            device="meta",
        )
        for theirs, parts in layout.items()
    }
    # A stack of experts is read once and written expert by expert.
    read = lru_cache(maxsize=1)(lambda name: checkpoint.weight(name, shapes[name]))
    shards = split_torch_state_dict_into_shards(outline, max_shard_size=shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    with write_atomically(output) as partial:
        for file, held in shards.filename_to_tensors.items():
            weights: dict[str, Tensor] = {}
            for theirs in held:
                name = layout[theirs][0][0]
                if integers is not None and scale_of(name) in quantised:
                    packed = pack(*checkpoint.integers(name, shapes[name], integers, like))
                    weights |= {theirs.removesuffix(".weight") + end: part for end, part in packed.items()}
                else:
                    weight = stored(layout[theirs], read)
                    weights[theirs] = weight if dtype is None else weight.to(dtype)
            save_tensors(weights, partial / file)
            weight_map |= dict.fromkeys(weights, file)
            total += sum(weight.nbytes for weight in weights.values())
        if shards.is_sharded:
            settings[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        tokenizer.save(partial)
        for file, content in settings.items():
            (partial / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return config


def _sampling(sampler: Any) -> dict[str, Any]:
    """Returns whether a sampler, as a checkpoint describes it, draws tokens, and how, in transformers' words."""
    arguments = (sampler or {}).get("init_args") or {}
    if not arguments.get("temperature"):
        return {"do_sample": False}
    drawn = {name: arguments[name] for name in ("temperature", "top_k", "top_p") if arguments.get(name)}
    return {"do_sample": True, **drawn}
