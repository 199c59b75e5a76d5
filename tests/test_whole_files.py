"""Output files are whole or not there, and what stands in their way is told in one line that names it."""

import errno
import os
import sys

import pytest

from dllm_var import UserError
from dllm_var.__main__ import main, open_streams
from dllm_var.cli.failures import from_files
from dllm_var.cli.settings import read_settings
from dllm_var.files import WholeFile, open_output, write_whole


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "answers.txt"
    path.write_text("old")
    file = WholeFile(path)
    file.stream.write("new")
    assert path.read_text() == "old"
    file.complete()
    assert (path.read_text(), os.listdir(tmp_path)) == ("new", ["answers.txt"])


def test_what_an_exception_cuts_short_leaves_the_old_file(tmp_path):
    path = tmp_path / "answers.txt"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_whole(path, 3)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["answers.txt"])


def test_a_link_is_followed_and_a_device_written_directly(tmp_path):
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    (tmp_path / "null").symlink_to(os.devnull)
    write_whole(tmp_path / "null", "text")
    assert (tmp_path / "null").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "null", "target"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_named():
    with pytest.raises(OSError, match="No space left") as raised:
        write_whole("/dev/full", "text")
    assert from_files(raised.value).startswith("cannot write /dev/full: No space left on device; make room")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "folder"),
        ("nowhere/a", "No such file"),
        ("file/a", "Not a directory"),
        ("loop", "symbolic links"),
        ("x" * 300, "too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=f"--output: cannot write '{name}': .*{reason}"):
        open_output("--output", name)


def test_errors_without_a_file_are_no_mistakes():
    assert from_files(OSError(errno.ECONNRESET, "reset")) is None
    assert from_files(KeyError("bug")) is None


def test_deep_and_exploding_settings_are_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested more than 100 levels"):
        read_settings(path)
    doubled = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64))
    path.write_text("a0: &a0 [1, 1]\n" + doubled)
    with pytest.raises(UserError, match="more than 100,000 values"):
        read_settings(path)


def test_closed_streams_are_opened_before_a_file_takes_their_place(tmp_path):
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None
        try:
            open_streams()
            descriptor = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
            print("nothing takes this")
            status = main(["--version"]) if descriptor > 2 else 9
        except BaseException:
            status = 8
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "file").read_text() == ""
