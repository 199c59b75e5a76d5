"""The server's pages: OpenAI's API, health and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from dllm_var.sampling.recording import label_of
from dllm_var.serving.answering import Answering, Settings, check_name
from dllm_var.serving.decoder import Decoder
from dllm_var.serving.gate import Gate
from dllm_var.serving.protocol import ApiError, ChatWishes, CompletionWishes, Wishes
from dllm_var.view import page

PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def build_app(decoder: Decoder, settings: Settings) -> FastAPI:
    """Returns the application; it starts the decoder, and ends it after the last request."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        decoder.start()
        yield
        await run_in_threadpool(decoder.close)

    app = FastAPI(title="dllm-var", lifespan=lifespan, openapi_url=None)
    metrics = decoder.metrics
    gate = dict(key=settings.key, max_body=settings.max_body, timeout=settings.timeout, paths=PATHS, metrics=metrics)
    app.add_middleware(Gate, **gate)  # type: ignore[arg-type]

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return error_response(ApiError(str(error.detail), error.status_code))

    @app.exception_handler(ApiError)
    async def failed(_: Request, error: ApiError) -> Response:
        return error_response(error)

    samplers = {name: label_of(sampler) for name, sampler in decoder.samplers.items()}
    live = {"model": settings.name, "chat": settings.chat, "locked": settings.key is not None, "samplers": samplers}
    document = page([], live, settings.name)

    @app.get("/")
    async def root() -> Response:
        return HTMLResponse(document, headers={"cache-control": "no-cache"})

    @app.get("/health")
    async def health() -> Response:
        if decoder.closing or not decoder.is_alive():
            return JSONResponse({"status": "stopping" if decoder.is_alive() else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    model = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "dllm-var"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        check_name(name, settings)
        return JSONResponse(model)

    def answering(kind: type[Wishes]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await Answering(decoder, settings, request, await read_wishes(request, kind)).reply()

        return answer

    # Plain routes: the way through FastAPI's dependencies would take as long as all the rest of a request.
    app.add_route("/v1/completions", answering(CompletionWishes), methods=["POST"])
    app.add_route("/v1/chat/completions", answering(ChatWishes), methods=["POST"])

    return app


async def read_wishes(request: Request, kind: type[Wishes]) -> Wishes:
    """Returns the body of a request; raises ApiError for one that is not valid, without repeating what was sent."""
    if "json" not in request.headers.get("content-type", ""):  # what a page of another site may send is none
        raise ApiError("the request is not JSON: send it with the header content-type: application/json")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place, message = [*map(str, first["loc"][:1])], first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            raise ApiError(f"the request is not valid JSON: {message.removeprefix('Invalid JSON: ')}") from None
        raise ApiError(": ".join([*place, message]), param=place[0] if place else None) from None


def error_response(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers, "application/json")
