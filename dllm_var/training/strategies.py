"""How training is spread over processes: what Lightning's strategies leave to say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from dllm_var.checkpoints.pieces import in_pieces, load_in_pieces
from dllm_var.errors import UserError
from dllm_var.model.placement import TENSOR_PARALLEL, gathered, local_part, sections
from dllm_var.sampling.base import without_training_modes

_ANYWHERE = "configs/strategy/fsdp2.yaml and ddp.yaml run on any machine"


class FSDP2(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all processes of all nodes (torch's fully_shard).

    Lightning's ModelParallelStrategy, whose `data_parallel_size` would have to be told how many processes there are.

    Args:
        save_distributed_checkpoint: Each process writes its part into a folder; a single file, put together by the
            first process, when false.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class TensorParallel(ModelParallelStrategy):
    """Each layer and the vocabulary divided among processes of a node, and their parts sharded over groups of these.

    The processes of a group work on the same rows; groups work on different ones, as the processes of FSDP2 do.

    Args:
        tensor_parallel_size: Processes of a group; divides the processes of a node, the heads and the features.

    Raises:
        UserError: When it does not divide the processes of a node.
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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        for name in ("state_dict", "optimizer_states"):
            if name in checkpoint:
                checkpoint[name] = in_pieces(checkpoint[name], self._sections)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        return load_in_pieces(Path(self.broadcast(str(checkpoint_path))), self.model, self.optimizers, self._sections)

    def gathered_weights(self) -> dict[str, Tensor]:
        """Collects the transformer's weights in the memory of the first process; empty on the others."""
        assert self.lightning_module is not None
        state = self.lightning_module.transformer.state_dict()  # type: ignore[union-attr]
        whole = ((name, gathered(value, self._sections(name))) for name, value in state.items())
        return {name: value.cpu() for name, value in whole if self.global_rank == 0}

    def _sections(self, name: str) -> list[int]:
        assert self.lightning_module is not None
        return sections(name, self.lightning_module.transformer.config)  # type: ignore[union-attr,arg-type]


def is_sharded(strategy: Any) -> bool:
    """Whether a forward pass needs every process, because each holds only a part of the parameters."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False)


@contextmanager
def forwards_together(strategy: Any, transformer: Any) -> Iterator[None]:
    """Lets processes that share the parameters make different numbers of forward passes, as decoding does.

    A pass gathers parameters, for which every process is needed. Within this context each pass begins with a count of
    the processes that make one. At its end a process makes passes over one token, whose results nobody reads, until
    no process needs them any more. Every process must enter; those of a tensor-parallel group must do the same.

    Args:
        strategy: Of the run; does nothing unless it shards parameters.
        transformer: The sharded model.
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
    return isinstance(strategy, DeepSpeedStrategy)


def check_groups(strategy: Any) -> None:
    """Raises UserError for Lightning's own tensor parallelism, which would save fused matrices in the wrong order."""
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(strategy, TensorParallel):
        return
    if strategy.device_mesh[TENSOR_PARALLEL].size() > 1:  # as Lightning makes of "auto"
        raise UserError(
            "trainer.strategy splits each layer over processes: take dllm_var.training.strategies.TensorParallel for "
            "that, as in configs/strategy/tensor_parallel.yaml, or set tensor_parallel_size to 1, as "
            "configs/strategy/fsdp2.yaml does"
        )


def check_accumulation(trainer: L.Trainer) -> None:
    """Raises UserError where batches are accumulated out of the module's reach, and so could not be weighed."""
    if owns_gradients(trainer.strategy) and trainer.accumulate_grad_batches > 1:
        raise UserError(
            "trainer.accumulate_grad_batches must be 1 with DeepSpeed, which keeps the gradients to itself until they "
            "are averaged: raise data.batch_size, or use configs/strategy/fsdp2.yaml"
        )


def _unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer divides by the loss scale of 16-bit training itself, as torch's fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def loss_scale_in(optimizer: Optimizer, trainer: L.Trainer) -> Tensor | float:
    """Returns the factor that 16-bit training has left in the gradients just before the optimizer step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not _unscales_in_step(optimizer):
        return 1.0
    return scaler.scale(torch.ones((), device=trainer.strategy.root_device))


def clip_gradients(module: L.LightningModule, optimizer: Optimizer, limit: Any, algorithm: Any) -> None:
    """Clips by the norm that the step has found, the same number on every process, so that it is computed once.

    What else there is to clip is left to Lightning, or under FSDP1, where Lightning refuses to, to torch's wrapper.
    """
    step: Any = module.last_step
    trainer, norm = module.trainer, step.gradient_norm
    wrapped, scaler = trainer.strategy.model, getattr(trainer.precision_plugin, "scaler", None)
    by_norm = limit and algorithm != "value"
    if by_norm and isinstance(wrapped, FullyShardedDataParallel):
        wrapped.clip_grad_norm_(limit)
    elif by_norm and norm is not None and scaler is None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and (share := limit / (norm + 1e-6)) < 1:
            torch._foreach_mul_([local_part(gradient) for gradient in gradients], share)
    else:
        module.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)


def skip_update(optimizer: Optimizer, trainer: L.Trainer) -> None:
    """Makes the optimizer step that is about to come do nothing, not even decay weights.

    Args:
        optimizer: Skips parameters without a gradient, as torch's do.
        trainer: Its precision may scale losses.

    Raises:
        UserError: When the strategy has the gradients to itself.
    """
    if owns_gradients(trainer.strategy):
        raise UserError(
            f"the loss is not finite at step {trainer.global_step + 1}, and DeepSpeed cannot skip an update: go "
            "on from the newest checkpoint with a lower learning rate, or with configs/strategy/fsdp2.yaml"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is None or not _unscales_in_step(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:  # the scaler looks for such gradients in the step, and must find some
        for parameter in group["params"]:
            if parameter.grad is not None:
                local_part(parameter.grad).fill_(float("nan"))


def check_strategy(strategy: Any) -> None:
    """Says what a strategy needs that is not here, before any data is read.

    Args:
        strategy: `trainer.strategy` of the settings: a name, or a class path with its arguments.

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
