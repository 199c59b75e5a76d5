"""SpeedMonitor: the figures add up against a clock under the test's control."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from dllm_var import DiffusionLM
from dllm_var.callbacks import SamplingCallback, SpeedMonitor
from dllm_var.callbacks.speed import sum_over_processes
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.objectives import Autoregressive, BlockDiffusion, EosSchedule, KeyedNoise
from dllm_var.text.tokenizer import SpecialTokens

ROW_TOKENS = 2 * 16  # the toy data's batch: two rows of sixteen tokens, half of them supervised


class Clock(L.Callback):
    """Stops real time; every batch takes one second of work and a quarter of waiting, and other things long pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 0.25

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.now += 0.5

    def on_before_zero_grad(self, *_: Any) -> None:
        self.now += 0.5

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 1000.0

    def on_save_checkpoint(self, *_: Any) -> None:
        self.now += 500.0


class Keep(L.Callback):
    """Keeps what was logged after each batch."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("speed/")}
        if metrics and (not self.logged or metrics != self.logged[-1]):
            self.logged.append(metrics)


def test_counts_work_and_waiting_but_neither_validation_nor_checkpoints_nor_the_first_batch(
    fit: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    settings = {"val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 4}
    monitor = SpeedMonitor(peak_flops=1e6)
    trainer, model = fit(Clock(monkeypatch), monitor, saving, enable_checkpointing=True, max_steps=8, **settings)
    speed = {k.removeprefix("speed/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("speed/")}
    # Steps 5 to 8: four seconds of work. Waiting before 6 and 8 counts; before 5 and 7 there were pauses.
    seconds = 4 * 1.0 + 2 * 0.25
    assert speed["step_seconds"] == pytest.approx(seconds / 4)
    assert speed["data_wait_share"] == pytest.approx(0.5 / seconds)
    assert speed["tokens_per_second"] == pytest.approx(4 * ROW_TOKENS / seconds)
    assert speed["supervised_tokens_per_second"] == pytest.approx(4 * ROW_TOKENS / 2 / seconds)
    assert speed["samples_per_second"] == pytest.approx(4 * 2 / seconds)
    assert speed["mfu"] == pytest.approx(speed["flops_per_second"] / 1e6)
    low, high = (4 * ROW_TOKENS * model.transformer.flops_per_token(16, share) / seconds for share in (0.0, 0.5))
    assert low < speed["flops_per_second"] <= high * (1 + 1e-6)
    assert speed["first_batch_seconds"] == pytest.approx(1.25)
    assert speed["peak_memory_gib"] > 0.05


@pytest.mark.parametrize("monitor_first", [True, False])
def test_sampling_pauses_do_not_count(fit: Any, spy: Any, monkeypatch: Any, monitor_first: bool) -> None:
    clock = Clock(monkeypatch)

    def sleep(model: Any) -> None:
        clock.now += 777.0

    spy.disturb = sleep
    callbacks = [SpeedMonitor(peak_flops=None), SamplingCallback(spy, every_n_steps=1, num_examples=1)]
    trainer, _ = fit(clock, *(callbacks if monitor_first else callbacks[::-1]), max_steps=6)
    assert float(trainer.callback_metrics["speed/step_seconds"]) == pytest.approx(1.25)
    assert "speed/mfu" not in trainer.callback_metrics


def test_accumulated_batches_belong_to_one_step(fit: Any, monkeypatch: Any) -> None:
    keep = Keep()
    fit(Clock(monkeypatch), SpeedMonitor(peak_flops=None), keep, accumulate_grad_batches=2, max_steps=4)
    assert len(keep.logged) == 2  # at steps 2 and 4, not once per batch
    seconds = 4 * 0.25 + 2 * 1.0  # four batches to wait for, two optimizer steps
    assert keep.logged[1]["speed/tokens_per_second"] == pytest.approx(4 * ROW_TOKENS / seconds)
    assert keep.logged[1]["speed/step_seconds"] == pytest.approx(seconds / 2)


def test_reaches_the_logger_and_the_progress_bar(fit: Any, tmp_path: Any) -> None:
    trainer, _ = fit(SpeedMonitor(), logger=CSVLogger(tmp_path, name="csv"))
    assert trainer.progress_bar_metrics["tokens/s"] > 0
    assert "tokens/s" not in trainer.logged_metrics
    header = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"speed/tokens_per_second", "speed/mfu", "speed/data_wait_share"} <= set(header)
    assert 0 < trainer.logged_metrics["speed/mfu"] < 1


def test_counts_are_summed_over_processes_and_tensor_parallel_twins_count_once() -> None:
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda tensor, reduce_op: tensor * 4)  # four equal processes
    trainer: Any = SimpleNamespace(world_size=4, strategy=strategy, distributed_sampler_kwargs={"num_replicas": 4})
    assert sum_over_processes(trainer, [3.0, 5.0]) == [12.0, 20.0]
    trainer.distributed_sampler_kwargs = {"num_replicas": 2}  # pairs share their rows
    assert sum_over_processes(trainer, [3.0, 5.0]) == [6.0, 10.0]
    trainer.world_size = 1
    assert sum_over_processes(trainer, [3.0, 5.0]) == [3.0, 5.0]


@pytest.mark.parametrize("peak", [0, -1.0])
def test_a_peak_must_be_positive(peak: float) -> None:
    with pytest.raises(UserError, match="peak_flops"):
        SpeedMonitor(peak_flops=peak)


@pytest.mark.parametrize("kind", ["full", "document", "causal", "blocks"])
def test_flops_are_those_of_what_attends(kind: str) -> None:
    """Against torch's counter over each document by itself; of block diffusion, by hand from its mask's pairs."""
    objective = {"causal": Autoregressive(), "blocks": BlockDiffusion(4)}.get(kind, EosSchedule())
    objective.bind(SpecialTokens(0, (1,), 2))
    model = DiffusionLM(objective=objective, attention="full" if kind == "full" else "document")
    causal = kind == "causal"
    shape = TransformerConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=20, causal=causal)
    model.transformer = Transformer(shape)
    lengths = [24] if kind == "full" else [5, 12, 7]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    batch = {"input_ids": torch.full((1, 24), 5), "position_ids": position, "segment_ids": segment}
    batch |= {"supervised": position >= 2, "row": torch.arange(1)}
    noised = objective.corrupt(batch, KeyedNoise(0))
    read, scored = noised.input_ids.numel(), int(noised.loss_mask.sum())
    pairs = int(noised.counts(batch, model.attention)["attended_pairs"])
    flops = model.transformer.flops_per_token
    ours = read * flops(pairs / read, scored / read)  # as SpeedMonitor has it

    matrices = read * flops(0, scored / read)
    dense = 0
    for n in [24] if kind == "full" else lengths:
        with FlopCounterMode(display=False) as counter:
            q = torch.randn(1, 2, n, 16, requires_grad=True)
            ((q @ q.transpose(-1, -2)).softmax(-1) @ q).sum().backward()
        dense += 2 * counter.get_total_flops()  # two layers
    if kind == "blocks":
        dense = 2 * 12 * int(noised.attention_rule.mask.sum()) * 32
        assert read > 24 < pairs
    assert ours == pytest.approx(matrices + dense / (2 if causal else 1))
