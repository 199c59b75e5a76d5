"""The average of the weights: what it is, where it is used, and that training goes on as if it were not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dllm_var.__main__ import main
from dllm_var.callbacks import EmaWeights, ExportWeights, RunSummary, SamplingCallback
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def weights(module: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.transformer.parameters()])


class Record(L.Callback):
    """The weights in training after each step, and those in use at every other occasion."""

    def __init__(self) -> None:
        self.trained: dict[int, torch.Tensor] = {}
        self.validated: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.trained[trainer.global_step] = weights(pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.validated[trainer.global_step] = weights(pl_module)


def average(record: Record, until: int, decay: float = 0.5, every: int = 1, warmup: bool = False) -> torch.Tensor:
    """The definition, in double precision."""
    result = None
    for number, step in enumerate(range(every, until + 1, every)):
        share = min(decay, (1 + number) / (10 + number)) if warmup else decay
        now = record.trained[step].double()
        result = now if result is None else share * result + (1 - share) * now
    assert result is not None
    return result.float()


class Spy(SamplingCallback):
    """Notes the weights that are decoded with."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(sampler=None, **settings)  # type: ignore[arg-type]
        self.seen: dict[int, torch.Tensor] = {}

    def generate(self, model: Any, prompts: list, tokenizer: Any) -> list:
        from dllm_var.sampling import Generation

        self.seen[model.trainer.global_step] = weights(model)
        return [Generation([1], "eos", nfe=1, seconds=0.1, prompt_length=1) for _ in prompts]


@pytest.mark.parametrize(("ema_first", "every", "warmup"), [(True, 1, False), (False, 2, True)])
def test_the_average_is_used_for_everything_but_training(
    fit: Any, spy: Any, tmp_path: Path, ema_first: bool, every: int, warmup: bool
) -> None:
    record, sampling = Record(), Spy(every_n_steps=2)
    others = [sampling, RunSummary(spy), ExportWeights(), record]
    ema = EmaWeights(0.5, warmup=warmup, every_n_steps=every)
    at_the_end: dict[str, torch.Tensor] = {}
    spy.disturb = lambda model: at_the_end.update(weights=weights(model))
    logger = CSVLogger(tmp_path, name="run")
    settings = dict(limit_val_batches=1, val_check_interval=3, num_sanity_val_steps=0, logger=logger)
    _, model = fit(*([ema, *others] if ema_first else [*others, ema]), **settings)

    plain = Record()
    fit(Spy(every_n_steps=2), plain, limit_val_batches=1, val_check_interval=3)
    assert all(torch.equal(record.trained[step], plain.trained[step]) for step in range(1, 7))

    wanted = {step: average(record, step, every=every, warmup=warmup) for step in (2, 3, 4, 6)}
    assert not torch.allclose(wanted[6], record.trained[6])
    for step, seen in {**sampling.seen, **record.validated}.items():
        torch.testing.assert_close(seen, wanted[step], msg=lambda m, s=step: f"step {s}: {m}")
    assert sampling.seen.keys() == {2, 4, 6} and record.validated.keys() == {3, 6}
    torch.testing.assert_close(at_the_end["weights"], wanted[6])
    torch.testing.assert_close(weights(model), wanted[6])
    exported, _, _ = load_checkpoint(logger.log_dir)
    torch.testing.assert_close(torch.cat([p.flatten() for p in exported.parameters()]), wanted[6])


def test_an_optimizer_that_cannot_be_copied_is_no_hindrance(fit: Any) -> None:
    """As that of the command line, which holds a parser."""

    class Build(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
            pl_module.kept_beside = (number for number in range(3))

    fit(Build(), EmaWeights(), max_steps=1)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights_and_the_same_average(fit: Any, tmp_path: Path) -> None:
    def run(*callbacks: L.Callback, **settings: Any) -> tuple[Any, Any]:
        record = Record()
        rows = PackedDataModule(batch_size=4, context_length=48, packing="best_fit", canvas=4)
        _, model = fit(record, *callbacks, EmaWeights(0.9), data=rows, **settings)
        return record, model

    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole, model = run(saved, enable_checkpointing=True, num_sanity_val_steps=0)
    checkpoint = tmp_path / "step=3.ckpt"
    again, resumed = run(ckpt_path=str(checkpoint))
    assert torch.equal(whole.trained[6], again.trained[6])
    assert torch.equal(weights(model), weights(resumed))
    transformer, _, _ = load_checkpoint(checkpoint)  # as generate does
    stored = torch.cat([p.flatten() for p in transformer.parameters()])
    torch.testing.assert_close(stored, average(whole, 3, 0.9, warmup=True))
    with pytest.raises(UserError, match=r"configs/ema\.yaml"):
        fit(ckpt_path=str(checkpoint), data=PackedDataModule(batch_size=4, context_length=48))


def test_a_checkpoint_of_the_last_step_has_both_whoever_writes_it(fit: Any, tmp_path: Path) -> None:
    class Late(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    record = Record()
    fit(EmaWeights(0.5, warmup=False), record, Late())
    check_both(tmp_path / "end.ckpt", record, 6)


def test_a_checkpoint_in_the_midst_of_validation_has_both(fit: Any, tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyError("stop")

    record = Record()
    with pytest.raises(KeyError):
        fit(EmaWeights(0.5, warmup=False), record, Stop(), limit_val_batches=2, val_check_interval=3)
    check_both(tmp_path / "stopped.ckpt", record, 3)


def check_both(path: Path, record: Record, step: int) -> None:
    checkpoint = torch.load(path, weights_only=True)
    for key, wanted in (("state_dict", average(record, step)), ("current_model_state", record.trained[step])):
        state = {name: value for name, value in checkpoint[key].items() if name.startswith("transformer.")}
        torch.testing.assert_close(torch.cat([value.flatten() for value in state.values()]), wanted)


def test_the_final_test_and_a_test_of_a_checkpoint_use_the_average(fit: Any, data: Any, tmp_path: Path) -> None:
    seen = []

    class Look(L.Callback):
        def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append(weights(pl_module))

    record = Record()
    trainer, model = fit(EmaWeights(0.5, warmup=False), record, Look())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    data.test_dataloader = data.val_dataloader  # type: ignore[method-assign]
    trainer.test(model, data, verbose=False)
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, filename="six")
    trainer, model = fit(EmaWeights(0.5, warmup=False), Look(), saved, enable_checkpointing=True)
    trainer.test(model, data, ckpt_path=tmp_path / "six.ckpt", verbose=False, weights_only=True)
    assert len(seen) == 2
    for found in seen:
        torch.testing.assert_close(found, average(record, 6))


def test_the_average_of_half_precision_weights_is_kept_in_full(fit: Any) -> None:
    """But for one rounding at each validation, which has the average in the model."""
    record = Record()
    _, model = fit(
        EmaWeights(0.5, warmup=False), record, precision="bf16-true", limit_val_batches=1, val_check_interval=2
    )
    assert record.trained[6].dtype == torch.bfloat16
    torch.testing.assert_close(weights(model).float(), average(record, 6), atol=0, rtol=2**-7)


@pytest.mark.slow
def test_the_overlay_trains_and_what_cannot_be_averaged_is_said_before(
    fit: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    for wrong in (dict(decay=1.0), dict(every_n_steps=0)):
        with pytest.raises(UserError, match="EmaWeights needs"):
            EmaWeights(**wrong)
    monkeypatch.chdir(tmp_path)
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("quickstart", "ema")]
    assert main(["fit", *configs, "--trainer.fast_dev_run=1", "--sampler.max_new_tokens=3"]) == 0
    capsys.readouterr()
    configs.append(f"--config={CONFIGS / 'strategy/fsdp2'}.yaml")
    assert main(["fit", *configs, "--trainer.accelerator=cpu", "--trainer.devices=1"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "EmaWeights needs the whole weights" in line and "ddp.yaml" in line
