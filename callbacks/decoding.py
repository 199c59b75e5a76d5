"""Decoding in the midst of training: which prompts, on which processes, and without leaving a trace in the training."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from tqdm import tqdm

from dllm_var.callbacks.ema import averaged
from dllm_var.errors import UserError
from dllm_var.training import strategies


@dataclass(frozen=True)
class Prompt:
    """A prompt to decode, with the answers that would be right where they are known.

    Args:
        text: The prompt as shown.
        ids: Its token ids.
        references: Acceptable answers as token ids, without terminator; empty when there are none.
    """

    text: str
    ids: list[int]
    references: list[list[int]] = field(default_factory=list)


def held_out_prompts(trainer: L.Trainer, split: str, count: int | None) -> list[Prompt]:
    """Take the first examples of a held-out split of the trainer's data module.

    Args:
        trainer: Its data module must have `held_out(split, count)`.
        split: Name of the split, for example `validation`.
        count: How many; None for all.

    Raises:
        UserError: The data module has no held-out examples to give.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "held_out"):
        raise UserError("decoding held-out examples needs a data module with held_out(split, n): pass prompts instead")
    examples = datamodule.held_out(split, count)
    if not examples:
        raise UserError(
            f"split '{split}' has no examples to decode: pass prompts, or give the source such a split, with prompts"
        )
    return [Prompt(e.prompt, list(e.prompt_ids), [list(r) for r in e.references]) for e in examples]


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether a forward pass needs every process, because each holds only a part of the parameters."""
    return strategies.is_sharded(trainer.strategy)


@contextmanager
def undisturbed(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Switch to eval mode without gradients, under the trainer's autocast; afterwards nothing tells that it happened.

    The weights are the averaged ones where the run keeps such. Restores the mode of every submodule (frozen parts may
    have been in eval mode) and the state of the random generators of Python, numpy and torch, whatever happens inside.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - user code may draw from it
    precision, device = trainer.precision_plugin, pl_module.device
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            stack.enter_context(torch.no_grad())
            if isinstance(precision, MixedPrecision):
                stack.enter_context(precision.forward_context())
            stack.enter_context(averaged(trainer, pl_module))
            stack.enter_context(gathered_root(trainer, pl_module))
            stack.enter_context(strategies.forwards_together(trainer.strategy, getattr(pl_module, "transformer", None)))
            pl_module.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def gathered_root(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Gather the parameters outside the blocks, as samplers call the head by itself; each block is gathered as it runs.

    Under FSDP2 that is the embedding, the last norm and the head of `pl_module.transformer`.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        assert trainer.strategy.model is not None
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, recurse=False, writeback=False):
            yield
        return
    root: Any = pl_module.transformer
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def say(trainer: L.Trainer, lines: str | Sequence[str]) -> None:
    """Print from the first process, above any progress bar instead of through it."""
    if trainer.is_global_zero:
        tqdm.write(lines if isinstance(lines, str) else "\n".join(lines), file=sys.stdout)
