"""Updates from losses that are not finite are skipped and reported, and too many of them end the run."""

import logging
import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from dllm_var import DiffusionLM
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model import TransformerConfig
from dllm_var.objectives import EosSchedule
from dllm_var.training.interrupt import StopOnSignal
from dllm_var.training.optim import AdamW, Muon, Schedule
from dllm_var.training.step import LossGuard
from dllm_var.training.trainer import Trainer

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

    def score(self, head, hidden, noised):
        scores = super().score(head, hidden, noised)
        return scores._replace(loss_sum=Explode.apply(scores.loss_sum)) if self.explode else scores


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
    trainer = Trainer(
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


@pytest.fixture
def said():
    """The lines that were printed about steps."""
    lines = []
    handler = logging.Handler()
    handler.addFilter(lambda record: record.getMessage().startswith("step "))
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def steps(lines):
    """The number and the reason of each step that was reported."""
    found = [re.match(r"step (\d+): (?:the )?(loss|gradient) (?:is (not finite))?", line) for line in lines]
    return [(int(match[1]), match[2] if match[3] else "spike") for match in found]


@pytest.mark.parametrize(
    ("kind", "batch_size", "accumulate", "optimizer"),
    [("nan", 4, 1, AdamW), ("nan", 2, 2, Muon), ("infinite_gradient", 4, 1, Muon), ("infinite_gradient", 2, 2, AdamW)],
)
def test_a_harmful_update_is_skipped_with_momentum_and_decay(kind, batch_size, accumulate, optimizer, tmp_path, said):
    model, watch, trainer = fit(
        tmp_path, Poisoned(**{kind: [9]}), batch_size=batch_size, accumulate=accumulate, optimizer=optimizer
    )
    assert torch.equal(watch.steps[2], watch.steps[3])
    assert all(torch.equal(a, b) for a, b in zip(watch.states[2], watch.states[3], strict=True))
    assert not torch.equal(watch.steps[3], watch.steps[4])
    assert all(torch.isfinite(weights).all() for weights in watch.steps.values())
    assert steps(said) == [(3, "loss" if kind == "nan" else "gradient")]
    assert ("row 9 nan, " in said[-1]) == (kind == "nan")
    assert trainer.callback_metrics["train/skipped_updates"] == 1 and model.step.skipped == 1


def test_too_many_skipped_updates_end_the_run_with_its_state_saved(tmp_path, said):
    callbacks = [ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=100), StopOnSignal()]
    with pytest.raises(UserError, match=r"2 updates skipped.*max_skipped") as error:
        fit(tmp_path, Poisoned(nan=[5, 14]), guard=LossGuard(max_skipped=2), callbacks=callbacks)
    assert len(str(error.value).splitlines()) == 1
    assert steps(said) == [(2, "loss"), (4, "loss")]
    # it goes on from there once allowed to, and counts on
    model, _, trainer = fit(
        tmp_path, Poisoned(nan=[17]), 6, guard=LossGuard(max_skipped=4), checkpoint=tmp_path / "checkpoints/last.ckpt"
    )
    assert trainer.global_step == 6 and model.step.skipped == 3


def test_a_run_resumed_between_skipped_updates_and_spikes_is_the_same_bit_for_bit(tmp_path, said):
    objective = dict(nan=[9, 120], huge=[101, 130])
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=27, save_top_k=-1, filename="{step}")
    whole, watch, _ = fit(tmp_path / "whole", Poisoned(**objective), 34, callbacks=[saved])
    assert steps(said) == [(3, "loss"), (26, "spike"), (31, "loss"), (33, "spike")]
    first = list(said)
    resumed, again, _ = fit(tmp_path / "rest", Poisoned(**objective), 34, checkpoint=tmp_path / "step=27.ckpt")
    assert torch.equal(watch.steps[34], again.steps[34])
    assert whole.step.state_dict() == resumed.step.state_dict()
    assert said[len(first) :] == first[2:]


def test_a_spike_is_reported_and_trained_on(tmp_path, said):
    model, watch, _ = fit(tmp_path, Poisoned(huge=[101]), 26)
    assert re.search(r"step 26: loss [\d.]+, the median is [\d.]+; highest losses per token: row 101 ", "\n".join(said))
    rows, loss = model.step.last.rows(), model.step.last.loss
    assert sorted(row for row, *_ in rows) == [100, 101, 102, 103]
    total = sum(loss * tokens for _, loss, tokens in rows)
    assert loss == pytest.approx(total / sum(tokens for *_, tokens in rows), rel=1e-6)
    assert not torch.equal(watch.steps[25], watch.steps[26])


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scaler_overflow_is_its_business_and_a_bad_loss_is_ours(fused, tmp_path, said):
    model, watch, trainer = fit(
        tmp_path,
        Poisoned(nan=[9], infinite_gradient=[17]),
        optimizer=lambda params: AdamW(params, fused=fused),
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],  # Lightning makes bf16 of the name
    )
    assert torch.equal(watch.steps[2], watch.steps[3]) and torch.equal(watch.steps[4], watch.steps[5])
    assert not torch.equal(watch.steps[5], watch.steps[6])
    assert steps(said) == [(3, "loss")]
    assert model.step.skipped == 1
    assert trainer.callback_metrics["train/gradient_norm"] < 100  # the scale of 65,536 is not in it


class Engine(SingleDeviceStrategy):
    """Looks as DeepSpeed's strategy does, whose engine lets nobody at the gradients; but steps on them as they are."""

    zero_stage_3 = False


def test_with_deepspeed_the_loss_is_divided_before_backward(tmp_path):
    sgd = lambda params: torch.optim.SGD(params, lr=0.5)  # noqa: E731
    plain = dict(optimizer=sgd, gradient_clip_val=None)
    _, usual, _ = fit(tmp_path / "usual", EosSchedule(), 3, **plain)
    _, engine, _ = fit(tmp_path / "engine", EosSchedule(), 3, strategy=Engine("cpu"), **plain)
    torch.testing.assert_close(usual.steps[3], engine.steps[3], atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="accumulate_grad_batches must be 1"):
        fit(tmp_path / "more", EosSchedule(), 3, accumulate=2, strategy=Engine("cpu"))


def test_thresholds_that_make_no_sense_are_named():
    for wrong in (dict(max_skipped=0), dict(spike_factor=1.0), dict(spike_window=3)):
        with pytest.raises(UserError, match=r"model\.loss_guard"):
            LossGuard(**wrong)
