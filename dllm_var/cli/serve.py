"""The command `serve`: a checkpoint behind OpenAI's API."""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dllm_var.cli.decoding_options import add_model_options, add_sampler_options, load_model, read_options
from dllm_var.errors import UserError
from dllm_var.settings import SettingsParser, overlays, read_settings

if TYPE_CHECKING:
    from dllm_var.model.transformer import Transformer
    from dllm_var.sampling import Sampler

DESCRIPTION = """Answers requests over HTTP with a trained checkpoint: a page at / that shows answers being decoded,
OpenAI's /v1/completions, /v1/chat/completions and /v1/models, /health, and /metrics for Prometheus. Needs pip install
"dllm-var[serve]".

Requests are decoded together; they join and leave the batch between two forward passes. SIGTERM or Ctrl-C ends the
server after the requests it has; Ctrl-C again ends it at once. If DLLM_VAR_API_KEY is set, clients must send that
key."""

EXAMPLES = """examples:
  python -m dllm_var serve --checkpoint checkpoints/cmudict
  python -m dllm_var serve --checkpoint RUN --port 9000 --max-tokens 4096 --batch-size 16
  DLLM_VAR_API_KEY=... python -m dllm_var serve --checkpoint RUN --host 0.0.0.0

docs/serve.md has clients and limits."""

KEY = "DLLM_VAR_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def main(command: str, arguments: list[str]) -> int:
    """Runs `serve` until a signal ends it; returns 0 after the last request was answered."""
    options, sampler, checkpoint = read_options(command, arguments, build_parser)
    if any(find_spec(name) is None for name in NEEDED):
        raise UserError('serve needs FastAPI and uvicorn: pip install "dllm-var[serve]"')
    import uvicorn

    from dllm_var.serving.answering import Settings
    from dllm_var.serving.app import build_app
    from dllm_var.serving.decoder import Decoder
    from dllm_var.serving.metrics import Metrics

    check_options(options)
    listening = listen(options.host, options.port)
    model, tokenizer = load_model(options, checkpoint)
    limits = (options.max_tokens, options.max_queue, options.max_engines)
    decoder = Decoder(model, tokenizer, sampler, *limits, Metrics(), others_for(sampler, model))
    chat = checkpoint.meta.get("chat") is True and tokenizer.chat_template is not None
    path, key = Path(options.checkpoint), os.environ.get(KEY) or None
    name = options.name or path.name or path.resolve().name
    settings = Settings(name, key, options.timeout, options.max_body, chat)
    server = uvicorn.Server(uvicorn.Config(build_app(decoder, settings), log_level="info", server_header=False))
    host, port = listening.getsockname()[:2]
    kind, rows = type(sampler).__name__, decoder.sampler.batch_size
    print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1: {kind}, {rows} rows", flush=True)
    if key is None and not is_local(host):
        print(f"warning: {host} is open to other machines, and there is no API key: set {KEY}", file=sys.stderr)
    sys.setswitchinterval(5e-4)  # seconds that what decodes may have to wait for what parses requests; 5 ms otherwise
    gc.collect()
    gc.freeze()  # a collection that looks at all of torch would stop every request for a tenth of a second
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has shut down
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # raised again in the same way
        if server.force_exit:
            raise
    return 0 if server.started else 1


def others_for(own: Sampler, model: Transformer) -> dict[str, Any]:
    """Returns the overlays of configs/sampler/ that a request may name: those that suit a model, by name.

    All have the limits of the server's `own` sampler. Those that need a second model are not among them.
    """
    from dllm_var.sampling.base import sampler_from_config

    found: dict[str, Any] = {}
    for name, path in overlays().items():
        try:
            sampler: Any = sampler_from_config(read_settings(path)["sampler"])
            sampler.check_model(model)
        except UserError:  # it is for models of another kind, or names a second model
            continue
        canvas = hasattr(sampler, "canvas_length")
        shared = {"batch_size": "batch_size", "block_length": "block_length"}
        shared["canvas_length" if canvas else "max_new_tokens"] = "max_new_tokens"
        changes = {
            setting: getattr(own, source)
            for setting, source in shared.items()
            if getattr(own, source, None) is not None and getattr(sampler, setting, None) is not None
        }
        found[name] = replace(sampler, **changes)
    return found


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that takes connections; raises UserError when the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at --host {host} --port {port}: {reason}; choose another") from None


def is_local(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def check_options(options: Namespace) -> None:
    for name in ("max_tokens", "max_queue", "max_engines", "max_body", "timeout"):
        least = 2 if name == "max_tokens" else 0 if name == "timeout" else 1
        if options[name] < least or options[name] == 0:
            allowed = f"at least {least}" if least else "above 0"
            raise UserError(f"--{name.replace('_', '-')} must be {allowed}, got {options[name]}")


def build_parser(command: str, sampler: dict[str, Any] | None) -> SettingsParser:
    """Returns the parser of the options; `sampler` is the default one, None for a parser that only shows help."""
    parser = SettingsParser.of_command(command, "--checkpoint PATH [options]", DESCRIPTION, EXAMPLES)
    add_model_options(parser)

    server = parser.add_argument_group("server")
    server.add_argument("--host", type=str, default="127.0.0.1", metavar="HOST", help="address to listen at")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen at; a free one when 0")
    name = "the model's name for clients; the last part of PATH when not given"
    server.add_argument("--name", type=str, metavar="NAME", help=name)

    limits = parser.add_argument_group("limits")
    tokens = "tokens that a prompt and its answer may have together"
    limits.add_argument("--max-tokens", type=int, default=2_048, metavar="N", help=tokens)
    queue = "answers that may wait; further requests get status 429"
    limits.add_argument("--max-queue", type=int, default=256, metavar="N", help=queue)
    engines = "batches with different temperatures, seeds, ... that run in turn; each has caches of its own"
    limits.add_argument("--max-engines", type=int, default=2, metavar="N", help=engines)
    limits.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds that a request may take")
    limits.add_argument("--max-body", type=int, default=1 << 20, metavar="N", help="bytes of the largest request")
    add_sampler_options(parser, sampler)
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of options by their full names")
    return parser
