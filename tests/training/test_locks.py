"""Locks on run folders: one process at a time, free the moment it is gone."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_var.errors import UserError
from dllm_var.training.run_folders import hold

ROOT = Path(__file__).parent.parent.parent
HOLDER = """
import os, sys, time
from pathlib import Path
from dllm_var.training.run_folders import hold
with hold(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(folder, *arguments):
    """Holds a folder until it is told to end, or killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.communicate()


def refusal(folder):
    with pytest.raises(UserError) as caught, hold(folder):
        pass
    return str(caught.value)


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    folder = tmp_path / "version_0"
    with another_process(folder) as holder:
        (tmp_path / "link").symlink_to(folder)
        refusal(tmp_path / "link")
        (tmp_path / "link").unlink()
        for _ in range(2):  # a refusal changes nothing
            text = refusal(folder)
            assert f"{folder} is in use by process {holder.pid} on {os.uname().nodename}" in text and "\n" not in text
        holder.kill()
        holder.wait()
        with hold(folder):
            pass
    assert list(tmp_path.iterdir()) == []
    with another_process(folder) as holder:
        holder.communicate("")  # it ends by itself
        with hold(folder):
            assert not folder.exists() and len(list(tmp_path.iterdir())) == 1  # beside it


def test_a_forked_child_that_lives_on_does_not_keep_the_lock(tmp_path):
    with another_process(tmp_path, "fork") as holder:
        refusal(tmp_path)
        holder.kill()
        holder.wait()
        with hold(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def refuses(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuses)
    with hold(tmp_path), hold(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "x" / "run"
    assert f"cannot lock the folder {folder}: Not a directory" in refusal(folder)


def test_a_folder_in_one_that_cannot_be_written_to_is_locked_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    folder = tmp_path / "kept"
    folder.mkdir()
    with hold(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
