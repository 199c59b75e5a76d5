"""Checkpoint files: all damage to what they hold is found, no code runs, and the newest good one is chosen."""

import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.checkpoints.archive import UnusableCheckpoint, check, check_archive, load_archive, write_archive
from dllm_var.checkpoints.run_checkpoint import (
    check_or_offer,
    clear_leftovers,
    newest_checkpoint,
    newest_first,
    newest_usable,
    step_of,
)


def state(step):
    return {"global_step": step, "state_dict": {"w": torch.arange(60.0) * step}, "plain": [1, "two", None]}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    write_archive(state(1), path)
    return path


def read(path):
    with open(path, "rb") as file:
        check_archive(file, path)
    return load_archive(path, path)


def complaint(path):
    with pytest.raises(UnusableCheckpoint) as caught:
        check(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def is_found_or_harmless(path):
    """Whether damage is told, or changes nothing that is read."""
    try:
        content = read(path)
    except UnusableCheckpoint as error:
        return str(path) in str(error) and "\n" not in str(error)
    whole = state(1)
    return torch.equal(content.pop("state_dict")["w"], whole.pop("state_dict")["w"]) and content == whole


class RunsCode:
    """Unpickled without restriction, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_is_an_archive_that_torch_and_zip_tools_read(checkpoint):
    assert torch.load(checkpoint, weights_only=True, mmap=True)["plain"] == [1, "two", None]
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_every_flipped_bit_and_every_truncation_is_found(checkpoint):
    content = checkpoint.read_bytes()
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        checkpoint.write_bytes(damaged)
        assert is_found_or_harmless(checkpoint), place
    for length in range(len(content) - 1, -1, -13):
        checkpoint.write_bytes(content[:length])
        assert "damaged" in complaint(checkpoint) or length < 4, length
    weights = state(1)["state_dict"]["w"].numpy().tobytes()
    checkpoint.write_bytes(content.replace(weights, bytes(len(weights))))
    assert "does not match its checksum" in complaint(checkpoint)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10**6), new=st.binary(min_size=1, max_size=40), insert=st.booleans())
def test_overwritten_and_inserted_bytes_are_found(place, new, insert, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "last.ckpt"
    write_archive(state(1), path)
    content = path.read_bytes()
    place %= len(content) + 1
    path.write_bytes(content[:place] + new + content[place + (0 if insert else len(new)) :])
    assert is_found_or_harmless(path)


def test_an_entry_that_was_made_a_folder_is_found_with_and_without_our_checksum(tmp_path):
    ours, theirs = tmp_path / "ours.ckpt", tmp_path / "theirs.ckpt"
    write_archive(state(1), ours)
    torch.save(state(1), theirs)
    assert read(theirs)["plain"] == [1, "two", None]
    for path in (ours, theirs):
        content = bytearray(path.read_bytes())
        entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
        content[entry + 38] = 0x10  # the attribute of a folder: torch would return whatever is in memory
        path.write_bytes(content)
        assert "is damaged" in complaint(path)


def test_foreign_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "x.ckpt"
    for content in (b"# notes\n", b"\x80\x04K\x01.", b"\xff" * 100):
        path.write_bytes(content)
        assert "is not a checkpoint" in complaint(path)
    path.write_bytes(b"")
    assert "empty" in complaint(path)
    assert "cannot read" in complaint(tmp_path / "nowhere.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")  # would be waited for
    assert "is not a checkpoint" in complaint(tmp_path / "pipe.ckpt")


def test_pickled_code_is_refused_and_not_run(tmp_path):
    proof, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    evil = {**state(1), "extra": RunsCode(proof)}
    path.write_bytes(pickle.dumps(evil))
    complaint(path)
    write_archive(evil, path)
    assert "mkdir" in complaint(path) and step_of(path) is None and not proof.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert proof.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_leaves_the_previous_one_and_nothing_else(checkpoint, monkeypatch):
    save = torch.save

    def onto_a_full_disk(content, file):
        with open("/dev/full", "wb") as full:
            save(content, full)

    monkeypatch.setattr(torch, "save", onto_a_full_disk)
    with pytest.raises(OSError, match=r"No space left.*last\.ckpt"):
        write_archive(state(2), checkpoint)
    assert read(checkpoint)["global_step"] == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_a_link_is_replaced_and_not_followed(checkpoint):
    other = checkpoint.with_name("step=1.ckpt")
    checkpoint.rename(other)
    checkpoint.symlink_to(other.name)
    write_archive(state(3), checkpoint)
    assert read(checkpoint)["global_step"] == 3 and read(other)["global_step"] == 1


def test_leftovers_of_every_kind_are_cleared_and_nothing_else(tmp_path):
    for name in ("last.ckpt", "a.ckpt.partial", "b.ckpt.saving", "last.ckpt.previous", "last.ckpt.txt"):
        (tmp_path / name).touch()
        (tmp_path / name.replace(".ckpt", "=2.ckpt")).mkdir()
    (tmp_path / "last=2.ckpt").rmdir()
    clear_leftovers(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["last.ckpt", "last.ckpt.txt", "last=2.ckpt", "last=2.ckpt.txt"]  # it was being replaced


# -- which one is meant ------------------------------------------------------------------------------------------------


def test_the_newest_is_that_of_the_latest_step_whenever_it_was_written(tmp_path):
    for step, time in ((2, 2**32), (6, 100), (4, 200)):
        write_archive(state(step), tmp_path / f"{step}.ckpt")
        os.utime(tmp_path / f"{step}.ckpt", (time, time))
    write_archive(state(6), tmp_path / "best.ckpt")
    os.utime(tmp_path / "best.ckpt", (50, 50))
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    assert [path.stem for path in newest_first(tmp_path)] == ["6", "best", "4", "2"]
    for time, expected in ((150, ["x", "6", "best", "4", "2"]), (20, ["6", "best", "4", "2", "x"])):
        (tmp_path / "x.ckpt").write_bytes(b"not readable: by its time")
        os.utime(tmp_path / "x.ckpt", (time, time))
        assert [path.stem for path in newest_first(tmp_path)] == expected


def test_the_newest_good_one_is_offered(tmp_path):
    for age, name in enumerate(["last", "step=4", "step=2"]):
        write_archive(state(9 - age), tmp_path / f"{name}.ckpt")
    last = newest_checkpoint(tmp_path)
    assert last == tmp_path / "last.ckpt"
    check_or_offer(last, "--resume=")
    for name in ("last", "step=4"):
        os.truncate(tmp_path / f"{name}.ckpt", 300)
    assert newest_usable(tmp_path) == tmp_path / "step=2.ckpt"
    with pytest.raises(UnusableCheckpoint, match=r"last.ckpt is damaged.*--resume=.*step=2.ckpt$"):
        check_or_offer(last, "--resume=")
    os.truncate(tmp_path / "step=2.ckpt", 0)
    with pytest.raises(UnusableCheckpoint, match="no other checkpoint"):
        check_or_offer(last, "--resume=")
