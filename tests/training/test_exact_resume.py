"""Checkpoints saved while gradients are accumulated, and figures that are watched, in runs that go on bit for bit."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_run import LAST, added, event, notes, same, state, tiny  # noqa: F401 - tiny is a fixture

from dllm_var.__main__ import main

HERE = __name__
SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"


class SaveEachBatch(Callback):
    """Saves after every batch and during every validation, as users' code may."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(f"each/{trainer.fit_loop.total_batch_idx + 1:02}-train.ckpt")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 1:
            trainer.save_checkpoint(f"each/{trainer.fit_loop.total_batch_idx + 1:02}-validation.ckpt")


@pytest.fixture
def accumulating(tiny):  # noqa: F811
    """Steps of three batches in epochs of ten, whose last step is a shorter one; validation mostly within a step."""
    return [*tiny, "--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=5", "--data.batch_size=1"]


@pytest.mark.parametrize(
    "batches", [("05-validation", "11-train"), pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_checkpoint_of_any_batch_and_any_saver_is_one_to_go_on_from(batches, accumulating):
    """Every batch is trained once, with the random numbers and to the weights of a run that was left alone."""
    assert main(accumulating) == 0
    whole, expected = notes(), state()
    assert main([*accumulating, *added((f"{HERE}.SaveEachBatch", {}))]) == 0
    assert notes() == whole
    saved = sorted(Path("each").iterdir())
    assert len(saved) == 18 + 3
    for number, path in enumerate(saved, 2):
        if batches is None or path.stem in batches:
            assert main([*accumulating, f"--resume={path}", f"--trainer.logger.version={number}"]) == 0
            again = notes()
            assert again == whole[len(whole) - len(again) :], path
            saved_at = torch.load(path, weights_only=True)["global_step"]
            assert next(note for note in again if note[0] == "rows")[1] == saved_at
            kept = Path(f"runs/tiny/version_{number}/checkpoints")
            assert same(state(kept / "last.ckpt"), expected), path
            assert not list(kept.glob("*-v1.ckpt")), path  # a loaded step counts as saved


@pytest.mark.slow
def test_a_signal_among_accumulated_batches(accumulating, capsys):
    """Validation after the second batch of a step is cut short: the step is made anew. Nothing is saved at step 0."""
    assert main(accumulating) == 0
    whole, expected = notes(), state()
    assert main([*accumulating, *event("SIGTERM", 1, "validation")]) == 143
    last = Path("runs/tiny/version_1/checkpoints/last.ckpt")
    assert state(last)["global_step"] == 1 and state(last)["data"]["next_row"] == 3
    started = notes()
    assert main([*accumulating, "--resume"]) == 0
    assert started[:6] + notes() == whole
    assert same(state(last), expected)
    early = [*accumulating, *event("SIGTERM", 0, "validation"), "--trainer.val_check_interval=2"]
    assert main(early) == 143
    assert "before the first step" in capsys.readouterr().err
    assert not list(Path("runs/tiny/version_2").rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "interval"), [pytest.param(1, 3, marks=pytest.mark.slow), (3, 4)])
def test_a_figure_that_is_watched_is_there_after_a_resume(accumulate, interval, tiny):  # noqa: F811
    """Validation comes first after the resume, before the monitored loss of the step is logged again."""
    watching = (SAVER, {"monitor": "train/loss", "save_top_k": 2, "filename": "best-{step}"})
    often = (SAVER, {"monitor": "train/loss", "save_top_k": 2, "filename": "often-{step}", "every_n_train_steps": 3})
    tiny += [f"--trainer.accumulate_grad_batches={accumulate}", f"--trainer.val_check_interval={interval}"]
    config = [*tiny, *added(watching, often)]
    assert main(config) == 0
    kept = sorted(path.name for path in LAST.parent.iterdir())
    assert sum(name.startswith("best") for name in kept) == sum(name.startswith("often") for name in kept) == 2
    with pytest.raises(KeyError):
        main([*config, *event("error", 3, "validation"), "--trainer.logger.version=1"])
    assert main([*config, "--resume", "--trainer.logger.version=1"]) == 0
    again = Path("runs/tiny/version_1/checkpoints")
    assert sorted(path.name for path in again.iterdir()) == kept
    assert same(state(again / "last.ckpt"), state())
