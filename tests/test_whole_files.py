"""Output files are whole or not there, and what stands in their way is told in one line that names it."""

import contextlib
import errno
import os
import resource

import pytest

from dllm_var import files
from dllm_var.errors import in_one_line
from dllm_var.files import discard, open_output, put_back, write_atomically, write_text


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


def write_bit_by_bit(path, text):
    with open_output(path) as file:
        file.write(text)


@pytest.mark.parametrize("action", [write_text, write_bit_by_bit])
def test_a_file_that_a_disk_does_not_take_is_named_and_removed(action, tmp_path):
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, most))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            action(tmp_path / "a", "text" * 1_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert in_one_line(raised.value).startswith(f"cannot write {tmp_path / 'a'}: File too large; raise the limit")
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
    with open_output(tmp_path / "link") as file:
        file.write("new")
        assert path.read_text() == "old"
    assert (path.read_text(), names(tmp_path)) == ("new", ["answers.txt", "link"])
    (tmp_path / "null").symlink_to(os.devnull)  # a device is written directly
    write_bit_by_bit(tmp_path / "null", "lost")
    assert names(tmp_path) == ["answers.txt", "link", "null"]


def test_what_was_written_before_an_exception_is_kept_beside_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    for text, left in (("", ["a"]), ("half", ["a", "a.partial"])):
        with contextlib.suppress(KeyboardInterrupt), open_output(tmp_path / "a") as file:
            file.write(text)
            raise KeyboardInterrupt
        assert names(tmp_path) == left and content(tmp_path / "a") == "old"
    assert content(tmp_path / "a.partial") == "half"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "Is a directory"),
        ("nowhere/a", "No such file"),
        ("file/a", "Not a directory"),
        ("x" * 300, "too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=reason) as raised, open_output(name):
        pytest.fail("the work has begun")
    assert in_one_line(raised.value).startswith(f"cannot use '{name or '.'}': ")


def test_errors_without_a_file_are_no_mistakes():
    assert in_one_line(OSError(errno.ECONNRESET, "reset")) is None
    assert in_one_line(KeyError("bug")) is None


def test_a_pipe_whose_reader_has_gone_is_left_where_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    output = open_output(tmp_path / "pipe")
    output.__enter__().write("an answer")
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        output.__exit__(None, None, None)
    assert names(tmp_path) == ["pipe"]
