"""Adapters above quantised matrices: trained as above the plain numbers; merged, apart and resumed the same model."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from dllm_var import DiffusionLM
from dllm_var.callbacks import EmaWeights, ExportWeights
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint, open_checkpoint, weight_shapes
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.build import build_transformer
from dllm_var.model.lora import Lora, is_adapter
from dllm_var.model.quantised import KINDS, QuantisedLinear, dequantise, quantise
from dllm_var.model.sharding import DATA_PARALLEL, TENSOR_PARALLEL
from dllm_var.objectives import IntrospectiveStride
from dllm_var.training.optim import AdamW, Schedule

TOKENS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def data():
    return PackedDataModule(batch_size=2, context_length=48, packing="best_fit", overhang=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint to start from."""
    torch.manual_seed(1)
    tokenizer = data().tokenizer
    special = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    sizes = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, initializer_range=0.2)
    config = TransformerConfig(**sizes, qkv_bias=True, vocab_size=tokenizer.vocab_size, **special)
    return str(save_checkpoint_folder(tmp_path_factory.mktemp("base"), Transformer(config), tokenizer))


def rounded(base, kind, folder):
    """The checkpoint with plain matrices of the numbers that integers stand for."""
    model, tokenizer, _ = load_checkpoint(base)
    for matrix in model.layers.parameters():
        if matrix.dim() == 2:
            matrix.data = dequantise(*quantise(matrix.data, KINDS[kind]), torch.float32)
    return str(save_checkpoint_folder(folder, model, tokenizer))


def fit(base, folder, quantize, steps=3, ckpt_path=None, on_masks_only=False, **settings):
    L.seed_everything(0, verbose=False)
    model = DiffusionLM(
        init_from=base,
        lora=Lora(r=4, alpha=8.0, on_masks_only=on_masks_only),
        quantize=quantize,
        objective=IntrospectiveStride(3) if on_masks_only else None,
        optimizer=lambda params: AdamW(params, lr=0.05),
        schedule=Schedule("constant", 0),
    )
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    quiet |= dict(num_sanity_val_steps=0, limit_val_batches=0, default_root_dir=folder)
    trainer = L.Trainer(**{**dict(accelerator="cpu", max_steps=steps, logger=False), **quiet, **settings})
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return model, trainer


@pytest.mark.parametrize(("kind", "on_masks_only"), [("int8", False), ("int4", False), ("int4", True)])
@torch.no_grad()
def test_adapters_are_those_trained_above_the_plain_numbers(base, kind, on_masks_only, tmp_path):
    if not on_masks_only:
        pytest.importorskip("peft")
    settings = dict(logger=True, callbacks=[ExportWeights()], on_masks_only=on_masks_only)
    model, trainer = fit(base, tmp_path / "run", kind, **settings)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    plain, _ = fit(rounded(base, kind, tmp_path / "rounded"), tmp_path, None, on_masks_only=on_masks_only)
    assert sum(isinstance(module, QuantisedLinear) for module in model.transformer.modules()) == 2 * 7
    ours, theirs = (one.transformer.state_dict() for one in (model, plain))
    names = [name for name in ours if is_adapter(name)]
    assert len(names) == 2 * 2 * 7 and names == [name for name in theirs if is_adapter(name)]
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
        assert ours[name].abs().max() > 0
    logits = model.transformer.eval()(TOKENS)
    torch.testing.assert_close(logits, plain.transformer.eval()(TOKENS), rtol=1e-3, atol=1e-3)
    for path in (f"{trainer.log_dir}/model", tmp_path / "run.ckpt"):
        torch.testing.assert_close(load_checkpoint(path)[0](TOKENS), logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_adapter_by_itself_belongs_to_the_weights_as_they_were(base, tmp_path):
    pytest.importorskip("peft")
    _, trainer = fit(base, tmp_path, "int4", logger=True, callbacks=[ExportWeights()])
    apart, merged, start = (
        open_checkpoint(path) for path in (f"{trainer.log_dir}/adapter", f"{trainer.log_dir}/model", base)
    )
    for name, shape in weight_shapes(start.config).items():
        added = apart.weight(name, shape) - start.weight(name, shape)
        numbers = start.weight(name, shape)
        if len(shape) == 2 and "layers" in name:
            numbers = dequantise(*quantise(numbers, KINDS["int4"]), torch.float32)
            assert added.abs().max() > 0
        torch.testing.assert_close(merged.weight(name, shape) - numbers, added, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(base, tmp_path):
    pytest.importorskip("peft")
    whole, _ = fit(base, tmp_path, "int4", steps=4)
    _, trainer = fit(base, tmp_path, "int4", steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(base, tmp_path, "int4", steps=4, ckpt_path=str(tmp_path / "half.ckpt"))
    for name, value in whole.transformer.state_dict().items():
        assert torch.equal(value, resumed.transformer.state_dict()[name]), name
    with pytest.raises(UserError, match=r"model\.quantize=int4, the settings say int8"):
        fit(base, tmp_path, "int8", steps=4, ckpt_path=str(tmp_path / "half.ckpt"))


def test_an_average_of_weights_leaves_integers_as_they_are(base, tmp_path):
    pytest.importorskip("peft")
    averaged, _ = fit(base, tmp_path, "int4", callbacks=[EmaWeights(decay=0.5)])
    last, _ = fit(base, tmp_path, "int4")
    for name, value in last.transformer.state_dict().items():
        assert torch.equal(value, averaged.transformer.state_dict()[name]) is not is_adapter(name), name


def test_a_quantised_folder_is_taken_over_as_it_is(base, tmp_path):
    pytest.importorskip("peft")
    from dllm_var.__main__ import main

    arguments = ["--checkpoint", base, "--format", "qwen2", "--quantize", "int4", "--output", str(tmp_path / "int4")]
    assert main(["export", *arguments]) == 0
    given, _ = fit(str(tmp_path / "int4"), tmp_path, "int4", steps=1)
    read, _ = fit(base, tmp_path, "int4", steps=1)
    for name, value in read.transformer.state_dict().items():
        assert torch.equal(value, given.transformer.state_dict()[name]), name
    with pytest.raises(UserError, match="weights of 4 bits already: leave out the setting quantize int8"):
        DiffusionLM(init_from=str(tmp_path / "int4"), lora=Lora(), quantize="int8")


def test_what_does_not_go_together_is_named(base):
    with pytest.raises(UserError, match=r"model\.quantize int4 needs model\.lora.*configs/qlora\.yaml"):
        DiffusionLM(init_from=base, quantize="int4")
    mesh = dict.fromkeys((DATA_PARALLEL, TENSOR_PARALLEL), SimpleNamespace(size=lambda: 1))
    with pytest.raises(UserError, match=r"sharded weights: take configs/strategy/ddp\.yaml"):
        build_transformer(TransformerConfig(vocab_size=50), Lora(), mesh=mesh, integers=KINDS["int4"])
