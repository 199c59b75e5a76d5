"""Output files are whole or not there, and what stands in their way is told in one line that names it."""

import contextlib
import errno
import os
import sys

import pytest

from dllm_var import UserError, files
from dllm_var.__main__ import main, open_streams
from dllm_var.cli.failures import from_files
from dllm_var.files import OutputFile, discard, open_output, put_back, write_atomically
from dllm_var.settings import read_settings


def names(folder):
    return sorted(os.listdir(folder))


def write(path, text):
    with write_atomically(path) as partial:
        if path.suffix == ".folder":
            partial.mkdir()
            (partial / "part").write_text(text)
        else:
            partial.write_text(text)


def content(path):
    return (path / "part" if path.is_dir() else path).read_text()


class Killed(BaseException):
    """Stands for the end of the process: what would clean up does not run."""


def kill_at(moment, patch):
    """Ends the process at the n-th call that changes a disk; returns how many are left."""
    left = [moment]

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename"):
        patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(files, "discard", lambda path: None)
    return left


@pytest.mark.parametrize("name", ["a.ckpt", "a.folder"])
def test_a_process_killed_at_any_moment_leaves_the_old_content_or_the_new(name, tmp_path, monkeypatch):
    path = tmp_path / name
    write(path, "old")
    seen = []
    for moment in range(1, 20):
        with monkeypatch.context() as patch:
            left = kill_at(moment, patch)
            with contextlib.suppress(Killed):
                write(path, "new")
        if left[0] > 0:
            break  # it was written before its moment came
        put_back(tmp_path)
        seen.append(content(path))
        for leftover in set(names(tmp_path)) - {name}:
            discard(tmp_path / leftover)
        write(path, "old")
    assert set(seen) == {"old", "new"} and seen == sorted(seen, reverse=True)
    assert content(path) == "new"


@pytest.mark.parametrize("name", ["a.ckpt", "a.folder"])
def test_what_an_exception_cuts_short_leaves_the_old_content_and_nothing_else(name, tmp_path):
    write(tmp_path / name, "old")
    with pytest.raises(TypeError):
        write(tmp_path / name, 3)
    assert content(tmp_path / name) == "old" and names(tmp_path) == [name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_named(tmp_path):
    def write_to_full_disk(path):
        with write_atomically(path) as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("text")

    def write_to_device(path):
        with OutputFile(path) as stream:
            stream.write("text")

    for path, action in ((tmp_path / "a", write_to_full_disk), ("/dev/full", write_to_device)):
        with pytest.raises(OSError, match="No space left") as raised:
            action(path)
        assert from_files(raised.value).startswith(f"cannot write {path}: No space left on device; make room")
    assert names(tmp_path) == []


def test_processes_that_write_the_same_do_not_meet(tmp_path):
    path = tmp_path / "a.folder"
    with write_atomically(path, shared=True) as one, write_atomically(path, shared=True) as other:
        for partial in (one, other):
            partial.mkdir()
            (partial / "part").write_text("same")
    assert content(path) == "same" and names(tmp_path) == ["a.folder"]


def test_an_output_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "answers.txt"
    path.write_text("old")
    (tmp_path / "link").symlink_to("answers.txt")
    file = OutputFile(tmp_path / "link")
    file.stream.write("new")
    assert path.read_text() == "old"
    file.complete()
    assert (path.read_text(), names(tmp_path)) == ("new", ["answers.txt", "link"])
    (tmp_path / "null").symlink_to(os.devnull)  # a device is written directly
    OutputFile(tmp_path / "null").complete()
    assert names(tmp_path) == ["answers.txt", "link", "null"]


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
