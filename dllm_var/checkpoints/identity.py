"""What a Lightning checkpoint says of its model: enough to open it without a config, or to refuse it to another run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from dllm_var.checkpoints.provenance import other_versions, provenance
from dllm_var.checkpoints.run_files import FORMAT, check_format
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora, lora_settings
from dllm_var.text.tokenizer import Tokenizer

# What may differ from the checkpoint: for any use of it, and where its weights are measured, not trained on.
CHANGEABLE = {"initializer_range", "context_length"}
CHANGEABLE_WHEN_MEASURED = CHANGEABLE | {"rope_theta", "rope_scaling", "norm_eps"}


def identity(
    config: TransformerConfig, tokenizer: Tokenizer, lora: Lora | None, sampler: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what is needed to build the model without its config, as plain types: a checkpoint's `dllm_var` entry.

    Args:
        config: Shape of the transformer.
        tokenizer: The run's.
        lora: Its adapters.
        sampler: Settings of the sampler to decode with.
    """
    return {
        "transformer": config.to_dict(),
        "tokenizer": tokenizer.to_dict(),
        "sampler": sampler,
        "lora": lora_settings(lora),
        "format": FORMAT,
        **provenance(),
    }


def check_identity(
    saved: Any,
    config: TransformerConfig,
    tokenizer: Tokenizer | None,
    lora: Lora | None,
    path: str,
    changeable: set[str],
) -> None:
    """Refuses a checkpoint of another model or tokenizer, naming the setting.

    Args:
        saved: Its `dllm_var` entry.
        config: Shape of the run's transformer.
        tokenizer: The run's; not compared when None.
        lora: The run's adapters.
        path: Of the checkpoint, for the message.
        changeable: Settings of the transformer that may differ.

    Raises:
        UserError: When the run cannot go on with it.
    """
    if not isinstance(saved, dict):
        raise UserError(f"the checkpoint {path} was not written by dllm_var: it has no 'dllm_var' entry")
    check_format(saved.get("format", FORMAT), path)
    if note := other_versions(saved):
        rank_zero_info(f"{note}: results may differ in their last bits")
    theirs, ours = saved["transformer"], config.to_dict()
    for name in ours:
        if name in theirs and name not in changeable and theirs[name] != ours[name]:
            raise UserError(
                f"the checkpoint has model.transformer.{name}={theirs[name]}, the settings say {ours[name]}: "
                "use the settings it was trained with"
            )
    if saved.get("lora") != lora_settings(lora):
        raise UserError(
            f"the checkpoint has model.lora {saved.get('lora')}, the settings say {lora_settings(lora)}: use "
            "the settings it was trained with, or start a new run from it with model.init_from"
        )
    if tokenizer is not None and Tokenizer.from_dict(saved["tokenizer"]).fingerprint != tokenizer.fingerprint:
        raise UserError(
            "the checkpoint was trained with another tokenizer than data.tokenizer: set it back, or go on all the "
            "same with --data.check_resume=false"
        )
