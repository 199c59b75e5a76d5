"""How often a training step would wait for a GPU, counted by operations whose results the host must read to go on."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_var import DiffusionLM
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


@pytest.mark.parametrize(
    ("objective", "attention", "waits"),
    [
        (EosSchedule(), "document", 2),
        (EosSchedule(), "full", 1),
        (Mdlm(), "document", 2),  # its losses have weights
        (Autoregressive(), "document", 2),
        (BlockDiffusion(block_length=4, autoregressive_weight=0.5, causal_context=True), "document", 2),
        (MultiBlockDiffusion(block_length=4, autoregressive_weight=0.5, causal_context=True), "document", 2),
    ],
)
def test_a_batch_waits_for_its_loss_positions_and_its_documents(objective, attention, waits, monkeypatch):
    """And block diffusion for the number of blocks; it has a rule in place of documents."""
    monkeypatch.setattr("dllm_var.model.attention.has_varlen", lambda *_: True)
    data = PackedDataModule(batch_size=4, context_length=48, packing="best_fit", overhang=4)
    module = DiffusionLM(TransformerConfig(hidden_size=16, num_layers=2, num_heads=2), objective, attention)
    module.use_tokenizer(data.tokenizer)
    module.configure_model()
    module._trainer = SimpleNamespace(strategy=None, global_step=0)
    batch = data.rows("train").__getitems__(range(4))
    module.training_step(batch, 0)  # what is made once
    with Waits() as found:
        module.training_step(batch, 0).backward()
    assert len(found.found) == waits, found.found
