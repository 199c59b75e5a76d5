"""The gate that every request passes first: API key, limits of size and time, counts, and errors in one form."""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass

import anyio
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllm_var.serving.decoder import log_failure
from dllm_var.serving.metrics import Metrics
from dllm_var.serving.protocol import ApiError

OPEN = ("/", "/health", "/metrics")  # without a key


@dataclass
class Gate:
    """ASGI middleware.

    Args:
        key: API key that `/v1` wants; none when None.
        max_body: Bytes of the largest request.
        timeout: Seconds that a request may take to arrive.
        paths: Paths that are counted by their names.
    """

    app: ASGIApp
    key: str | None
    max_body: int
    timeout: float
    paths: tuple[str, ...]
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        ends, status = time.monotonic() + self.timeout, 0
        size, complete = 0, False

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.requests.labels(path, str(status)).inc()
            await send(message)

        async def limited_receive() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                with anyio.fail_after(ends - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request took too long to arrive") from None
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"the request is larger than {self.max_body:,} bytes")
            complete = not message.get("more_body", False)
            return message

        try:
            headers = dict(scope["headers"])
            if path not in OPEN and not self._is_known(headers.get(b"authorization", b"")):
                raise ApiError("the API key is missing or wrong", 401, param=None, code="invalid_api_key")
            await self.app(scope, limited_receive, counting_send)
        except ApiError as error:
            await reply(error, counting_send)
        except Exception as error:  # a bug: its message, which may hold text of a prompt, goes nowhere
            log_failure("a request failed", error)
            if not status:
                await reply(ApiError("the server failed; its log says where", 500, "server_error"), counting_send)

    def _is_known(self, authorization: bytes) -> bool:
        if self.key is None:
            return True
        return hmac.compare_digest(authorization, b"Bearer " + self.key.encode())


async def reply(error: ApiError, send: Send) -> None:
    """Sends an error as a whole reply."""
    body = error.body().encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(error.headers or {})}
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": listed})
    await send({"type": "http.response.body", "body": body})
