"""Data sources, and data modules, which load Lightning on first use; imported as ``dllm_var.datamodules``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dllm_var.datamodules.cmudict import CmudictSource
from dllm_var.datamodules.dataset_source import DatasetSource
from dllm_var.datamodules.reasoning_gym import GsmSymbolicSource, ReasoningGymSource
from dllm_var.datamodules.sources import JsonlSource, ParquetSource, Source, SplitSource
from dllm_var.datamodules.table import Example

if TYPE_CHECKING:
    from dllm_var.datamodules.data_module import PackedDataModule
    from dllm_var.datamodules.streaming import StreamingDataModule

__all__ = [
    "CmudictSource",
    "DatasetSource",
    "Example",
    "GsmSymbolicSource",
    "JsonlSource",
    "PackedDataModule",
    "ParquetSource",
    "ReasoningGymSource",
    "Source",
    "SplitSource",
    "StreamingDataModule",
]
_LAZY = {"PackedDataModule": "data_module", "StreamingDataModule": "streaming"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
