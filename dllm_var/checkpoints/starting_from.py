"""The beginning of a run that starts from a checkpoint (`model.init_from`): its shape and its weights."""

from dataclasses import fields, replace
from pathlib import Path

from dllm_var.checkpoints.adapters import ADAPTER_CONFIG
from dllm_var.checkpoints.config_json import read_config
from dllm_var.checkpoints.pretrained import CONFIG, copy_weights, locate_checkpoint, open_checkpoint
from dllm_var.errors import UserError
from dllm_var.files import read_object
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora
from dllm_var.model.quantised import Integers, QuantizeName
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer

# Settings in which a run may differ from the checkpoint it starts from, and those that tokenizer and objective decide.
ADJUSTABLE = {"rope_theta", "rope_scaling", "rope_full_precision", "norm_eps"}
ADJUSTABLE |= {"initializer_range", "token_shift", "context_length"}
SET_BY_OTHERS = {"vocab_size", "mask_id", "terminator_ids", "pad_id", "causal"}
SET_BY_OTHERS |= {"causal_context", "block_causal", "block_length"}


def starting_config(settings: TransformerConfig, path: str | Path, lora: Lora | None = None) -> TransformerConfig:
    """Returns the shape of a model that starts from a checkpoint: the checkpoint's, with the settings' adjustments.

    What the settings leave out (None) comes from the checkpoint; `path` is as for `load_checkpoint`. Adapters on masks
    only, which cannot be merged, are trained on: raises UserError when `lora` differs from them in more than dropout.
    """
    checkpoint = open_checkpoint(path)
    theirs = checkpoint.lora
    if theirs is not None and (lora is None or replace(lora, dropout=theirs.dropout) != theirs):
        raise UserError(
            f"model.init_from {path} has adapters on masks only, which cannot be merged: train them on with model.lora "
            f"set to {theirs}, or start from the checkpoint that they were trained on"
        )
    return _adjusted(checkpoint.config, settings, path)


def integers_of(path: str | Path, quantize: QuantizeName) -> Integers:
    """Returns how a model that starts from a checkpoint keeps its matrices under `model.quantize`."""
    integers = open_checkpoint(path).stored_as(quantize)
    assert integers is not None
    return integers


def planned_config(settings: TransformerConfig, path: str | Path) -> TransformerConfig:
    """Returns what `starting_config` does, from `config.json` alone where there is one: the weights may be missing.

    Of a model on the hub, this file alone is downloaded.
    """
    place = locate_checkpoint(path, [CONFIG])
    file = place / CONFIG
    described = file.is_file() and not (place / ADAPTER_CONFIG).is_file()
    saved = read_config(read_object(file), file) if described else open_checkpoint(path).config
    return _adjusted(saved, settings, path)


def start_from(transformer: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Copies a checkpoint's weights into a transformer of the shape that `starting_config` gives, sharded or not.

    The tokenizer is the run's: the checkpoint's own, or a published model's with further tokens, such as a mask.
    """
    checkpoint = open_checkpoint(path)
    _adjusted(checkpoint.config, transformer.config, path)
    if not checkpoint.published or (checkpoint.place / "tokenizer.json").is_file():
        theirs = checkpoint.load_tokenizer()
        same = theirs.fingerprint == tokenizer.fingerprint
        if checkpoint.published:  # the mask that we give it may have another name
            ours, known = (one.backend.get_vocab(with_added_tokens=True).items() for one in (tokenizer, theirs))
            same = len(known - ours) <= 1
        if not same:
            raise UserError(f"model.init_from {path} has another tokenizer than data.tokenizer: set both to the same")
    copy_weights(transformer, checkpoint)


def _adjusted(saved: TransformerConfig, settings: TransformerConfig, path: str | Path) -> TransformerConfig:
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    given = {name: value for name, value in given.items() if value is not None and name not in SET_BY_OTHERS}
    for name, value in given.items():
        if name not in ADJUSTABLE and value != getattr(saved, name):
            raise UserError(
                f"model.init_from {path} has transformer.{name}={getattr(saved, name)}, the settings say {value}: "
                "leave it out"
            )
    return replace(saved, **{**given, "vocab_size": max(settings.vocab_size or 0, saved.vocab_size or 0)}).resolved()
