"""The same rows give the same training on one process, on two, and sharded over two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys
import torch
import lightning as L
from dllm_var import DiffusionLM
from dllm_var.datamodules import PackedDataModule
from dllm_var.model import TransformerConfig
from dllm_var.optim import Schedule

strategy, devices, batch_size, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
L.seed_everything(3, verbose=False)
if strategy == "fsdp2":
    from lightning.pytorch.strategies import ModelParallelStrategy
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
adamw = lambda params: torch.optim.AdamW(params, lr=1e-2, eps=1e-4)
config = TransformerConfig(hidden_size=16, num_layers=2, num_heads=2)
model = DiffusionLM(config, optimizer=adamw, schedule=Schedule("constant", 0))
data = PackedDataModule(batch_size=batch_size, context_length=48, packing="best_fit", canvas=4)
trainer = L.Trainer(
    strategy=strategy, devices=devices, accelerator="cpu", max_steps=3, limit_val_batches=2, val_check_interval=3,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    num_sanity_val_steps=0,
)
trainer.fit(model, data)
named = model.transformer.named_parameters()
weights = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in named}
if trainer.is_global_zero:
    torch.save({"weights": weights, "loss": float(trainer.callback_metrics["val/nelbo"])}, path)
"""


def train(folder: Path, strategy: str, devices: int, batch_size: int) -> dict:
    path = folder / f"{strategy}{devices}.pt"
    command = [sys.executable, "-c", SCRIPT, strategy, str(devices), str(batch_size), str(path)]
    if devices > 1:  # Lightning starts the other process from a file
        script = folder / "train.py"
        script.write_text(SCRIPT)
        command[1:3] = [str(script)]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(strategy, tmp_path):
    one, two = train(tmp_path, "auto", 1, 8), train(tmp_path, strategy, 2, 4)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], weight, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert two["loss"] == pytest.approx(one["loss"], rel=0.2)  # two of four validation batches against two of eight
