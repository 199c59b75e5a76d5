"""Checkpoint files: whole or not there, every damage found, no code run."""

import errno
import io
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.checkpoints import run_files as files
from dllm_var.checkpoints.choose import check_or_offer, newest_checkpoint, newest_first, newest_usable, step_of
from dllm_var.checkpoints.run_files import (
    UnusableCheckpoint,
    check_file,
    clear_leftovers,
    publish,
    read_file,
    recover,
    remove,
    write_file,
)


def state(step):
    return {"global_step": step, "state_dict": {"w": torch.arange(6.0) * step}, "plain": [1, "two", None]}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    write_file(state(1), path)
    return path


def complaint(path):
    with pytest.raises(UnusableCheckpoint) as caught:
        read_file(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


class RunsCode:
    """Unpickled without restriction, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_was_written_is_read(checkpoint):
    read = read_file(checkpoint)
    assert read["global_step"] == 1 and torch.equal(read["state_dict"]["w"], torch.arange(6.0))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_it_stays_an_archive_that_torch_and_zip_tools_read(checkpoint):
    assert torch.load(checkpoint, weights_only=True, mmap=True)["plain"] == [1, "two", None]
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.comment.startswith(b"dllm-var-checkpoint v002 sha256=")
        assert archive.testzip() is None


def test_the_checksum_is_that_of_the_bytes_torch_wrote(checkpoint):
    import hashlib

    content = checkpoint.read_bytes()
    comment = len(content) - content.rindex(b"dllm-var-checkpoint")
    plain = content[: -comment - 2] + b"\0\0"
    expected = hashlib.sha256(plain + b"dllm-var-checkpoint v002 sha256=").hexdigest()
    assert content.endswith(expected.encode())


def test_every_flipped_bit_is_found(checkpoint):
    content = checkpoint.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        checkpoint.write_bytes(damaged)
        assert "damaged" in complaint(checkpoint), place


def test_every_truncation_is_found(checkpoint):
    content = checkpoint.read_bytes()
    for length in range(len(content) - 1, -1, -7):
        os.truncate(checkpoint, length)
        assert "damaged" in complaint(checkpoint), length


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), new=st.binary(min_size=1, max_size=40), insert=st.booleans())
def test_overwritten_and_inserted_bytes_are_found(place, new, insert, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "last.ckpt"
    write_file(state(1), path)
    content = path.read_bytes()
    place %= len(content) + 1
    changed = content[:place] + new + content[place + (0 if insert else len(new)) :]
    path.write_bytes(changed)
    if changed == content:
        read_file(path)
    else:
        complaint(path)


def test_zeros_in_place_of_a_lost_block_are_found(checkpoint):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:512] + bytes(512) + content[1024:])
    assert "does not match its checksum" in complaint(checkpoint)


def test_a_plain_file_of_torch_save_is_read(tmp_path):
    path = tmp_path / "plain.ckpt"
    torch.save(state(2), path)
    assert read_file(path)["global_step"] == 2
    os.truncate(path, path.stat().st_size - 5)
    assert "damaged" in complaint(path)


@pytest.mark.parametrize("content", [b"# notes\n", b"\x80\x04K\x01.", b"\xff" * 100])
def test_foreign_files_are_no_checkpoints(content, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    assert "is not a checkpoint" in complaint(path)
    path.write_bytes(b"")
    assert "empty" in complaint(path)
    assert "cannot read" in complaint(tmp_path / "nowhere.ckpt")


def test_another_format_is_named(checkpoint, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", 7)
    write_file(state(1), checkpoint)
    monkeypatch.undo()
    assert "format 7" in complaint(checkpoint) and "format 2" in complaint(checkpoint)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    proof, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    evil = {**state(1), "extra": RunsCode(proof)}
    for write in (write_file, torch.save, lambda obj, file: file.write_bytes(pickle.dumps(obj))):
        write(evil, path)
        complaint(path)
        assert not proof.exists()
    torch.save(evil, path)
    assert "mkdir" in complaint(path)
    torch.load(path, weights_only=False)  # it would have worked
    assert proof.exists()


# -- crashes and full disks --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: what would clean up does not run."""


def kill_at_call(number, monkeypatch):
    """Ends the work at the n-th call that changes a disk."""
    left = [number]

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(files, "discard", lambda path: None)
    return left


@pytest.mark.parametrize("place", range(1, 5))
def test_a_crash_leaves_the_previous_one_whole(place, checkpoint, monkeypatch):
    left = kill_at_call(place, monkeypatch)
    try:
        write_file(state(2), checkpoint)
        assert place == 4  # fsync of the file, rename, fsync of the folder
    except Killed:
        pass
    monkeypatch.undo()
    assert left[0] <= 1
    assert read_file(checkpoint)["global_step"] in (1, 2)
    clear_leftovers(checkpoint.parent)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("written", [0, 100, 1200])
def test_a_crash_in_the_midst_of_writing(written, checkpoint):
    (checkpoint.parent / ".last.ckpt.new").write_bytes(checkpoint.read_bytes()[:written])
    assert newest_checkpoint(checkpoint.parent) == checkpoint
    clear_leftovers(checkpoint.parent)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_leftovers_of_every_kind_are_cleared_and_nothing_else(tmp_path):
    write_file(state(1), tmp_path / "last.ckpt")
    (tmp_path / ".last.ckpt.txt").touch()
    for name in (".a.ckpt.new", "..a.ckpt.new.new", ".b.ckpt.saving", ".last.ckpt.previous"):
        (tmp_path / name).touch()
        folder_of(tmp_path / name.replace(".ckpt", "=2.ckpt"), "half")
    clear_leftovers(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".last.ckpt.txt", "last.ckpt", "last=2.ckpt"]  # one that was being replaced is put back


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_leaves_the_previous_one_and_nothing_else(checkpoint, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, mode: io.FileIO("/dev/full", mode))
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(state(2), checkpoint)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert read_file(checkpoint)["global_step"] == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def folder_of(path, text):
    path.mkdir()
    (path / "shard").write_text(text)
    return path


@pytest.mark.parametrize("place", range(1, 6))
def test_a_folder_takes_the_place_of_another(place, tmp_path, monkeypatch):
    path = folder_of(tmp_path / "last.ckpt", "old")
    unfinished = folder_of(tmp_path / ".last.ckpt.new", "new")
    discard = files.discard
    kill_at_call(place, monkeypatch)
    killed = False
    try:
        publish(unfinished, path)
    except Killed:
        killed = True
    monkeypatch.undo()
    assert killed == (place < 5)  # two renames and two fsyncs
    recover(tmp_path)
    assert (path / "shard").read_text() == ("old" if place < 3 else "new")
    clear_leftovers(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]
    assert files.discard is discard


def test_a_file_and_a_folder_replace_each_other_and_links(tmp_path):
    path = tmp_path / "last.ckpt"
    write_file(state(1), path)
    publish(folder_of(tmp_path / ".last.ckpt.new", "new"), path)
    assert path.is_dir()
    write_file(state(2), path)
    assert read_file(path)["global_step"] == 2
    other = tmp_path / "step=1.ckpt"
    write_file(state(1), other)
    path.unlink()
    path.symlink_to(other.name)
    write_file(state(3), path)
    assert read_file(path)["global_step"] == 3 and read_file(other)["global_step"] == 1


def test_half_of_a_removed_folder_is_no_checkpoint(tmp_path, monkeypatch):
    path = folder_of(tmp_path / "step=1.ckpt", "old")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
    remove(path)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) is None
    clear_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


# -- which one is meant ------------------------------------------------------------------------------------------------


def test_the_newest_is_that_of_the_latest_step_whenever_it_was_written(tmp_path):
    future = 2**32
    for step, time in ((2, future), (6, 100), (4, 200)):
        write_file(state(step), tmp_path / f"{step}.ckpt")
        os.utime(tmp_path / f"{step}.ckpt", (time, time))
    write_file(state(6), tmp_path / "best.ckpt")
    os.utime(tmp_path / "best.ckpt", (50, 50))
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    assert [path.stem for path in newest_first(tmp_path)] == ["6", "best", "4", "2"]
    for time, expected in ((150, ["x", "6", "best", "4", "2"]), (20, ["6", "best", "4", "2", "x"])):
        (tmp_path / "x.ckpt").write_bytes(b"not readable: by its time")
        os.utime(tmp_path / "x.ckpt", (time, time))
        assert [path.stem for path in newest_first(tmp_path)] == expected


def test_the_step_is_read_without_running_code(tmp_path):
    path = tmp_path / "x.ckpt"
    proof = tmp_path / "executed"
    torch.save({"global_step": 7}, path)
    assert step_of(path) == 7
    torch.save({"global_step": 7, "extra": RunsCode(proof)}, path)
    assert step_of(path) is None and not proof.exists()


def test_the_newest_good_one_is_offered(tmp_path):
    for age, name in enumerate(["last", "step=4", "step=2"]):
        write_file(state(9 - age), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (100 - age, 100 - age))
    last = newest_checkpoint(tmp_path)
    assert last == tmp_path / "last.ckpt"
    check_or_offer(last, "--resume")
    for name in ("last", "step=4"):
        os.truncate(tmp_path / f"{name}.ckpt", 300)
        os.utime(tmp_path / f"{name}.ckpt", (99, 99))
    assert newest_usable(tmp_path) == tmp_path / "step=2.ckpt"
    with pytest.raises(UnusableCheckpoint, match=r"last.ckpt is damaged.*--resume=.*step=2.ckpt$"):
        check_or_offer(last, "--resume")
    os.truncate(tmp_path / "step=2.ckpt", 0)
    with pytest.raises(UnusableCheckpoint, match="no other checkpoint"):
        check_or_offer(last, "--resume")


def test_a_good_file_passes_alone(checkpoint):
    check_file(checkpoint)
    assert newest_usable(checkpoint.parent, {checkpoint}) is None
