"""Training in 8 bits: what is rounded, against rounding by hand; what is saved; and what says that it cannot be done.

python -m pip install torchao; what needs a GPU for more than rounding is not here.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import torch

from dllm_var import DiffusionLM
from dllm_var.__main__ import main
from dllm_var.callbacks import ExportWeights
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.build import build_transformer
from dllm_var.model.float8 import Float8, check_float8, float8_matrices, use_float8
from dllm_var.model.lora import Lora

ROOT = Path(__file__).parent.parent.parent
CONFIG = TransformerConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, qkv_bias=True, vocab_size=48)
TOKENS = torch.randint(0, 48, (2, 11), generator=torch.Generator().manual_seed(0))
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="pip install torchao")


def rounded(x, dtype):
    """A tensor as 8-bit floats of one scale hold it."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).to(x.dtype) / scale


def test_the_matrices_of_the_blocks_are_chosen_and_nothing_else():
    names = {
        f"model.layers.{n}.{name}_proj"
        for n in (0, 1)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert float8_matrices(Transformer(CONFIG)) == names
    odd = TransformerConfig(hidden_size=24, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=48)
    assert float8_matrices(Transformer(odd)) == set()
    narrow = TransformerConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=40, vocab_size=48)
    assert float8_matrices(Transformer(narrow)) == {f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"}


@pytest.mark.parametrize(
    ("precision", "says"),
    [("32-true", r"trainer\.precision bf16-mixed"), ("16-mixed", r"not 16-mixed"), ("bf16-mixed", r"8\.9.*found cpu")],
)
def test_what_cannot_be_done_is_named(precision, says):
    with pytest.raises(UserError, match=says):
        check_float8(Float8(), torch.device("cpu"), precision)
    with pytest.raises(UserError, match=r"9\.0.*H100"):
        check_float8(Float8("rowwise"), torch.device("cpu"), "bf16-true")


def test_the_command_line_says_what_is_missing_before_any_data_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs = [f"--config={ROOT / 'configs' / name}" for name in ("quickstart.yaml", "float8.yaml")]
    arguments = ["fit", *configs, "--trainer.accelerator=cpu"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "needs a CUDA device" in said.err.strip().splitlines()[-1] and "data:" not in said.out + said.err
    if find_spec("torchao") is None:
        assert main([*arguments, "--model.float8.emulate=true"]) == 2
        said = capsys.readouterr()
        assert "pip install" in said.err.strip().splitlines()[-1] and "data:" not in said.out + said.err


@needs_torchao
def test_layers_multiply_what_has_been_rounded_and_the_head_does_not():
    """Against the definition: a scale that brings the largest entry to the largest number, gradients in e5m2."""
    torch.manual_seed(0)
    transformer = Transformer(CONFIG)
    layer = transformer.layers[0].self_attn.q_proj
    weight, bias = layer.weight, layer.bias
    names = list(transformer.state_dict())
    use_float8(transformer, Float8(emulate=True))
    converted = transformer.layers[0].self_attn.q_proj
    assert converted is not layer and converted.weight is weight and list(transformer.state_dict()) == names
    assert type(transformer.lm_head) is torch.nn.Linear and type(transformer.embedding) is torch.nn.Embedding
    x = torch.randn(2, 11, 32, requires_grad=True)
    out = converted(x)
    flat = x.detach().flatten(0, 1)
    inputs, matrix = rounded(flat, torch.float8_e4m3fn), rounded(weight.detach(), torch.float8_e4m3fn)
    torch.testing.assert_close(out.flatten(0, 1), inputs @ matrix.T + bias, atol=1e-5, rtol=1e-5)
    assert (out.flatten(0, 1) - (flat @ weight.T + bias)).abs().max() > 1e-4  # it is not the unrounded product
    gradient = torch.randn_like(out)
    out.backward(gradient)
    flat_gradient = rounded(gradient.flatten(0, 1), torch.float8_e5m2)
    torch.testing.assert_close(x.grad.flatten(0, 1), flat_gradient @ matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad, flat_gradient.T @ inputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias.grad, gradient.flatten(0, 1).sum(0), atol=1e-5, rtol=1e-5)


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_every_recipe_is_near_the_exact_model_with_and_without_recomputing(recipe):
    torch.manual_seed(0)
    exact = Transformer(CONFIG)
    expected = exact(TOKENS)
    gradients = []
    for policy in ("none", "full", "selective"):
        torch.manual_seed(0)
        rough = build_transformer(CONFIG, float8=Float8(recipe, emulate=True))
        rough.recompute_activations(policy)
        found = rough(TOKENS)
        assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05  # e4m3 has 3 bits behind the point
        found.square().mean().backward()
        gradients.append(rough.layers[0].mlp.down_proj.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def fit(folder, **settings):
    L.seed_everything(0, verbose=False)
    shape = TransformerConfig(hidden_size=32, num_layers=1, num_heads=2)
    model = DiffusionLM(shape if "init_from" not in settings else TransformerConfig(), **settings)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=1, val_check_interval=3,
        default_root_dir=folder, callbacks=[ExportWeights()],
    )  # fmt: skip
    trainer.fit(model, PackedDataModule(batch_size=3, context_length=21, packing="best_fit", overhang=4))
    trainer.save_checkpoint(folder / "run.ckpt")
    return model, trainer


@needs_torchao
def test_a_run_leaves_plain_weights_that_open_without_torchao(tmp_path):
    model, _ = fit(tmp_path, float8=Float8(emulate=True))
    assert type(model.transformer.layers[0].mlp.down_proj) is not torch.nn.Linear
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(type(value) is torch.Tensor for value in checkpoint["state_dict"].values())
    opened = load_checkpoint(tmp_path / "run.ckpt")[0]
    assert type(opened.layers[0].mlp.down_proj) is torch.nn.Linear
    for (name, ours), (other, theirs) in zip(
        model.transformer.named_parameters(), opened.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(ours, theirs)
    again, _ = fit(tmp_path, init_from=str(tmp_path / "run.ckpt"))  # in full precision, from there
    assert type(again.transformer.layers[0].mlp.down_proj) is torch.nn.Linear


@needs_torchao
def test_adapters_are_trained_in_full_precision_beside_rounded_weights(tmp_path):
    pytest.importorskip("peft")
    fit(tmp_path)
    model, _ = fit(tmp_path, init_from=str(tmp_path / "run.ckpt"), lora=Lora(r=4), float8=Float8(emulate=True))
    adapted = model.transformer.layers[0].mlp.down_proj
    assert type(adapted.base_layer) is not torch.nn.Linear and type(adapted.lora_A["default"]) is torch.nn.Linear
    assert adapted.lora_B["default"].weight.abs().max() > 0 and not adapted.base_layer.weight.requires_grad


@needs_torchao
@pytest.mark.slow
def test_two_processes_with_sharded_weights_train_as_one(tmp_path):
    """FSDP2; by the recipe whose scales do not depend on which rows lie together in a batch.

    The last digit of a sum decides now and then which way an entry is rounded, so they are not equal to the last digit.
    """
    settings = [
        *(f"--config={ROOT / 'configs' / name}" for name in ("quickstart.yaml", "strategy/fsdp2.yaml")),
        "--model.transformer.hidden_size=32", "--model.transformer.num_layers=2", "--model.transformer.num_heads=2",
        "--model.float8={recipe: rowwise_with_gw_hp, emulate: true}", "--data.context_length=48",
        "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.3, fused: false}}",
        "--model.schedule={kind: constant, warmup_steps: 0}", "--trainer.max_steps=3", "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu", "--trainer.callbacks=[dllm_var.callbacks.ExportWeights]",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        spread = [f"--trainer.devices={devices}", f"--data.batch_size={4 // devices}"]
        command = [sys.executable, "-m", "dllm_var", "fit", *settings, *spread]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / f"runs/quickstart/version_{n}/model")[0] for n in (0, 1))
    ours, theirs = (torch.cat([weight.flatten() for weight in model.parameters()]) for model in (one, two))
    torch.manual_seed(1)  # the quickstart's, from which each weight is drawn by its name
    first = torch.cat([weight.flatten() for weight in Transformer(one.config).parameters()])
    moved = (ours - first).norm()
    assert moved > 0.1 and (ours - theirs).norm() < 0.02 * moved
