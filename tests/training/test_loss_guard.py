"""Updates from losses that are not finite are skipped on every rank, recorded, and end the run in the end."""

import json
import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from dllm_var import DiffusionLM
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import TransformerConfig
from dllm_var.objectives import EosSchedule
from dllm_var.training import loss_guard
from dllm_var.training.loss_guard import GUARD_FILE, LossGuard
from dllm_var.training.optim import AdamW, Muon, Schedule

SMALL = TransformerConfig(hidden_size=16, num_layers=1, num_heads=2)


class Poisoned(EosSchedule):
    """Rows whose loss is not a number, and rows whose loss is a hundred times too large."""

    def __init__(self, nan=(), huge=(), infinite_gradient=()):
        super().__init__(t_max=1.0)
        self.nan, self.huge, self.infinite_gradient = set(nan), set(huge), set(infinite_gradient)

    def corrupt(self, batch, generator):
        noised = super().corrupt(batch, generator)
        noised.weights = torch.ones_like(noised.mask_rate)
        for place, row in enumerate(batch["row"].tolist()):
            if row in self.nan:
                noised.weights[place] = math.nan
            if row in self.huge:
                noised.weights[place] = 100.0
        self.explode = bool(self.infinite_gradient & set(batch["row"].tolist()))
        return noised

    def loss(self, token_loss, noised):
        loss = super().loss(token_loss, noised)
        return Explode.apply(loss) if self.explode else loss


class Explode(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


class Weights(L.Callback):
    """Keeps the weights and the optimizer's state after every step."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not hasattr(self, "steps"):
            self.steps, self.states = {}, {}
        self.steps[trainer.global_step] = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        self.states[trainer.global_step] = [v.clone() for s in trainer.optimizers[0].state.values() for v in s.values()]


def fit(
    folder, objective, steps=6, batch_size=4, accumulate=1, optimizer=AdamW, guard=None, checkpoint=None, **settings
):
    L.seed_everything(0, verbose=False)
    model = DiffusionLM(
        SMALL, objective, optimizer=optimizer, schedule=Schedule("constant", 0), loss_guard=guard or LossGuard()
    )
    data = PackedDataModule(batch_size=batch_size, context_length=48, packing="best_fit", canvas=4)
    watch = Weights()
    settings.setdefault("gradient_clip_val", 1.0)
    callbacks = [watch, *settings.pop("callbacks", [])]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=CSVLogger(folder, name="run", version=0),
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        **settings,
    )
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    return model, watch, trainer


def records(folder):
    path = folder / "run" / "version_0" / GUARD_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("kind", ["nan", "infinite_gradient"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_a_harmful_update_is_skipped_with_its_momentum_and_decay(kind, batch_size, accumulate, optimizer, tmp_path):
    model, watch, trainer = fit(
        tmp_path, Poisoned(**{kind: [9]}), batch_size=batch_size, accumulate=accumulate, optimizer=optimizer
    )
    assert torch.equal(watch.steps[2], watch.steps[3])
    assert all(torch.equal(a, b) for a, b in zip(watch.states[2], watch.states[3], strict=True))
    assert not torch.equal(watch.steps[3], watch.steps[4])
    assert all(torch.isfinite(weights).all() for weights in watch.steps.values())
    [record] = records(tmp_path)
    assert record["step"] == 3 and record["reason"] == ("loss" if kind == "nan" else "gradient")
    assert [row for row, _, _ in record["rows"]] == [8, 9, 10, 11]
    assert [loss is None for _, loss, _ in record["rows"]] == [False, kind == "nan", False, False]
    assert trainer.callback_metrics["train/skipped_updates"] == 1 and model.guard.skipped == 1


def test_too_many_skipped_updates_end_the_run_with_its_state_saved(tmp_path):
    saved = ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=100)
    with pytest.raises(UserError, match=r"2 updates skipped.*loss_guard\.jsonl.*max_skipped") as error:
        fit(tmp_path, Poisoned(nan=[5, 14]), guard=LossGuard(max_skipped=2), callbacks=[saved])
    assert len(str(error.value).splitlines()) == 1
    assert [record["step"] for record in records(tmp_path)] == [2, 4]
    # it goes on from there once allowed to, and counts on
    model, _, trainer = fit(
        tmp_path, Poisoned(nan=[17]), 6, guard=LossGuard(max_skipped=4), checkpoint=tmp_path / "checkpoints/last.ckpt"
    )
    assert trainer.global_step == 6 and model.guard.skipped == 3


def test_a_run_resumed_between_skipped_updates_and_spikes_is_the_same_bit_for_bit(tmp_path):
    objective = dict(nan=[9, 120], huge=[101, 130])
    whole, watch, _ = fit(tmp_path / "whole", Poisoned(**objective), 34)
    saved = ModelCheckpoint(dirpath=tmp_path / "parts", every_n_train_steps=27, save_top_k=-1, filename="{step}")
    fit(tmp_path / "parts", Poisoned(**objective), 32, callbacks=[saved])  # killed while it records step 31 once more
    with open(tmp_path / "parts" / "run" / "version_0" / GUARD_FILE, "a") as file:
        file.write('{"step": 31, "rea')
    resumed, again, _ = fit(
        tmp_path / "parts", Poisoned(**objective), 34, checkpoint=tmp_path / "parts" / "step=27.ckpt"
    )
    assert torch.equal(watch.steps[34], again.steps[34])
    assert whole.guard.state_dict() == resumed.guard.state_dict()
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    assert [(r["step"], r["reason"]) for r in records(tmp_path / "whole")] == [
        *((3, "loss"), (26, "spike"), (31, "loss"), (33, "spike")),
    ]


def test_a_new_run_in_the_folder_of_another_drops_none_of_its_records(tmp_path):
    for _ in range(2):
        fit(tmp_path, Poisoned(nan=[5]), 3)
    assert [record["step"] for record in records(tmp_path)] == [2, 2]


def test_a_spike_is_recorded_and_trained_on(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(loss_guard, "rank_zero_info", said.append)
    _, watch, _ = fit(tmp_path, Poisoned(huge=[101]), 26)
    assert re.search(r"step 26: loss [\d.]+, the median is [\d.]+; rows in .*loss_guard\.jsonl", "\n".join(said))
    [record] = records(tmp_path)
    assert record["loss"] > 3 * record["median"]
    worst = max(record["rows"], key=lambda row: row[1])
    assert worst[0] == 101
    total = sum(loss * tokens for _, loss, tokens in record["rows"])
    assert record["loss"] == pytest.approx(total / sum(tokens for *_, tokens in record["rows"]), rel=1e-6)
    assert not torch.equal(watch.steps[25], watch.steps[26])


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scaler_overflow_is_its_business_and_a_bad_loss_is_ours(fused, tmp_path):
    model, watch, trainer = fit(
        tmp_path,
        Poisoned(nan=[9], infinite_gradient=[17]),
        optimizer=lambda params: AdamW(params, fused=fused),
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],  # Lightning makes bf16 of the name
        gradient_clip_val=None if fused else 1.0,
    )
    assert torch.equal(watch.steps[2], watch.steps[3]) and torch.equal(watch.steps[4], watch.steps[5])
    assert not torch.equal(watch.steps[5], watch.steps[6])
    assert [record["reason"] for record in records(tmp_path)] == ["loss"]
    assert model.guard.skipped == 1
    assert trainer.callback_metrics["train/gradient_norm"] < 100  # the scale of 65,536 is not in it


def test_with_deepspeed_the_loss_is_divided_before_backward(tmp_path, monkeypatch):
    """Its engine lets nobody at the gradients; what it would average and step on must be the same."""
    sgd = lambda params: torch.optim.SGD(params, lr=0.5)  # noqa: E731
    _, usual, _ = fit(tmp_path / "usual", EosSchedule(), 3, optimizer=sgd, gradient_clip_val=None)
    for module in ("strategies", "step_totals"):
        monkeypatch.setattr(f"dllm_var.training.{module}.owns_gradients", lambda strategy: True)
    _, engine, _ = fit(tmp_path / "engine", EosSchedule(), 3, optimizer=sgd, gradient_clip_val=None)
    torch.testing.assert_close(usual.steps[3], engine.steps[3], atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="accumulate_grad_batches must be 1"):
        fit(tmp_path / "more", EosSchedule(), 3, accumulate=2)


def test_thresholds_that_make_no_sense_are_named():
    for wrong in (dict(max_skipped=0), dict(spike_factor=1.0), dict(spike_window=3)):
        with pytest.raises(UserError, match=r"model\.loss_guard"):
            LossGuard(**wrong)
