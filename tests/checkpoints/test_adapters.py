"""Adapters on masks only: trained, continued, exported and loaded again, never merged."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_var import DiffusionLM, load_pretrained
from dllm_var.__main__ import main
from dllm_var.callbacks import ExportWeights
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.checkpoints.run_checkpoint import check_identity
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.lora import Lora, is_adapter
from dllm_var.objectives import Autoregressive, EosSchedule, IntrospectiveStride
from dllm_var.training.optim import AdamW, Schedule

LORA = dict(r=4, alpha=8.0, targets=["q_proj", "v_proj", "down_proj"], on_masks_only=True)


def data():
    return PackedDataModule(batch_size=2, context_length=48, packing="best_fit", overhang=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A causal checkpoint that transformers opens as one of the Qwen2 family."""
    torch.manual_seed(1)
    tokenizer = data().tokenizer
    config = TransformerConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True, vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id,
        initializer_range=0.2, causal=True,
    )  # fmt: skip
    return save_checkpoint_folder(tmp_path_factory.mktemp("base") / "base", Transformer(config), tokenizer)


def fit(base, folder, steps=3, lora=LORA, ckpt_path=None, lr=0.05, **settings):
    L.seed_everything(0, verbose=False)
    model = DiffusionLM(
        objective=IntrospectiveStride(4, clean_weight=0.0),
        init_from=str(base),
        lora=None if lora is None else Lora(**lora),
        optimizer=lambda params: AdamW(params, lr=lr, weight_decay=0.0),
        schedule=Schedule("constant", 0),
    )
    defaults = dict(accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False)
    defaults |= dict(enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0)
    defaults |= dict(limit_val_batches=0, default_root_dir=folder)
    trainer = L.Trainer(**{**defaults, **settings})
    trainer.fit(model, data(), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return model, trainer


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The folder of a run of three steps, and the transformer at its end."""
    folder = tmp_path_factory.mktemp("run")
    model, trainer = fit(base, folder, logger=True, callbacks=[ExportWeights()])
    trainer.save_checkpoint(folder / "run.ckpt")
    shutil.copy(folder / "run.ckpt", trainer.log_dir)
    return Path(trainer.log_dir), model.transformer.eval()


def tokens_with_masks(transformer):
    tokens = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 8:] = transformer.config.mask_id
    return tokens


@torch.no_grad()
def test_a_checkpoint_and_both_exports_are_the_trained_model(base, run):
    folder, trained = run
    tokens = tokens_with_masks(trained)
    logits, plain = trained(tokens), load_checkpoint(base)[0](tokens)
    assert (plain[:, 8:] - logits[:, 8:]).abs().max() > 0.1  # three steps have moved what masks predict
    for place in ("run.ckpt", "model", "adapter", "model/adapter"):
        loaded = load_checkpoint(folder / place)[0]
        torch.testing.assert_close(loaded(tokens), logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(loaded(tokens)[:, :8], plain[:, :8]), place
    assert torch.equal(load_pretrained(folder / "adapter")(tokens)[:, :8], plain[:, :8])


def test_others_open_the_exported_model_as_the_base(base, run):
    transformers = pytest.importorskip("transformers")
    folder, trained = run
    kept, exported = (load_file(place / "model.safetensors") for place in (base, folder / "model"))
    assert kept.keys() == exported.keys() and all(torch.equal(kept[name], exported[name]) for name in kept)
    tokens = tokens_with_masks(trained)[:, :8]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")(tokens).logits
        torch.testing.assert_close(theirs, load_checkpoint(base)[0](tokens), atol=1e-4, rtol=1e-4)
    peft = pytest.importorskip("peft")
    with pytest.raises(Exception, match="LORA_ON_MASKS"):
        peft.PeftModel.from_pretrained(load_checkpoint(base)[0], folder / "adapter")


def test_its_text_is_that_of_the_base(base, run, capsys):
    answers = []
    arguments = ["--prompt", "keyboard", "--max-new-tokens", "12"]
    for place in (base, run[0] / "model", run[0] / "run.ckpt"):
        for sampler in ("AutoregressiveSampler", "StridedSampler"):
            sampled = ["--sampler", f"dllm_var.sampling.{sampler}"]
            assert main(["generate", "--checkpoint", str(place), *sampled, *arguments]) == 0
            answers.append(capsys.readouterr().out)
    assert len(answers[0]) > len("keyboard -> ") and set(answers) == {answers[0]}


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(base, tmp_path):
    whole, _ = fit(base, tmp_path, steps=4)
    _, trainer = fit(base, tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(base, tmp_path, steps=4, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.transformer.state_dict().items():
        assert torch.equal(value, resumed.transformer.state_dict()[name]), name
    for lora in (None, {**LORA, "on_masks_only": False}):
        with pytest.raises(UserError, match=r"model\.lora"):
            fit(base, tmp_path, lora=lora, ckpt_path=tmp_path / "half.ckpt")


def test_checkpoints_of_earlier_versions_are_continued():
    """They do not say where adapters act, and keep their targets in the order in which they were given."""
    saved = dict(r=4, alpha=8.0, dropout=0.0, targets=["v_proj", "q_proj"])
    entry = {"transformer": {}, "lora": saved}
    check_identity(entry, TransformerConfig(), None, Lora(**saved), trained_on=True)
    with pytest.raises(UserError, match=r"model\.lora"):
        check_identity(entry, TransformerConfig(), None, Lora(**saved, on_masks_only=True), trained_on=True)
    for unknown in ({"rank": 4}, {"r": 4.5}, ["r"]):
        with pytest.raises(UserError, match="settings of adapters that this version does not know"):
            check_identity({**entry, "lora": unknown}, TransformerConfig(), None, None, trained_on=True)


def test_a_new_run_trains_the_adapters_on_or_is_refused(run, tmp_path):
    pytest.importorskip("peft")
    folder, trained = run
    kept = {name: value for name, value in trained.state_dict().items() if is_adapter(name)}
    for place in ("model", "adapter", "run.ckpt"):
        turned = {**LORA, "targets": LORA["targets"][::-1], "dropout": 0.1}
        model, _ = fit(folder / place, tmp_path, steps=1, lora=turned, lr=0.0)
        state = model.transformer.state_dict()
        assert all(torch.equal(state[name], value) for name, value in kept.items()), place
    for lora in (None, {**LORA, "r": 2}, {**LORA, "on_masks_only": False}):
        with pytest.raises(UserError, match=r"model\.init_from .* train them on with model\.lora"):
            fit(folder / "model", tmp_path, lora=lora)


def test_what_cannot_hold_them_is_refused(base, run, tmp_path, capsys):
    folder, _ = run
    arguments = ["--checkpoint", str(folder / "model"), "--format", "qwen2", "--output", str(tmp_path / "out")]
    assert main(["export", *arguments]) != 0
    assert "adapters on masks only, which no published family holds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for objective in (EosSchedule(), Autoregressive()):
        with pytest.raises(UserError, match=r"model\.lora\.on_masks_only .*" + type(objective).__name__):
            DiffusionLM(objective=objective, init_from=str(base), lora=Lora(**LORA))
    with pytest.raises(UserError, match=r"leave it out of model\.lora\.targets"):
        Lora(targets=["q_proj", "lm_head"], on_masks_only=True)


def test_damaged_adapters_are_named(base, run, tmp_path):
    folder, _ = run
    broken = tmp_path / "broken"
    shutil.copytree(folder / "adapter", broken)
    weights = load_file(broken / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"does not have the weights that its adapter_config\.json names"):
        load_checkpoint(broken)
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    save_file(weights, model / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_checkpoint(model)
    shutil.rmtree(model / "adapter")
    with pytest.raises(UserError, match="cannot read"):
        load_checkpoint(model)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    over = {**settings, "peft_type": "LORA", "base_model_name_or_path": str(folder / "model")}
    shutil.copytree(folder / "adapter", tmp_path / "over")
    (tmp_path / "over" / "adapter_config.json").write_text(json.dumps(over))
    with pytest.raises(UserError, match=r"cannot be merged into .*adapters on masks only"):
        load_checkpoint(tmp_path / "over")
