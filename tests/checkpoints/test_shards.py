"""Checkpoints in parts: every damaged part is found, and nothing in them runs code."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dllm_var.checkpoints.archive import (
    UnusableCheckpoint,
    check,
    is_sharded,
    read_state,
    read_weights,
    write_index_checksum,
)
from dllm_var.checkpoints.run_checkpoint import newest_checkpoint


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_folder(path, extra=None, trainer_state=None):
    weights = {"w": torch.arange(12.0).view(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)}
    state = {"state_dict": weights, "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.95), "step": torch.tensor(3)}}
    if extra is not None:
        state["extra"] = extra
    dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save(trainer_state or {"global_step": 3}, path / "meta.pt")
    write_index_checksum(path)
    return path


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "last.ckpt")


def complaint(folder):
    with pytest.raises(UnusableCheckpoint) as caught:
        check(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_folder_passes(folder):
    check(folder)
    assert is_sharded(folder) and newest_checkpoint(folder.parent) == folder
    assert read_state(folder)["global_step"] == 3
    assert "state_dict.w" in pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
    weights = read_weights(folder)
    assert torch.equal(weights["w"], torch.arange(12.0).view(3, 4)) and weights["half"].dtype == torch.bfloat16
    assert sorted(weights) == ["half", "w"]


def test_any_damaged_part_is_named(folder):
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), max(len(content) // 60, 1)):
            damaged = bytearray(content)
            damaged[place] ^= 4
            path.write_bytes(damaged)
            assert is_found_or_harmless(folder), (path, place)
        path.write_bytes(content[: len(content) // 2])
        assert path.name in complaint(folder) or path.name.endswith(".sha256")
        path.write_bytes(content)
    check(folder)
    for name in ("meta.pt", "__0_0.distcp", ".metadata"):
        (folder / name).rename(folder / "kept")
        assert f"{name} is missing" in complaint(folder)
        (folder / "kept").rename(folder / name)


def is_found_or_harmless(folder):
    try:
        check(folder)
    except UnusableCheckpoint as error:
        return str(folder) in str(error) and "\n" not in str(error)
    weights = read_weights(folder)
    return torch.equal(weights["w"], torch.arange(12.0).view(3, 4)) and torch.equal(
        weights["half"], torch.ones(2, dtype=torch.bfloat16)
    )


def test_code_in_any_part_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "executed"
    assert "mkdir" in complaint(write_folder(tmp_path / "a.ckpt", extra=RunsCode(proof)))
    complaint(write_folder(tmp_path / "b.ckpt", trainer_state={"x": RunsCode(proof)}))
    evil = write_folder(tmp_path / "c.ckpt")
    (evil / ".metadata").write_bytes(pickle.dumps(RunsCode(proof)))
    write_index_checksum(evil)
    assert "mkdir" in complaint(evil)
    assert not proof.exists()


def test_files_outside_are_not_read(folder, tmp_path):
    (tmp_path / "outside").write_bytes((folder / "__0_0.distcp").read_bytes())
    for name in ("../outside", str(tmp_path / "outside")):
        index = pickle.loads((folder / ".metadata").read_bytes())
        for info in index.storage_data.values():
            info.relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        write_index_checksum(folder)
        assert f"names {name}, a file outside of it" in complaint(folder)
