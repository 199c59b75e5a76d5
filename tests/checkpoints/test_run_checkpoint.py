"""Which checkpoint of a run is meant, and what is offered in place of a damaged one."""

import os

import pytest

from dllm_var.checkpoints.archive import UnusableCheckpoint, write_archive
from dllm_var.checkpoints.run_checkpoint import (
    check_or_offer,
    clear_leftovers,
    newest_checkpoint,
    newest_first,
    newest_usable,
    read_identity,
)
from dllm_var.errors import UserError


def write(path, step):
    write_archive({"global_step": step}, path)


def test_leftovers_of_every_kind_are_cleared_and_nothing_else(tmp_path):
    for name in ("last.ckpt", "a.ckpt.partial", "b.ckpt.saving", "last.ckpt.previous", "last.ckpt.txt"):
        (tmp_path / name).touch()
        (tmp_path / name.replace(".ckpt", "=2.ckpt")).mkdir()
    (tmp_path / "last=2.ckpt").rmdir()
    clear_leftovers(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["last.ckpt", "last.ckpt.txt", "last=2.ckpt", "last=2.ckpt.txt"]  # it was being replaced


def test_the_newest_is_that_of_the_latest_step_whenever_it_was_written(tmp_path):
    for name, step, time in (("2", 2, 2**32), ("6", 6, 100), ("4", 4, 200), ("best", 6, 50)):
        write(tmp_path / f"{name}.ckpt", step)
        os.utime(tmp_path / f"{name}.ckpt", (time, time))
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    assert [path.stem for path in newest_first(tmp_path)] == ["6", "best", "4", "2"]
    for time, expected in ((150, ["x", "6", "best", "4", "2"]), (20, ["6", "best", "4", "2", "x"])):
        (tmp_path / "x.ckpt").write_bytes(b"not readable: by its time")
        os.utime(tmp_path / "x.ckpt", (time, time))
        assert [path.stem for path in newest_first(tmp_path)] == expected


def test_the_newest_good_one_is_offered(tmp_path):
    for age, name in enumerate(["last", "step=4", "step=2"]):
        write(tmp_path / f"{name}.ckpt", 9 - age)
    last = newest_checkpoint(tmp_path)
    assert last == tmp_path / "last.ckpt"
    check_or_offer(last)
    for name in ("last", "step=4"):
        os.truncate(tmp_path / f"{name}.ckpt", 300)
    assert newest_usable(tmp_path) == tmp_path / "step=2.ckpt"
    with pytest.raises(UnusableCheckpoint, match=r"last.ckpt is damaged.*good one is --resume=.*step=2.ckpt$"):
        check_or_offer(last, "--resume=")
    os.truncate(tmp_path / "step=2.ckpt", 0)
    with pytest.raises(UnusableCheckpoint, match="no other one in"):
        check_or_offer(last)


def test_checkpoints_of_other_programs_and_formats_are_refused():
    for content, reason in (
        ({"state_dict": {}}, "last.ckpt was not written by dllm_var"),
        ({"dllm_var": {"format": 0}}, "is of format 0, this version of dllm-var reads format"),
    ):
        with pytest.raises(UserError, match=reason):
            read_identity(content, "last.ckpt")
