"""The LightningModule: one step's gradient, its normalisation, validation and checkpoints."""

import lightning as L
import pytest
import torch

from dllm_var import DiffusionLM
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import TransformerConfig
from dllm_var.objectives import Autoregressive, BlockDiffusion, EosSchedule, Mdlm, MultiBlockDiffusion
from dllm_var.training.optim import Muon, Schedule

SMALL = TransformerConfig(hidden_size=16, num_layers=1, num_heads=2)


def trainer(folder, **settings):
    defaults = dict(accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False)
    defaults |= dict(enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=0, default_root_dir=folder)
    return L.Trainer(**{**defaults, **settings})


def fit(folder, batch_size=8, accumulate=1, objective=None, attention="document", seed=0, **settings):
    L.seed_everything(0, verbose=False)
    model = DiffusionLM(
        SMALL, objective, attention, lambda params: torch.optim.SGD(params, lr=1.0), Schedule("constant", 0), seed=seed
    )
    data = PackedDataModule(batch_size=batch_size, context_length=48, packing="best_fit", overhang=4)
    run = trainer(folder, accumulate_grad_batches=accumulate, **settings)
    run.fit(model, data)
    return model, run


@pytest.mark.parametrize("objective", [EosSchedule, Mdlm, Autoregressive, BlockDiffusion])
def test_the_step_does_not_depend_on_how_the_rows_are_split(objective, tmp_path):
    """8 rows at once, or 4 x 2 accumulated: batches differ in loss tokens, the step must not."""
    whole, _ = fit(tmp_path, 8, 1, objective())
    split, _ = fit(tmp_path, 2, 4, objective())
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_that_of_the_mean_over_masked_tokens(tmp_path):
    model, _ = fit(tmp_path, 8, 1, EosSchedule(), max_steps=1)
    L.seed_everything(0, verbose=False)
    fresh = DiffusionLM(SMALL)
    data = PackedDataModule(batch_size=8, context_length=48, packing="best_fit", overhang=4)
    fresh.use_tokenizer(data.tokenizer)
    L.seed_everything(0, verbose=False)
    fresh.configure_model()
    batch = data.rows("train").__getitems__(list(range(8)))
    noised = fresh.objective.corrupt(batch, fresh.noise)
    logits = fresh.transformer(noised.input_ids, batch["position_ids"], batch["segment_ids"])
    torch.nn.functional.cross_entropy(logits[noised.loss_mask], batch["input_ids"][noised.loss_mask]).backward()
    moved = [(before - after).flatten() for before, after in zip(fresh.parameters(), model.parameters(), strict=True)]
    expected = [parameter.grad.flatten() for parameter in fresh.parameters()]
    torch.testing.assert_close(torch.cat(moved), torch.cat(expected), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumed_within_an_epoch_ends_bit_for_bit_as_if_it_had_not_stopped(workers, tmp_path):
    def run(steps, checkpoint=None):
        L.seed_everything(0, verbose=False)
        model = DiffusionLM(SMALL, schedule=Schedule("constant", 0))
        data = PackedDataModule(batch_size=4, context_length=48, packing="best_fit", canvas=4, num_workers=workers)
        loop = trainer(tmp_path, max_steps=steps, limit_train_batches=5)  # three steps, and two, of an epoch of five
        loop.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        return model, loop

    whole, _ = run(8)
    _, first = run(3)
    first.save_checkpoint(tmp_path / "three.ckpt")
    _, second = run(7, tmp_path / "three.ckpt")
    second.save_checkpoint(tmp_path / "seven.ckpt")
    resumed, _ = run(8, tmp_path / "seven.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_is_reproducible_and_seed_and_attention_matter(tmp_path):
    settings = ({}, {}, {"seed": 1}, {"attention": "full"})
    weights = [torch.cat([p.flatten() for p in fit(tmp_path, **one)[0].parameters()]) for one in settings]
    assert [torch.equal(weights[0], other) for other in weights[1:]] == [True, False, False]


@pytest.mark.parametrize("objective", [EosSchedule, Autoregressive, BlockDiffusion, MultiBlockDiffusion])
def test_validation_logs_loss_accuracy_terminators_and_likelihood(objective, tmp_path):
    model, run = fit(tmp_path, objective=objective(), limit_val_batches=2, val_check_interval=2)
    logged = run.callback_metrics
    for name in ("loss", "masked_accuracy", "terminator_recall", "nelbo", "perplexity_bound"):
        assert torch.isfinite(logged[f"val/{name}"])
    assert logged["val/perplexity_bound"] == pytest.approx(float(logged["val/nelbo"].exp()), rel=1e-4)
    buckets = [name for name in logged if name.startswith("val/loss_t=")]
    assert len(buckets) == (0 if model.objective.causal else 5)
    again = run.validate(
        model, PackedDataModule(batch_size=8, context_length=48, packing="best_fit", overhang=4), verbose=False
    )
    assert again[0]["val/nelbo"] == pytest.approx(float(logged["val/nelbo"]), rel=1e-5)  # the noise is fixed


def test_untrained_nelbo_is_about_that_of_guessing(tmp_path):
    """A model that knows nothing pays log V per token; the 1/t weights must not change that."""
    model, run = fit(tmp_path, limit_val_batches=50, val_check_interval=1, max_steps=1)
    model.transformer.lm_head.weight.data.zero_()
    data = PackedDataModule(batch_size=8, context_length=48, packing="best_fit", overhang=4)
    nelbo = run.validate(model, data, verbose=False)[0]["val/nelbo"]
    assert nelbo == pytest.approx(float(torch.tensor(float(model.config.vocab_size)).log()), rel=0.05)


def test_samples_are_counted_without_the_padding(tmp_path):
    """Padding stands at position 0 as the first token of a sample does."""
    model, _ = fit(tmp_path, max_steps=1)
    batch = (
        PackedDataModule(batch_size=8, context_length=48, packing="best_fit", overhang=4)
        .rows("train")
        .__getitems__(range(8))
    )
    assert (batch["segment_ids"] == -1).any()
    assert model.last_step_stats["samples"] == int((batch["segment_ids"].amax(dim=1) + 1).sum())


def test_a_schedule_that_needs_the_length_of_the_run_says_so(tmp_path):
    data = PackedDataModule(batch_size=8, context_length=48)
    endless = dict(max_steps=-1, max_epochs=-1, max_time={"seconds": 0})
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        trainer(tmp_path, **endless).fit(DiffusionLM(SMALL), data)
    trainer(tmp_path, **endless).fit(DiffusionLM(SMALL, schedule=Schedule("constant")), data)


def test_without_a_tokenizer_the_model_says_where_it_looks_for_one(tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        trainer(tmp_path).fit(DiffusionLM(SMALL), [])


def test_a_checkpoint_is_plain_data_and_loads_without_its_config(tmp_path):
    model, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    transformer, tokenizer, _ = load_checkpoint(tmp_path / "x.ckpt")
    assert tokenizer.encode("ab") == model.tokenizer.encode("ab")
    assert transformer.config.context_length == 48  # the data's
    for a, b in zip(transformer.parameters(), model.transformer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_trains_through_lightning_and_lowers_the_loss(tmp_path):
    model = DiffusionLM(SMALL, optimizer=Muon, schedule=Schedule(warmup_steps=2))
    losses = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(float(trainer.callback_metrics["train/loss"]))

    data = PackedDataModule(batch_size=8, context_length=48, packing="best_fit", overhang=4)
    trainer(tmp_path, max_steps=25, log_every_n_steps=1, callbacks=[Watch()], gradient_clip_val=1.0).fit(model, data)
    assert sum(losses[-3:]) < 0.92 * sum(losses[:3])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("limit", [0.01, 1e4])
def test_gradients_are_clipped_as_torch_does(tmp_path, algorithm, limit):
    model = DiffusionLM(SMALL, schedule=Schedule("constant", 0))
    seen = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # the module's own hook comes after
            seen["before"] = [p.grad.clone() for p in pl_module.transformer.parameters()]

    data = PackedDataModule(batch_size=8, context_length=48, packing="best_fit", overhang=4)
    clipping = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    trainer(tmp_path, max_steps=1, callbacks=[Watch()], **clipping).fit(model, data)
    norm = torch.stack([g.norm() for g in seen["before"]]).norm()
    scale = model.step.last.gradient_norm / norm  # the module divides by the loss tokens first
    expected = [torch.nn.Parameter(torch.empty_like(g)) for g in seen["before"]]
    for parameter, gradient in zip(expected, seen["before"], strict=True):
        parameter.grad = gradient * scale
    if algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(expected, limit)
    else:
        torch.nn.utils.clip_grad_value_(expected, limit)
    for ours, theirs in zip(model.transformer.parameters(), expected, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)


def test_a_checkpoint_of_another_model_or_tokenizer_is_refused(tmp_path):
    _, run = fit(tmp_path, max_steps=1)
    run.save_checkpoint(tmp_path / "x.ckpt")
    wider = DiffusionLM(TransformerConfig(hidden_size=32, num_layers=1, num_heads=2))
    data = PackedDataModule(batch_size=8, context_length=48, packing="best_fit", overhang=4)
    with pytest.raises(UserError, match=r"hidden_size=16, the settings say 32"):
        trainer(tmp_path).fit(wider, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    tokenizer = checkpoint["dllm_var"]["tokenizer"]
    tokenizer["tokenizer_json"] = tokenizer["tokenizer_json"].replace('"ZH"', '"ZX"')
    torch.save(checkpoint, tmp_path / "y.ckpt")
    with pytest.raises(UserError, match="another tokenizer"):
        trainer(tmp_path).fit(DiffusionLM(SMALL), data, ckpt_path=tmp_path / "y.ckpt", weights_only=True)


def test_a_run_may_start_from_another_runs_weights(tmp_path):
    trained, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "first.ckpt")
    data = PackedDataModule(batch_size=8, context_length=48)

    def start(**changes):
        still = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
        model = DiffusionLM(
            **{"transformer": SMALL, "optimizer": still, "schedule": Schedule("constant", 0), **changes}
        )
        trainer(tmp_path, max_steps=1).fit(model, data)
        return model

    assert all(
        torch.equal(a, b)
        for a, b in zip(trained.parameters(), start(init_from=str(tmp_path / "first.ckpt")).parameters(), strict=True)
    )
    wider = TransformerConfig(hidden_size=32, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="hidden_size=16, the settings say 32"):
        start(transformer=wider, init_from=str(tmp_path / "first.ckpt"))
