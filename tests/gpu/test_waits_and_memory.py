"""What a step waits for and what sampling takes: to be seen on a GPU alone."""

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from dllm_var import DiffusionLM
from dllm_var.callbacks import EmaWeights, SamplingCallback
from dllm_var.datamodules import PackedDataModule
from dllm_var.model import TransformerConfig
from dllm_var.model.attention import Seen, attend
from dllm_var.model.attention_kernels import kernels_for
from dllm_var.objectives import BlockDiffusion
from dllm_var.sampling import BlockDiffusionSampler
from dllm_var.training.strategies import FSDP2


class CountWaits(L.Callback):
    """Counts the operations of each batch after the fourth that wait for the device."""

    def __init__(self) -> None:
        self.waits: list[int] = []
        self._caught: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= 4:
            self._caught = warnings.catch_warnings(record=True)
            self._found = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *_: Any) -> None:
        if self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self._caught = None
            self.waits.append(sum("synchronizing" in str(each.message) for each in self._found))


@pytest.mark.parametrize("callbacks", [(), (EmaWeights(),)])
def test_a_step_waits_for_nothing_until_its_figures_are_due(callbacks: Any, fit: Any, cuda: torch.device) -> None:
    waits = CountWaits()
    fit(callbacks=(*callbacks, waits), precision="bf16-mixed", max_steps=8, log_every_n_steps=100)
    assert waits.waits == [0] * 4


def test_block_diffusion_reads_long_rows_with_grouped_queries_and_a_large_vocabulary(device: torch.device) -> None:
    """One row of 4,096 tokens, 126,464 entries: a step in 16 bits, its gradients finite, its memory bounded."""
    length, entries = (4096, 126_464) if device.type == "cuda" else (256, 1_000)
    shape = TransformerConfig(hidden_size=512, num_layers=2, num_heads=8, num_kv_heads=2, vocab_size=entries)
    module = DiffusionLM(shape, BlockDiffusion(block_length=32))
    module.use_tokenizer(PackedDataModule(context_length=length).tokenizer)
    with device:
        module.configure_model()
    module._trainer = type("Trainer", (), {"strategy": None, "global_step": 0})()  # type: ignore[assignment]
    assert module.tokenizer is not None
    places = torch.arange(length)
    tokens = torch.randint(5, 40, (1, length), generator=torch.Generator().manual_seed(0))
    tokens[tokens == module.tokenizer.mask_id] = 5
    sample = length // 4  # four samples, a quarter of each its prompt
    batch = {
        "input_ids": tokens,
        "supervised": (places % sample >= sample // 4)[None],
        "segment_ids": (places // sample)[None],
        "position_ids": (places % sample)[None],
        "row": torch.tensor([0]),
    }
    with torch.autocast(device.type, torch.bfloat16):
        loss = module.training_step({name: value.to(device) for name, value in batch.items()}, 0)
    loss.backward()
    assert module.transformer is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.transformer.parameters())
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated() < 30 * 2**30


class Memory(SamplingCallback):
    """Bytes that are allocated before, at most during, and after sampling."""

    def sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        super().sample(trainer, pl_module)
        self.grown = torch.cuda.max_memory_allocated() - before
        self.left = torch.cuda.memory_allocated() - before


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_sampling_during_fit_takes_little_and_leaves_nothing(strategy: str, fit: Any, cuda: torch.device) -> None:
    """Under FSDP2 one block at a time is gathered beside embedding and head: of eight blocks, at most three."""
    shape = TransformerConfig(hidden_size=1024, num_layers=8, num_heads=16)
    sampling = Memory(BlockDiffusionSampler(block_length=12, max_new_tokens=24), num_examples=4, every_n_steps=2)
    settings: Any = dict(callbacks=(sampling,), max_steps=4)
    _, module, _ = fit(dict(transformer=shape), strategy=FSDP2() if strategy == "fsdp2" else "auto", **settings)
    block = sum(p.numel() * p.element_size() for p in module.transformer.layers[0].parameters())
    root = sum(p.numel() * p.element_size() for p in module.transformer.parameters()) - 8 * block
    assert sampling.grown < 3 * block + root + 64 * 2**20
    assert sampling.left < 2**20


def test_the_order_of_attention_kernels_is_measured_and_changes_nothing(
    cuda: torch.device, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DLLM_VAR_CACHE", str(tmp_path))
    queries, keys, values = torch.randn(2, 512, 8, 64, device=cuda, dtype=torch.bfloat16).split((4, 2, 2), dim=2)
    kernels = kernels_for((512, 4, 2, 64), False, torch.bfloat16, cuda)
    [seconds] = json.loads((tmp_path / "attention_kernels.json").read_text()).values()
    assert min(seconds.values()) < 0.1
    ordered = attend(queries, keys, values, Seen(kernels=kernels))
    torch.testing.assert_close(ordered, attend(queries, keys, values, Seen()), rtol=0.02, atol=0.02)
