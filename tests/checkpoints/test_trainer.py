"""The Trainer's checkpoints under every plugin and every way in which strategies write: whole, and in their order."""

import errno
import threading
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from dllm_var.checkpoints.archive import CannotSave, check
from dllm_var.checkpoints.checkpoint_io import BackgroundFiles, CheckedFiles, snapshot
from dllm_var.checkpoints.run_checkpoint import newest_first, step_of
from dllm_var.training.trainer import Trainer


class Fsdp1(FSDPStrategy):
    """Saves as Lightning's FSDP1 does, without its sharding, which needs a GPU."""

    def _setup_model(self, model):
        return model

    def lightning_module_state_dict(self):
        return self.model.state_dict()

    def optimizer_state(self, optimizer):
        return optimizer.state_dict()


class Weights(L.Callback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen[trainer.global_step] = pl_module.layer.weight.detach().clone()


def fit(folder, plugin, strategy="auto", kind=Trainer, steps=4):
    weights = Weights()
    kept = ModelCheckpoint(folder, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=1)
    trainer = kind(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        plugins=[plugin] if plugin else [],
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[weights, kept],
    )
    trainer.fit(BoringModel())
    return weights.seen


def names(folder):
    return sorted(path.name for path in folder.iterdir())


PLUGINS = {
    "plain": CheckedFiles,
    "background": BackgroundFiles,
    "of one's own": TorchCheckpointIO,
}


@pytest.mark.parametrize("name", PLUGINS)
def test_files_hold_the_state_of_their_step(name, tmp_path, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: (time.sleep(0.05), save(*arguments)))  # some steps
    seen = fit(tmp_path, PLUGINS[name]())
    assert names(tmp_path) == ["step=3.ckpt", "step=4.ckpt"]
    for step in (3, 4):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == step
        assert torch.equal(checkpoint["state_dict"]["layer.weight"], seen[step])
    assert not torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_fsdp1_writes_files_and_folders(kind, tmp_path):
    fit(tmp_path, CheckedFiles(), Fsdp1(state_dict_type=kind))
    assert names(tmp_path) == ["step=3.ckpt", "step=4.ckpt"]
    for path in tmp_path.iterdir():
        check(path)
        assert path.is_dir() == (kind == "sharded")
    assert [step_of(path) for path in newest_first(tmp_path)] == [4, 3]


@pytest.mark.parametrize("strategy", ["auto", Fsdp1(state_dict_type="sharded")], ids=["file", "folder"])
def test_what_a_killed_run_left_is_no_part_of_a_checkpoint(strategy, tmp_path):
    leftover = tmp_path / "step=1.ckpt.saving"
    leftover.mkdir()
    (leftover / "__1_0.distcp").touch()
    fit(tmp_path, CheckedFiles(), strategy, steps=1)
    check(tmp_path / "step=1.ckpt")
    assert names(tmp_path) == ["step=1.ckpt"] and not list(tmp_path.rglob("__1_0*"))


class Later(TorchCheckpointIO):
    """Has written nothing when it returns, as AsyncCheckpointIO, whose threads are at times fast enough."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        pass


def test_a_plugin_that_writes_later_and_elsewhere_is_refused(tmp_path):
    with pytest.raises(CannotSave, match=r"trainer\.plugins: Later.*BackgroundFiles"):
        fit(tmp_path, Later())


@pytest.mark.parametrize(
    ("plugin", "number"),
    [(CheckedFiles, errno.ENOSPC), (CheckedFiles, errno.EACCES), (BackgroundFiles, errno.ENOSPC)],
)
def test_what_could_not_be_written_is_named(number, plugin, tmp_path, monkeypatch):
    save = torch.save

    def fails(checkpoint, file):
        if checkpoint["global_step"] == 3:
            raise OSError(number, "the reason")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(CannotSave) as caught:
        fit(tmp_path, plugin(), steps=8)  # enough saves for one to wait for that of step 3
    text = str(caught.value)
    assert f"{tmp_path / 'step=3.ckpt'}" in text and "the reason" in text and "step=2.ckpt is whole" in text
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]  # nothing old is removed in vain


def test_an_unwritable_part_of_a_folder_is_named(tmp_path):
    class Failing(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint, filepath, storage_options=None):
            filepath.mkdir()
            (filepath / "nowhere" / "part").touch()

    with pytest.raises(CannotSave, match=r"step=1\.ckpt.*part: No such file.*no earlier one"):
        fit(tmp_path, CheckedFiles(), Failing(torch.device("cpu")))
    assert names(tmp_path) == []


def test_lightning_s_own_trainer_writes_in_the_background_as_well(tmp_path):
    fit(tmp_path, BackgroundFiles(), kind=L.Trainer)
    assert [step_of(path) for path in newest_first(tmp_path)] == [4, 3]


def test_an_old_checkpoint_goes_when_the_new_one_is_whole(tmp_path, monkeypatch):
    plugin, save, gate = BackgroundFiles(), torch.save, threading.Event()

    def waits(checkpoint, file):
        gate.wait(10)
        save(checkpoint, file)

    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    CheckedFiles().save_checkpoint({"global_step": 1}, old)
    monkeypatch.setattr(torch, "save", waits)
    plugin.save_checkpoint({"global_step": 2}, new)
    plugin.remove_checkpoint(old)
    assert old.exists() and not new.exists()
    gate.set()
    plugin.teardown()
    assert names(tmp_path) == ["new.ckpt"]


def test_a_snapshot_is_of_its_moment_and_keeps_what_is_shared():
    tensor, plain = torch.ones(3), [1]
    state = {"a": tensor, "b": tensor.view(3), "deep": [{"c": (tensor[:2], 4)}], "plain": plain}
    kept = snapshot(state)
    tensor.zero_()
    plain.append(2)
    assert kept["plain"] == [1] and torch.equal(kept["a"], torch.ones(3))
    assert kept["a"].data_ptr() == kept["b"].data_ptr() and torch.equal(kept["deep"][0]["c"][0], torch.ones(2))
