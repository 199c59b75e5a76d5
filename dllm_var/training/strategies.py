"""Strategies that spread training over processes, and what each of them needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.sampling.base import without_training_modes

_ANYWHERE = "configs/strategy/fsdp2.yaml and ddp.yaml run on any machine"


class FSDP2(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all processes of all nodes (torch's fully_shard).

    Lightning's ModelParallelStrategy, whose `data_parallel_size` would have to be told how many processes there are.
    With `save_distributed_checkpoint` each process writes its part of a checkpoint into a folder; without, the first
    process puts together a single file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class TensorParallel(ModelParallelStrategy):
    """Each layer and the vocabulary divided among processes of a node, and their parts sharded over groups of these.

    The processes of a group work on the same rows; groups work on different ones, as the processes of FSDP2 do. The
    size of a group must divide the processes of a node, the heads and the features.
    """

    def __init__(self, tensor_parallel_size: int = 2) -> None:
        super().__init__(tensor_parallel_size=tensor_parallel_size)
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        size = self.tensor_parallel_size
        if size < 2 or self.num_processes % size:
            raise UserError(
                f"trainer.strategy: tensor_parallel_size {size} must be at least 2 and divide the {self.num_processes} "
                "processes of a node: change it or trainer.devices, or take configs/strategy/fsdp2.yaml"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes // size
        super().setup_environment()


def is_sharded(strategy: Any) -> bool:
    """Whether a forward pass needs every process, because each holds only a part of the parameters."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False)


@contextmanager
def forwards_together(strategy: Any, transformer: Any) -> Iterator[None]:
    """Lets processes that share the parameters make different numbers of forward passes, as decoding does.

    A pass gathers parameters, for which every process is needed. Within this context each pass begins with a count of
    the processes that make one. At its end a process makes passes over one token, whose results nobody reads, until
    no process needs them any more. Every process must enter; those of a tensor-parallel group must do the same. Does
    nothing unless the strategy shards parameters.
    """
    if not is_sharded(strategy):
        yield
        return
    own, hidden_states = vars(transformer).get("hidden_states"), transformer.hidden_states

    def count(passes: float) -> Tensor:
        return strategy.reduce(torch.tensor(passes, device=strategy.root_device), reduce_op="sum")

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        count(1)
        return hidden_states(*args, **kwargs)

    transformer.hidden_states = counted
    try:
        yield
    finally:
        del transformer.hidden_states
        if own is not None:  # FSDP2 has put its own there
            transformer.hidden_states = own
    with torch.inference_mode(), without_training_modes(transformer):
        while count(0) > 0:
            hidden_states(torch.zeros(1, 1, dtype=torch.long, device=strategy.root_device))


def owns_gradients(strategy: Any) -> bool:
    """Whether gradients are where the module cannot reach them, in DeepSpeed's engine."""
    return hasattr(strategy, "zero_stage_3")


def check_strategy(strategy: Any) -> None:
    """Says what `trainer.strategy` of the settings needs that is not here, before any data is read.

    Raises:
        UserError: When FSDP1 or DeepSpeed is asked for without a CUDA device, or DeepSpeed without its package.
    """
    name = str(getattr(strategy, "class_path", strategy)).rsplit(".", 1)[-1].lower()
    missing = []
    if name.startswith("deepspeed") and find_spec("deepspeed") is None:
        missing.append("the package deepspeed (pip install deepspeed)")
    if (name.startswith(("deepspeed", "fsdp")) and name != "fsdp2") and not torch.cuda.is_available():
        missing.append("a CUDA device")
    if missing:
        kind = "deepspeed" if name.startswith("deepspeed") else "fsdp"
        raise UserError(f"trainer.strategy {kind} needs {' and '.join(missing)}, not found here; {_ANYWHERE}")
