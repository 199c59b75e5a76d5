"""Sharded checkpoints under tensor parallelism: each process saves its rows where they belong in the whole weight.

So a folder holds weights and optimizer state as FSDP2 writes them, whatever the number of processes that share a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dllm_var.checkpoints.choose import is_sharded
from dllm_var.checkpoints.shards import read_trainer_state
from dllm_var.errors import UserError
from dllm_var.model.placement import pieces

Sections = Callable[[str], list[int]]


class Pieces(Tensor):
    """A sharded tensor as torch.distributed.checkpoint sees it: some runs of rows, which need not be neighbours.

    Its three methods with underscores are what that asks of tensors (torch.distributed._checkpointable).
    """

    def __new__(cls, tensor: DTensor, sections: list[int]) -> Pieces:
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def __init__(self, tensor: DTensor, sections: list[int]) -> None:
        self.views = {torch.Size(offset): view.detach() for view, offset in pieces(tensor, sections)}

    def __create_write_items__(self, name: str, _: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(view), self.shape),
            )
            for chunk, view in zip(self.__create_chunk_list__(), self.views.values(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offset, view.shape) for offset, view in self.views.items()]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.views[index.offset]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function} on a tensor that is only there to be saved")


def in_pieces(state: Any, sections: Sections, name: str = "") -> Any:
    """Returns a state dict whose sharded tensors share their memory and know where they belong.

    Args:
        state: Of a model or of optimizers; nested.
        sections: From a weight's name, see `dllm_var.model.placement`.
        name: Of the weight that `state` is about.
    """
    if isinstance(state, DTensor):
        return Pieces(state, sections(name))
    if isinstance(state, dict):
        return {key: in_pieces(value, sections, key if "." in str(key) else name) for key, value in state.items()}
    return [in_pieces(value, sections, name) for value in state] if isinstance(state, list) else state


def load_in_pieces(path: Path, model: nn.Module, optimizers: Sequence[Optimizer], sections: Sections) -> dict[str, Any]:
    """Loads a folder of shards into a model and its optimizers, whoever wrote it; returns what else it holds.

    Args:
        path: The folder.
        model: With sharded weights.
        optimizers: Of these; none to leave theirs out.
        sections: As above.

    Raises:
        UserError: When the checkpoint is a single file.
    """
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    if not is_sharded(path):
        raise UserError(
            f"{path} is one file, and tensor parallelism goes on from folders of shards alone: go on with the strategy "
            "that it was written with, or start a new run from it with model.init_from"
        )
    load({"state_dict": in_pieces(get_model_state_dict(model), sections)}, checkpoint_id=path)
    for number, optimizer in enumerate(optimizers):
        state = get_optimizer_state_dict(model, optimizer)
        read = {f"optimizer_{number}": in_pieces(state, sections)}
        load(read, checkpoint_id=path)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=_with_plain(state, read[f"optimizer_{number}"]))
    return read_trainer_state(path)


def _with_plain(state: Any, read: Any) -> Any:
    """Returns the state with what has been read of it, apart from tensors, which were read in place."""
    if isinstance(state, dict):
        return {key: _with_plain(value, read[key]) for key, value in state.items()}
    if isinstance(state, list):
        return [_with_plain(*pair) for pair in zip(state, read, strict=True)]
    return state if isinstance(state, DTensor) else read
