"""The shipped model, and a server that has it."""

import pytest
from servers import ROOT, running

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.sampling.base import sampler_from_config


@pytest.fixture(scope="session")
def words():
    """The shipped model, its tokenizer and its sampler."""
    model, tokenizer, meta = load_checkpoint(ROOT / "checkpoints" / "cmudict")
    return model, tokenizer, sampler_from_config(meta["sampler"])


@pytest.fixture(scope="session")
def server(words):
    with running(*words) as server:
        yield server


@pytest.fixture
def client(server):
    return server.client()
