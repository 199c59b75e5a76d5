"""Locks on run folders: one process at a time, free the moment it is gone."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import time

import pytest

from dllm_var.errors import UserError
from dllm_var.training.run_folders import hold


def _hold(folder, connection, forks):
    child = 0
    with hold(folder):
        if forks:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        connection.send(child)
        connection.recv()


@contextlib.contextmanager
def another_process(folder, forks=False):
    """Holds a folder in another process, which ends when it is sent anything, or killed."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(folder, there, forks))
    process.start()
    process.connection = here
    child = here.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        if child:
            os.kill(child, 9)


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
        holder.join()
        with hold(folder):
            pass
    assert list(tmp_path.iterdir()) == []
    with another_process(folder) as holder:
        holder.connection.send("end")
        holder.join()
        with hold(folder):
            assert not folder.exists() and len(list(tmp_path.iterdir())) == 1  # beside it


def test_a_forked_child_that_lives_on_does_not_keep_the_lock(tmp_path):
    with another_process(tmp_path, forks=True) as holder:
        refusal(tmp_path)
        holder.kill()
        holder.join()
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
    assert f"cannot lock the folder {folder}" in refusal(folder)
