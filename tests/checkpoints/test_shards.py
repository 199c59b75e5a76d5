"""Checkpoints in parts: every damaged part is found, and nothing in them runs code."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dllm_var.checkpoints.choose import check, is_sharded, newest_checkpoint
from dllm_var.checkpoints.run_files import UnusableCheckpoint
from dllm_var.checkpoints.shards import SEAL, checksums, read_metadata, read_trainer_state, read_weights, write_seal


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
    write_seal(path, checksums(path, 0, 1))
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
    assert read_trainer_state(folder)["global_step"] == 3
    assert "state_dict.w" in read_metadata(folder).state_dict_metadata
    weights = read_weights(folder)
    assert torch.equal(weights["w"], torch.arange(12.0).view(3, 4)) and weights["half"].dtype == torch.bfloat16
    assert sorted(weights) == ["half", "w"]


def test_each_rank_sums_its_own_files(folder):
    for name in ("__1_0.distcp", "__10_0.distcp"):
        (folder / name).write_bytes(name.encode())
    parts = [set(checksums(folder, rank, 11)) for rank in range(11)]
    assert parts[1] == {"__1_0.distcp"} and parts[10] == {"__10_0.distcp"}
    assert parts[0] == {"__0_0.distcp", ".metadata", "meta.pt"}
    assert not any(parts[rank] for rank in range(2, 10))


def test_any_damaged_part_is_named(folder):
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), max(len(content) // 40, 1)):
            damaged = bytearray(content)
            damaged[place] ^= 4
            path.write_bytes(damaged)
            assert f"damaged: {path.name}" in complaint(folder)
        os.truncate(path, len(content) // 2)
        assert f"damaged: {path.name}" in complaint(folder)
        path.write_bytes(content)
    check(folder)
    (folder / "meta.pt").unlink()
    assert "meta.pt is missing" in complaint(folder)


def test_code_in_any_part_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "executed"
    assert "mkdir" in complaint(write_folder(tmp_path / "a.ckpt", extra=RunsCode(proof)))
    complaint(write_folder(tmp_path / "b.ckpt", trainer_state={"x": RunsCode(proof)}))
    evil = write_folder(tmp_path / "c.ckpt")
    (evil / ".metadata").write_bytes(pickle.dumps(RunsCode(proof)))
    write_seal(evil, checksums(evil, 0, 1))
    assert "mkdir" in complaint(evil)
    (evil / SEAL).unlink()
    complaint(evil)
    assert not proof.exists()


def test_files_outside_are_not_read(folder, tmp_path):
    (tmp_path / "outside").write_bytes(b"x" * 100)
    for name in ("../outside", str(tmp_path / "outside")):
        digests = checksums(folder, 0, 1)
        write_seal(folder, {**digests, name: "0" * 64})
        assert f"names {name}, a file outside of it" in complaint(folder)
        metadata = read_metadata(folder)
        for info in metadata.storage_data.values():
            info.relative_path = name
        kept = (folder / ".metadata").read_bytes()
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        write_seal(folder, checksums(folder, 0, 1))
        assert f"names {name}, a file outside of it" in complaint(folder)
        (folder / ".metadata").write_bytes(kept)


def test_another_format_is_named(folder, monkeypatch):
    monkeypatch.setattr("dllm_var.checkpoints.shards.FORMAT", 4)
    write_seal(folder, checksums(folder, 0, 1))
    monkeypatch.undo()
    assert "format 4" in complaint(folder)
