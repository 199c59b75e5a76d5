"""What a training step would wait for on a GPU: operations whose results the host must read to go on."""

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_var import DiffusionLM
from dllm_var.callbacks import SpeedMonitor
from dllm_var.datamodules import PackedDataModule
from dllm_var.model import TransformerConfig
from dllm_var.objectives import Autoregressive, BlockDiffusion, EosSchedule, Mdlm, MultiBlockDiffusion

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Notes operations that a GPU cannot do without being waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = operation.overloadpacket
        waits = packet in (aten.nonzero, aten._local_scalar_dense, aten.masked_select, aten._unique2, aten.lift_fresh)
        waits |= packet is aten.repeat_interleave and isinstance(args[0], torch.Tensor) and len(args) == 1
        waits &= kwargs.get("output_size") is None
        if packet in (aten.index, aten.index_put, aten.index_put_):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        if waits:
            self.found.append(str(operation))
        return operation(*args, **kwargs)


class Watch(L.Callback):
    """Looks for waits in every batch after the first step, from the batch on its device to the end of the update."""

    def __init__(self):
        self.found, self.watched = [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx > 1:
            self.waits = Waits().__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx > 1:
            self.waits.__exit__(None, None, None)
            self.found += self.waits.found
            self.watched += 1


@pytest.mark.parametrize(
    ("objective", "settings", "trained"),
    [
        (EosSchedule(), {"attention": "document"}, {}),
        (EosSchedule(), {"attention": "full"}, {"accumulate_grad_batches": 2}),
        (Mdlm(), {"attention_annealing": 100}, {}),  # its losses have weights
        (Autoregressive(), {}, {}),
        (BlockDiffusion(block_length=4, autoregressive_weight=0.5, causal_context=True), {}, {}),
        (MultiBlockDiffusion(block_length=4, autoregressive_weight=0.5, causal_context=True), {}, {}),
    ],
)
def test_a_step_waits_for_nothing_until_its_figures_are_due(objective, settings, trained, tmp_path, monkeypatch):
    """The host hides tokens before it sends them, so that it knows all shapes; clipping and guard are the device's."""
    monkeypatch.setattr("dllm_var.model.attention.has_varlen", lambda *_: True)
    data = PackedDataModule(batch_size=4, context_length=48, packing="best_fit", overhang=4)
    module = DiffusionLM(TransformerConfig(hidden_size=16, num_layers=2, num_heads=2), objective, **settings)
    watch = Watch()
    L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=6,
        gradient_clip_val=1.0,
        log_every_n_steps=100,
        limit_val_batches=0,
        callbacks=[SpeedMonitor(None), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trained,
    ).fit(module, data)
    assert watch.watched >= 4
    assert watch.found == []
    assert module.step.last.step == 6
