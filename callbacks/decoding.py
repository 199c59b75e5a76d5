"""Decoding in the midst of training, without a trace in the training: prompts, processes, modes and random states."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from dllm_var.callbacks.ema import averaged
from dllm_var.datamodules import Example
from dllm_var.errors import UserError
from dllm_var.training.resume import random_state, set_random_state


def held_out_prompts(trainer: L.Trainer, split: str, count: int | None) -> list[Example]:
    """Returns the first examples of a held-out split, all when `count` is None; raises UserError when it has none."""
    held_out = getattr(getattr(trainer, "datamodule", None), "held_out", None)
    examples = [] if held_out is None else held_out(split, count)
    if not examples:
        raise UserError(f"split '{split}' has no examples to decode: pass prompts, or give the source such a split")
    return examples


@contextmanager
def undisturbed(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Switches to eval mode without gradients, under the trainer's autocast; afterwards nothing tells that it happened.

    The weights are the averaged ones where the run keeps such. Restores the mode of every submodule (frozen parts may
    have been in eval mode) and the state of the random generators of Python, numpy and torch, whatever happens inside.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    generators, precision = random_state(), trainer.precision_plugin
    try:
        autocast = precision.forward_context() if isinstance(precision, MixedPrecision) else nullcontext()
        with torch.no_grad(), autocast, averaged(trainer, pl_module), _gathered_root(trainer, pl_module):
            pl_module.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(generators)


@contextmanager
def _gathered_root(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Gathers the parameters outside the blocks, because samplers call the head by itself."""
    root: Any = pl_module.transformer
    if isinstance(trainer.strategy, FSDPStrategy):
        assert trainer.strategy.model is not None
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, recurse=False, writeback=False):
            yield
    elif isinstance(root, FSDPModule):
        root.unshard()
        try:
            yield
        finally:
            root.reshard()
    else:
        yield
