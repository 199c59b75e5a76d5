"""Checkpoints on the disk, files and folders of shards: all damage to what they hold is found, and no code runs."""

import os
import pickle
import resource
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.checkpoints.archive import (
    UnusableCheckpoint,
    check,
    check_archive,
    is_shard_folder,
    load_archive,
    read_state,
    read_weights,
    write_archive,
    write_index_checksum,
)
from dllm_var.checkpoints.run_checkpoint import newest_checkpoint, step_of

WEIGHTS = {"w": torch.arange(60.0), "half": torch.ones(2, dtype=torch.bfloat16)}


def state(step=1):
    return {"global_step": step, "state_dict": WEIGHTS, "plain": [1, "two", None]}


class RunsCode:
    """Unpickled without restriction, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    write_archive(state(), path)
    return path


def write_folder(path, trainer_state=None, **more):
    optimizer = {"lr": 0.1, "betas": (0.9, 0.95), "step": torch.tensor(3)}
    dcp.save({"state_dict": WEIGHTS, "optimizer_0": optimizer, **more}, checkpoint_id=path, no_dist=True)
    torch.save(trainer_state or {"global_step": 3}, path / "meta.pt")
    write_index_checksum(path)
    return path


def complaint(path):
    with pytest.raises(UnusableCheckpoint) as caught:
        check(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def complaint_of(content, path):
    path.write_bytes(content)
    return complaint(path)


def is_found_or_harmless(path):
    """Whether damage is told, or changes nothing that is read; a file is read anew, however fast it was changed."""
    try:
        if path.is_dir():
            check(path)
            weights = read_weights(path)
        else:
            with open(path, "rb") as file:
                check_archive(file, path)
            content = load_archive(path, path)
            weights = content.pop("state_dict")
            assert content == {name: value for name, value in state().items() if name != "state_dict"}
    except UnusableCheckpoint as error:
        return str(path) in str(error) and "\n" not in str(error)
    return all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_an_archive_that_torch_and_zip_tools_read(checkpoint):
    check(checkpoint)
    assert torch.load(checkpoint, weights_only=True, mmap=True)["plain"] == [1, "two", None]
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_flipped_bits_and_truncations_are_found(checkpoint):
    content = checkpoint.read_bytes()
    for place in range(0, len(content), 17):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        checkpoint.write_bytes(damaged)
        assert is_found_or_harmless(checkpoint), place
    for length in range(len(content) - 1, -1, -97):
        checkpoint.write_bytes(content[:length])
        assert is_found_or_harmless(checkpoint), length
    assert "cut short" in complaint_of(content[: len(content) // 2], checkpoint)
    weights = WEIGHTS["w"].numpy().tobytes()
    assert "does not match its checksum" in complaint_of(content.replace(weights, bytes(len(weights))), checkpoint)


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 10**6), new=st.binary(min_size=1, max_size=40), insert=st.booleans())
def test_overwritten_and_inserted_bytes_are_found(place, new, insert, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "last.ckpt"
    write_archive(state(), path)
    content = path.read_bytes()
    place %= len(content) + 1
    path.write_bytes(content[:place] + new + content[place + (0 if insert else len(new)) :])
    assert is_found_or_harmless(path)


def test_a_file_of_another_program_is_checked_by_the_checksums_of_its_tensors(tmp_path):
    path = tmp_path / "theirs.ckpt"
    torch.save(state(), path)
    check(path)
    content, weights = path.read_bytes(), WEIGHTS["w"].numpy().tobytes()
    assert "does not match its checksum" in complaint_of(content.replace(weights, bytes(len(weights))), path)
    assert "cut short" in complaint_of(content[:-30], path)


def test_foreign_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "x.ckpt"
    for content in (b"", b"# notes\n", b"\x80\x04K\x01.", b"\xff" * 100):
        assert "is not a checkpoint" in complaint_of(content, path)
    assert "No such file" in complaint(tmp_path / "nowhere.ckpt")


def test_pickled_code_is_refused_and_not_run(tmp_path):
    proof, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    evil = {**state(), "extra": RunsCode(proof)}
    complaint_of(pickle.dumps(evil), path)
    write_archive(evil, path)
    assert "mkdir" in complaint(path) and step_of(path) is None and not proof.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert proof.exists()


def test_a_disk_that_takes_no_more_leaves_the_previous_one_and_nothing_else(checkpoint):
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, most))
    try:
        with pytest.raises(OSError, match=r"File too large.*last\.ckpt"):
            write_archive(state(2), checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert read_state(checkpoint)["global_step"] == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_a_link_is_replaced_and_not_followed(checkpoint):
    other = checkpoint.with_name("step=1.ckpt")
    checkpoint.rename(other)
    checkpoint.symlink_to(other.name)
    write_archive(state(3), checkpoint)
    assert read_state(checkpoint)["global_step"] == 3 and read_state(other)["global_step"] == 1


# -- folders of shards -------------------------------------------------------------------------------------------------


def test_any_damaged_part_of_a_folder_is_named(tmp_path):
    folder = write_folder(tmp_path / "last.ckpt")
    check(folder)
    assert is_shard_folder(folder) and newest_checkpoint(tmp_path) == folder and read_state(folder)["global_step"] == 3
    assert read_weights(folder).keys() == WEIGHTS.keys() and is_found_or_harmless(folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), max(len(content) // 10, 1)):
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


def test_code_in_any_part_of_a_folder_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "executed"
    assert "mkdir" in complaint(write_folder(tmp_path / "a.ckpt", extra=RunsCode(proof)))
    assert "mkdir" in complaint(write_folder(tmp_path / "b.ckpt", trainer_state={"x": RunsCode(proof)}))
    evil = write_folder(tmp_path / "c.ckpt")
    (evil / ".metadata").write_bytes(pickle.dumps(RunsCode(proof)))
    write_index_checksum(evil)
    assert "mkdir" in complaint(evil) and not proof.exists()


def test_files_outside_of_a_folder_are_not_read(tmp_path):
    folder = write_folder(tmp_path / "last.ckpt")
    (tmp_path / "outside").write_bytes((folder / "__0_0.distcp").read_bytes())
    for name in ("../outside", str(tmp_path / "outside")):
        index = pickle.loads((folder / ".metadata").read_bytes())
        for info in index.storage_data.values():
            info.relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        write_index_checksum(folder)
        assert f"{name} is missing" in complaint(folder)


def test_an_end_that_is_cut_off_or_changed_is_refused(checkpoint):
    content = checkpoint.read_bytes()
    for place in range(1, 90):
        changed = bytearray(content)
        changed[-place] ^= 1
        for damaged in (content[:-place], changed):
            checkpoint.write_bytes(damaged)
            with pytest.raises(UnusableCheckpoint):
                check(checkpoint)
