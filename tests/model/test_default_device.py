"""Lightning builds a model while the GPU is torch's default device; weights must not depend on that.

`meta` stands in for the GPU: a tensor made on the default device by mistake has no values there, and copying it raises.
"""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dllm_var import DiffusionLM
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.checkpoints.starting_from import start_from
from dllm_var.datamodules import PackedDataModule
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.build import build_transformer
from dllm_var.model.lora import Lora, is_adapter
from dllm_var.training.strategies import FSDP2
from dllm_var.training.trainer import Trainer

SHAPE = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True)


CONFIG = TransformerConfig(**SHAPE, vocab_size=50)


def drawn(default_device):
    """Weights as they are first drawn, and what they compute."""
    torch.manual_seed(3)
    with torch.device(default_device):
        model = Transformer(CONFIG).to_empty(device="cpu")
        model.reset_parameters()
        return {**model.state_dict(), "logits": model(torch.zeros(1, 3, dtype=torch.long, device="cpu"))}


def adapters(default_device):
    """Adapters as they are first drawn; the other weights are a checkpoint's."""
    pytest.importorskip("peft")
    torch.manual_seed(3)
    with torch.device(default_device):
        model = build_transformer(CONFIG, Lora(r=4), draw=False, device=torch.device("cpu"))
    return {name: value for name, value in model.state_dict().items() if is_adapter(name)}


@pytest.mark.parametrize("initial", [drawn, adapters])
def test_initial_weights(initial):
    expected, found = initial("cpu"), initial("meta")
    assert expected and expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def folder(path, data):
    tokenizer = data.tokenizer
    config = TransformerConfig(
        **SHAPE, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id,
        terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id,
    )  # fmt: skip
    return save_checkpoint_folder(path / "folder", Transformer(config), tokenizer)


def trained(path, data, strategy="auto"):
    kept = ModelCheckpoint(path, save_last=True, save_top_k=0, every_n_train_steps=1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, strategy=strategy, callbacks=[kept], default_root_dir=path, **quiet
    )
    trainer.fit(DiffusionLM(TransformerConfig(**SHAPE)), data)
    return path / "last.ckpt"


CHECKPOINTS = {
    "a folder": folder,
    "a file": trained,
    "shards": lambda path, data: trained(path, data, FSDP2()),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_weights_that_a_checkpoint_holds(kind, tmp_path):
    L.seed_everything(0, verbose=False)
    data = PackedDataModule(batch_size=2, context_length=48, packing="best_fit", overhang=4)
    checkpoint = CHECKPOINTS[kind](tmp_path, data)
    expected = load_checkpoint(checkpoint)[0]
    with torch.device("meta"):
        found = build_transformer(expected.config, draw=False, device=torch.device("cpu"))
        start_from(found, data.tokenizer, str(checkpoint))
        decoder = load_checkpoint(checkpoint)[0]
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]) and torch.equal(value, decoder.state_dict()[name]), name
