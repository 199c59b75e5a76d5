"""Strategies that spread training over processes, and what each of them needs."""

from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from dllm_var.errors import UserError


class FSDP2(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all processes of all nodes (torch's fully_shard).

    Lightning's ModelParallelStrategy, whose `data_parallel_size` would have to be told how many processes there are.
    With `save_distributed_checkpoint` each process writes its part of a checkpoint into a folder; without, the first
    process puts together a single file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)
        self.group_size = 1  # neighbouring processes that work on the same rows

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes // self.group_size
        super().setup_environment()


class _InGroups(FSDP2):
    """Groups of processes of a node that work on the same rows; `setting` names the size of a group."""

    def __init__(self, setting: str, size: int) -> None:
        ModelParallelStrategy.__init__(self, tensor_parallel_size=size)  # Lightning's name for it
        self.setting, self.group_size = setting, size

    def setup_environment(self) -> None:
        if self.group_size < 2 or self.num_processes % self.group_size:
            raise UserError(
                f"trainer.strategy: {self.setting} {self.group_size} must be at least 2 and divide the "
                f"{self.num_processes} processes of a node: change it or trainer.devices, or take "
                "configs/strategy/fsdp2.yaml"
            )
        super().setup_environment()


class TensorParallel(_InGroups):
    """Each layer and the vocabulary divided among processes of a node, and their parts sharded over groups of these.

    The processes of a group work on the same rows; groups work on different ones, as the processes of FSDP2 do. The
    size of a group must divide the processes of a node, the heads and the features.
    """

    def __init__(self, tensor_parallel_size: int = 2) -> None:
        super().__init__("tensor_parallel_size", tensor_parallel_size)


class ContextParallel(_InGroups):
    """The positions of each row divided among processes of a node, for rows whose activations one device cannot hold.

    Weights, gradients and optimizer state are sharded over all processes, as under FSDP2. The size of a group must
    divide the processes of a node and the heads.
    """

    def __init__(self, context_parallel_size: int = 2) -> None:
        super().__init__("context_parallel_size", context_parallel_size)


def shards_parameters(strategy: Any) -> bool:
    """Whether a forward pass needs every process, because each holds only a part of the parameters."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False)


def owns_gradients(strategy: Any) -> bool:
    """Whether gradients are where the module cannot reach them, in DeepSpeed's engine."""
    return hasattr(strategy, "zero_stage_3")


def check_strategy(strategy: Any) -> None:
    """Raises UserError, before any data is read, when FSDP1 or DeepSpeed lacks a CUDA device or its package."""
    name = str(getattr(strategy, "class_path", strategy)).rsplit(".", 1)[-1].lower()
    missing = []
    if name.startswith("deepspeed") and find_spec("deepspeed") is None:
        missing.append("the package deepspeed (pip install deepspeed)")
    if (name.startswith(("deepspeed", "fsdp")) and name != "fsdp2") and not torch.cuda.is_available():
        missing.append("a CUDA device")
    if missing:
        kind = "deepspeed" if name.startswith("deepspeed") else "fsdp"
        raise UserError(
            f"trainer.strategy {kind} needs {' and '.join(missing)}, not found here; configs/strategy/fsdp2.yaml and "
            "ddp.yaml run on any machine"
        )
