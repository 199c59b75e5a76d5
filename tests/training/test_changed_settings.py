"""Settings that changed since the checkpoint: some may, others are refused by name unless the user insists."""

import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_run import LAST, error_line, state, write_run

from dllm_var.__main__ import main
from dllm_var.checkpoints.archive import read_state, write_archive
from dllm_var.errors import UserError
from dllm_var.training.resume import check_changes


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("two_steps"))
        assert main([*write_run(), "--trainer.max_steps=2"]) == 0
        return Path.cwd()


@pytest.fixture
def begun(two_steps, tmp_path, monkeypatch):
    """A copy of that run, and the command that goes on with it to the third step."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return ["fit", "--config", "tiny.yaml", "--resume", "--trainer.max_steps=3"]


def test_what_makes_it_another_run_is_refused_with_all_of_its_names(begun, capsys):
    changed = ["--model.objective=dllm_var.objectives.Mdlm", "--model.seed=5", "--model.attention=full"]
    changed += ["--trainer.gradient_clip_val=2", "--data.packing=best_fit", "--data.batch_size=3"]
    changed += ["--model.schedule.kind=linear"]
    assert main([*begun, *changed]) == 2
    line = error_line(capsys)
    for said in (
        "rows of a step, over all devices: 2 -> 3",
        "model.seed: 0 -> 5",
        "model.attention: document -> full",
        "trainer.gradient_clip_val: null -> 2",
        "data.packing: concat -> best_fit",
        "model.schedule.kind: cosine -> linear",
        "model.objective: null -> dllm_var.objectives.Mdlm",
        "--data.check_resume=false",
    ):
        assert said in line, said
    assert state()["global_step"] == 2


def test_what_may_change_is_said(begun, caplog):
    may = ["--data.num_workers=1", "--trainer.limit_val_batches=1", "--trainer.accumulate_grad_batches=2"]
    assert main([*begun, *may, "--data.batch_size=1"]) == 0  # the same rows in a step
    said = caplog.text
    assert "trainer.max_steps: 2 -> 3" in said and "data.num_workers: 0 -> 1" in said
    assert "batch_size" not in said and "accumulate" not in said
    assert state()["global_step"] == 3


def test_who_insists_goes_on_but_not_with_another_optimizer(begun, capsys, caplog):
    insist = [*begun, "--data.check_resume=false"]
    assert main([*insist, "--model.optimizer=dllm_var.training.optim.Muon"]) == 2
    assert "another optimizer" in error_line(capsys)
    assert main([*insist, "--model.seed=5", "--data.batch_size=3"]) == 0
    assert "model.seed: 0 -> 5" in caplog.text
    assert state()["global_step"] == 3


def test_a_checkpoint_without_settings_is_taken_as_it_is(begun, caplog):
    checkpoint = torch.load(LAST, weights_only=True)
    del checkpoint["config"], checkpoint["rows_per_step"]
    for path in LAST.parent.iterdir():
        write_archive(checkpoint, path)
    assert main([*begun, "--model.seed=5"]) == 0
    assert "cannot be compared" in caplog.text


def test_data_that_only_our_data_module_compares_is_refused_for_another(begun):
    text = read_state(LAST)["config"]
    changed = text.replace("words.jsonl", "others.jsonl")
    assert changed != text
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    with pytest.raises(UserError, match=r"data\.source\.path: .*others\.jsonl"):
        check_changes(LAST, changed, trainer, L.LightningDataModule())
