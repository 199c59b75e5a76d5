"""Servers in a thread of this process, on a free port, and a model whose forwards wait to be let through."""

import socket
import threading
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import httpx
import openai
import uvicorn

from dllm_var.serving.answering import Settings
from dllm_var.serving.app import build_app
from dllm_var.serving.decoder import Decoder
from dllm_var.serving.metrics import Metrics

ROOT = Path(__file__).parent.parent.parent


@lru_cache
def shared_client():
    return openai.OpenAI(api_key="none", max_retries=0, timeout=30)


@lru_cache
def shared_http():
    return httpx.Client(timeout=30)


class Server:
    """A running server; `stop` ends it as a signal would."""

    def __init__(self, model, tokenizer, sampler, context=256, max_queue=64, max_engines=2, others=None, **settings):
        self.decoder = Decoder(model, tokenizer, sampler, context, max_queue, max_engines, Metrics(), others)
        app = build_app(self.decoder, Settings("tiny", **settings))
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = listening.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listening]})
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)

    def client(self, **options):
        """Returns a client; all share their connections, as each of its own would read certificates first."""
        return shared_client().with_options(base_url=f"{self.url}/v1", **options)

    @property
    def http(self):
        """A client that sends anything."""
        return shared_http()

    def in_flight(self):
        """Returns how many answers have a place in an engine."""
        return sum(len(engine.request.jobs) for engine in [*self.decoder.engines.values()])

    def refuses(self):
        """Whether no connection is taken any more."""
        try:
            socket.create_connection(self.address, 5).close()
        except OSError:
            return True
        return False

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.decoder.is_alive()


def wait_until(holds, seconds=20):
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.005)


@contextmanager
def running(*arguments, **settings):
    server = Server(*arguments, **settings)
    try:
        yield server
    finally:
        server.stop()


class Turnstile:
    """Lets a model's forwards through one at a time, or all."""

    def __init__(self, model):
        self.permits, self.open, self.shapes = threading.Semaphore(0), False, []
        original = model.hidden_states

        def hidden_states(input_ids, *others, **named):
            if not self.open:
                assert self.permits.acquire(timeout=30)
            self.shapes.append(tuple(input_ids.shape))
            return original(input_ids, *others, **named)

        model.hidden_states = hidden_states

    def let(self, forwards=1):
        for _ in range(forwards):
            self.permits.release()

    def open_up(self):
        self.open = True
        self.let(1)
