"""Plugins for Lightning's Trainer that write checkpoint files: whole or not at all, at once or in the background."""

import copy
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from dllm_var.checkpoints.archive import UnusableCheckpoint, check, load_archive, write_archive
from dllm_var.checkpoints.run_checkpoint import SAVING
from dllm_var.files import discard, partial_path

_COPIES = 2  # of the state in memory at most: a step's own file, and last.ckpt


class CheckedFiles(TorchCheckpointIO):
    """Writes checkpoint files whole or not at all, and checks them before it reads them, without running code.

    For any `lightning.Trainer`: `plugins=[CheckedFiles()]`. The command line always has it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)  # our Trainer gives a name for what strategies write by themselves, which this is not
        write_archive(checkpoint, path.with_suffix("") if path.suffix == SAVING else path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Loads a checkpoint that one process of each node checks: only tensors and plain values, in any case."""
        path = Path(path)
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            check(path)
        checkpoint = load_archive(path, path, map_location=map_location)
        if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
            raise UnusableCheckpoint(f"{path} is not a checkpoint of a training run")
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; under another name first, so that half of a folder never passes for a checkpoint."""
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            discard(partial_path(path))
            path = path.rename(partial_path(path))
        discard(path)


class BackgroundFiles(CheckedFiles):
    """Writes checkpoint files as `CheckedFiles` does, in a thread while training goes on; folders are not.

    The state is copied into the CPU's memory before `save_checkpoint` returns; when two copies wait already, it waits
    as well. Files are written and removed in the order asked for, and none after a failure until it is told.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._saves: list[Future[None]] = []
        self._failure: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begins to write a checkpoint; raises OSError, which names it, when an earlier one could not be written."""
        while len(self._saves) >= _COPIES:
            self._saves.pop(0).result()
        if self._failure is not None:
            self.teardown()
        self._saves.append(self._thread.submit(self._do, super().save_checkpoint, snapshot(checkpoint), path))

    def remove_checkpoint(self, path: Any) -> None:
        self._thread.submit(self._do, super().remove_checkpoint, path)

    def teardown(self) -> None:
        """Waits until everything is written; raises OSError, which names it, when a checkpoint could not be."""
        self._thread.submit(lambda: None).result()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._failure is None:
            try:
                work(*arguments)
            except Exception as error:  # told by the next call
                self._failure = error


def snapshot(state: Any) -> Any:
    """Returns a copy that nothing changes any more, its tensors on the CPU; tensors that are one stay one."""
    copies: dict[Any, Tensor] = {}
    memo: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = copies[place]
        return tensor

    apply_to_collection(state, Tensor, keep)
    return copy.deepcopy(state, memo)
