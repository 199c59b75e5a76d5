"""The former place of `dllm_var.load_pretrained`; programs that import it from here go on working."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "load_pretrained":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: see dllm_var.checkpoints.pretrained")
    return import_module("dllm_var.checkpoints.pretrained").load_pretrained
