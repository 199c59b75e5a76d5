"""Adapters: what is trained, what is left alone, and the same model merged, apart and in peft's own hands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("peft")

from peft import PeftModel

from dllm_var import DiffusionLM
from dllm_var.callbacks import ExportWeights
from dllm_var.checkpoints.adapters import merge_adapters
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.cli.export import main as export
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.build import build_transformer
from dllm_var.model.lora import Lora, add_adapters, is_adapter, plain_name
from dllm_var.training.optim import AdamW, Schedule

ROOT = Path(__file__).parent.parent.parent
TOKENS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
LORA = dict(r=4, alpha=8.0)


def data():
    return PackedDataModule(batch_size=2, context_length=48, packing="best_fit", overhang=4)


@pytest.fixture
def base(tmp_path):
    """A checkpoint with biases and grouped queries, to start from."""
    torch.manual_seed(1)
    tokenizer = data().tokenizer
    config = TransformerConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True, vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id,
        initializer_range=0.2,
    )  # fmt: skip
    return str(save_checkpoint_folder(tmp_path / "base", Transformer(config), tokenizer))


def fit(base, folder, steps=3, lora=LORA, ckpt_path=None, **settings):
    L.seed_everything(0, verbose=False)
    model = DiffusionLM(
        init_from=base,
        lora=None if lora is None else Lora(**lora),
        optimizer=lambda params: AdamW(params, lr=0.05),
        schedule=Schedule("constant", 0),
    )
    defaults = dict(accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False)
    defaults |= dict(enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0)
    defaults |= dict(limit_val_batches=0, default_root_dir=folder)
    trainer = L.Trainer(**{**defaults, **settings})
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return model, trainer


def test_only_adapters_are_trained(base, tmp_path):
    model, trainer = fit(base, tmp_path)
    original = load_checkpoint(base)[0].state_dict()
    state = model.transformer.state_dict()
    assert {plain_name(name) for name in state if not is_adapter(name)} == set(original)
    for name, value in state.items():
        if not is_adapter(name):
            assert torch.equal(value, original[plain_name(name)]), name
    adapters = {name: value for name, value in state.items() if is_adapter(name)}
    assert len(adapters) == 2 * 2 * 7  # A and B of seven matrices in two layers
    assert all(value.abs().max() > 0 for value in adapters.values())
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for name, p in model.transformer.named_parameters() if is_adapter(name)}


def test_untrained_adapters_change_nothing(base):
    plain, adapted = load_checkpoint(base)[0], load_checkpoint(base)[0]
    add_adapters(adapted, Lora(**LORA))
    assert torch.equal(adapted(TOKENS), plain(TOKENS))


def test_merged_apart_and_in_peft_are_the_same_model(base, tmp_path):
    settings = dict(logger=True, callbacks=[ExportWeights()], default_root_dir=tmp_path / "run")
    model, trainer = fit(base, tmp_path, **settings)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    transformer = model.transformer.eval()
    with torch.no_grad():
        logits = transformer(TOKENS)
        run = trainer.log_dir
        plain = load_checkpoint(base)[0]
        assert (plain(TOKENS) - logits).abs().max() > 0.1  # three steps have moved it
        for path in (f"{run}/model", f"{run}/adapter", tmp_path / "run.ckpt"):
            loaded, tokenizer, _ = load_checkpoint(path)
            assert tokenizer.fingerprint == model.tokenizer.fingerprint
            torch.testing.assert_close(loaded(TOKENS), logits, atol=1e-5, rtol=1e-5)
            assert loaded.state_dict().keys() == plain.state_dict().keys()
        exported = tmp_path / "exported"
        arguments = ["--checkpoint", f"{run}/adapter", "--format", "qwen2", "--output", str(exported)]
        assert export("export", arguments) == 0
        torch.testing.assert_close(load_checkpoint(exported)[0](TOKENS), logits, atol=1e-5, rtol=1e-5)
        theirs = PeftModel.from_pretrained(plain, f"{run}/adapter")
        torch.testing.assert_close(theirs(TOKENS), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.merge_and_unload()(TOKENS), logits, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(base, tmp_path):
    whole, _ = fit(base, tmp_path, steps=4)
    _, trainer = fit(base, tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(base, tmp_path, steps=4, ckpt_path=str(tmp_path / "half.ckpt"))
    for name, value in whole.transformer.state_dict().items():
        assert torch.equal(value, resumed.transformer.state_dict()[name]), name


def test_a_run_goes_on_from_the_merged_model(base, tmp_path):
    _, trainer = fit(base, tmp_path)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    model, _ = fit(str(tmp_path / "first.ckpt"), tmp_path, steps=1, lora=None)
    assert not any(is_adapter(name) for name in model.transformer.state_dict())


def test_adapters_do_not_depend_on_where_they_are_made(base):
    """On the meta device, as sharded strategies build, or on the real one."""
    torch.manual_seed(5)
    direct = load_checkpoint(base)[0]
    add_adapters(direct, Lora(**LORA))
    torch.manual_seed(5)
    built = build_transformer(direct.config, Lora(**LORA), draw=False).state_dict()
    for name, value in direct.state_dict().items():
        if is_adapter(name):
            assert torch.equal(value, built[name])


TOY = """
data: {context_length: 48, batch_size: 4}
trainer:
  max_steps: 3
  val_check_interval: 3
  limit_val_batches: 1
  callbacks: [dllm_var.callbacks.ExportWeights]
"""


@pytest.mark.slow
def test_two_processes_with_sharded_weights_train_as_one(base, tmp_path):
    """FSDP2, where most of what is sharded is frozen."""
    (tmp_path / "toy.yaml").write_text(TOY)
    names = ("quickstart.yaml", "lora.yaml", "strategy/fsdp2.yaml")
    configs = [argument for name in names for argument in ("--config", str(ROOT / "configs" / name))]
    shape = ["hidden_size=32", "num_layers=2", "num_heads=4", "num_kv_heads=2", "qkv_bias=true"]
    settings = [f"--model.transformer.{value}" for value in shape]
    settings += ["--config", "toy.yaml", f"--model.init_from={base}", "--trainer.accelerator=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        spread = [f"--trainer.devices={devices}", f"--data.batch_size={4 // devices}"]
        command = [sys.executable, "-m", "dllm_var", "fit", *configs, *settings, *spread]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / f"runs/quickstart/version_{n}/model")[0] for n in (0, 1))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    apart = load_checkpoint(tmp_path / "runs/quickstart/version_1/adapter")[0]
    with torch.no_grad():
        torch.testing.assert_close(apart(TOKENS), two(TOKENS), atol=1e-5, rtol=1e-5)
        assert (one(TOKENS) - load_checkpoint(base)[0](TOKENS)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "r >= 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ["qkv"]}, "'qkv'; choose among q_proj"),
        ({"targets": []}, "choose among"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        Lora(**settings)


def test_other_mistakes_are_named(base, tmp_path):
    with pytest.raises(UserError, match=r"model\.lora needs model\.init_from"):
        DiffusionLM(lora=Lora())
    tied = Transformer(TransformerConfig(hidden_size=16, num_layers=1, num_heads=2, vocab_size=8, tie_embeddings=True))
    with pytest.raises(UserError, match="tied"):
        add_adapters(tied, Lora(targets=["lm_head"]))
    _, trainer = fit(base, tmp_path, steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UserError, match=r"model\.lora"):
        fit(base, tmp_path, lora=None, ckpt_path=str(tmp_path / "one.ckpt"))
    with pytest.raises(UserError, match=r"model\.lora"):
        fit(base, tmp_path, lora={**LORA, "r": 2}, ckpt_path=str(tmp_path / "one.ckpt"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="cannot read the adapter"):
        load_checkpoint(tmp_path)


def adapter(folder, base, **weights):
    """An adapter as peft writes one."""
    folder.mkdir(exist_ok=True)
    settings = dict(peft_type="LORA", base_model_name_or_path=str(base), r=1, lora_alpha=1, target_modules=["o_proj"])
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_dropout": 0.0}))
    named = {f"base_model.model.{name.replace('__', '.')}.weight": value for name, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def test_adapters_that_fit_no_model_are_named(base, tmp_path):
    stem = "model__layers__0__self_attn__o_proj"
    up, down = {f"{stem}__lora_B": torch.ones(32, 1)}, {f"{stem}__lora_A": torch.ones(1, 32)}
    loaded = load_checkpoint(adapter(tmp_path / "good", base, **up, **down))[0]
    moved = loaded.layers[0].self_attn.o_proj.weight - load_checkpoint(base)[0].layers[0].self_attn.o_proj.weight
    torch.testing.assert_close(moved, torch.ones(32, 32))
    for weights, says in (
        (up, "one half of a pair"),
        ({"model__layers__0__lora_B": torch.ones(32, 1), "model__layers__0__lora_A": torch.ones(1, 32)}, "no matrix"),
        ({**up, f"{stem}__lora_A": torch.ones(1, 31)}, r"shapes \[1, 31\] and \[32, 1\]"),
        ({**down, f"{stem}__lora_B": torch.full((32, 1), torch.nan)}, "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=says):
            load_checkpoint(adapter(tmp_path / "bad", base, **weights))
    for name, value in (("hidden_size", 64), ("vocab_size", 10**9)):
        values = json.loads((Path(base) / "config.json").read_text())
        values["dllm_var"]["transformer"][name] = value
        (tmp_path / "good" / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"another {name} than"):
            load_checkpoint(tmp_path / "good")
    adapter(tmp_path / "two", tmp_path / "one", **up, **down)
    for other in ("two", "one"):  # two that name each other, and one that names itself
        with pytest.raises(UserError, match="named as the checkpoint below itself"):
            load_checkpoint(adapter(tmp_path / "one", tmp_path / other, **up, **down))


def test_merging_keeps_the_type_of_the_base():
    weights = {"a.base_layer.weight": torch.ones(3, 2, dtype=torch.bfloat16), "b.weight": torch.ones(2)}
    weights |= {"a.lora_A.default.weight": torch.ones(1, 2), "a.lora_B.default.weight": torch.ones(3, 1)}
    merged = {
        name: read() for name, read in merge_adapters({name: weights[name].detach for name in weights}, 0.5).items()
    }
    assert list(merged) == ["a.weight", "b.weight"]
    assert merged["a.weight"].dtype == torch.bfloat16 and merged["a.weight"].eq(1.5).all()
    assert torch.equal(merged["b.weight"], weights["b.weight"])
