"""Whether rows would be those that a checkpoint was trained on."""

from __future__ import annotations

from typing import Any

from dllm_var.errors import UserError

_CHANGED = {  # where a value tells nothing, or has another name than its setting
    "source": "data.source has other records, or other splits, than when the checkpoint was written: set it back,",
    "tokenizer": "data.tokenizer is not the one the checkpoint was trained with: set it back,",
    "source_version": "the checkpoint says where its data lay, as earlier versions of dllm_var did, not what it holds: "
    "make sure that data.source is the same; then",
    "plan_version": "data.packing puts other samples together than in the version of dllm_var that wrote the "
    "checkpoint: use that version,",
}
_UNRECORDED = {"plan_version": 1, "source_version": 1}  # what checkpoints from before it was recorded have


def check_made_from(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuses other rows than those of a checkpoint.

    Args:
        saved: What decided the content of its rows.
        ours: What decides that of the run's.

    Raises:
        UserError: When they differ; names the setting.
    """
    for name, value in ours.items():
        was = saved.get(name, _UNRECORDED.get(name, value))
        if was != value and (name != "source_version" or saved.get("source") != ours["source"]):
            change = _CHANGED.get(
                name, f"data.{name} was {was} when the checkpoint was written and is {value} now: set it back,"
            )
            raise UserError(
                f"{change} start a new run with model.init_from, or go on all the same with --data.check_resume=false"
            )
