"""What every test gets: one torch thread, and a cache of its own for tokenized data."""

import os
import signal

import lightning  # noqa: F401  its log goes where standard error is now: a test's own is closed after the test
import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a shell has put in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of the tests inherit it, and get Ctrl-C

torch.set_num_threads(1)  # toy shapes: more threads only get in each other's way


@pytest.fixture(scope="session", autouse=True)
def tokenized_data_cache(tmp_path_factory):
    """Keeps tokenized data out of the home folder; shared by all tests of the session and the processes they start."""
    if "DLLM_VAR_CACHE" not in os.environ:
        os.environ["DLLM_VAR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return os.environ["DLLM_VAR_CACHE"]


# Lightning sets these for the processes it starts. Left behind, the next test's processes take its port or its seed.
LEFT_BY_LIGHTNING = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
LEFT_BY_LIGHTNING += ("RANK", "LOCAL_RANK", "NODE_RANK")


@pytest.fixture(autouse=True)
def nothing_of_a_run_is_left():
    """Takes away what Lightning leaves of an earlier run: variables, its process group, its number of threads."""
    for name in LEFT_BY_LIGHTNING:
        os.environ.pop(name, None)
    yield
    torch.set_num_threads(1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
