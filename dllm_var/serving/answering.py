"""Answers to one request: the jobs that it asks for, and the reply, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dllm_var.errors import UserError
from dllm_var.sampling.base import Generation, check_request
from dllm_var.sampling.drawing import random_key, request_keys
from dllm_var.sampling.engine import EngineSampler
from dllm_var.sampling.infilling import block_length_of, check_fills, masks_behind
from dllm_var.sampling.recording import RecordedStep, summary_of
from dllm_var.sampling.stopping import StopStrings
from dllm_var.serving.decoder import OWN, Busy, Decoder, Failed, Stopped, can_draw
from dllm_var.serving.jobs import Drawing, Job, Part, Told
from dllm_var.serving.protocol import (
    ApiError,
    ChatWishes,
    CompletionWishes,
    LogProbabilities,
    Reply,
    Wishes,
    event,
    usage_of,
)
from dllm_var.text.prompts import encode_conversation, encode_prompt

RETRY_AFTER = 1  # seconds
QUICKLY_READ = 8_192  # bytes of a request whose prompts are encoded at once: another thread would take longer to start

Event = tuple[int, Told]  # of which choice, and what its job tells


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Args:
        name: The model's name.
        key: API key that clients must have; none when None.
        timeout: Seconds that a request may take in all.
        max_body: Bytes of the largest request.
        chat: Whether the page asks as in a conversation.
    """

    name: str
    key: str | None = None
    timeout: float = 600.0
    max_body: int = 1 << 20
    chat: bool = False


def check_name(name: str, settings: Settings) -> None:
    """Raises ApiError for a model that the server does not have."""
    if name != settings.name:
        message = f"there is no model '{name[:100]}'; there is '{settings.name}'"
        raise ApiError(message, 404, param="model", code="model_not_found")


class Left(Exception):
    """The client has gone."""


class Answering:
    """One request for answers: its jobs, and what they tell."""

    def __init__(self, decoder: Decoder, settings: Settings, request: Request, wishes: Wishes) -> None:
        self.decoder, self.settings, self.request, self.wishes = decoder, settings, request, wishes
        self.began = time.monotonic()
        self.chat = isinstance(wishes, ChatWishes)
        self.choices = wishes.n or 1
        self.sampler = self._sampler()
        self.written = Reply(settings.name, self.chat)
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.answers: dict[int, Generation] = {}
        self.jobs: list[Job] = []
        self.suffix: list[int] = []
        self.complete = False  # whether the reply was written to its end

    async def reply(self) -> Response:
        """Returns the reply, whole or as a stream; raises ApiError for a request that cannot be answered."""
        check_name(self.wishes.model, self.settings)
        try:
            if len(await self.request.body()) < QUICKLY_READ:
                self.jobs = self._make_jobs()
            else:
                self.jobs = await run_in_threadpool(self._make_jobs)
        except UserError as error:
            raise ApiError(str(error), param="messages" if self.chat else "prompt") from None
        try:
            self.decoder.submit(self.jobs)
        except Busy:
            retry = {"retry-after": str(RETRY_AFTER)}
            raise ApiError("the server is busy: try again later", 429, "server_error", headers=retry) from None
        except Stopped:
            raise ApiError("the server is shutting down", 503, "server_error") from None
        if self.wishes.stream:
            return EventStream(self._stream(), self._end)
        try:
            return await self._whole()
        finally:
            self._end()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _make_jobs(self) -> list[Job]:
        """Returns a job for each choice of each prompt, in their order."""
        prompts, choices = self._prompts(), self.choices
        if len(prompts) * choices > self.decoder.max_queue:
            raise ApiError(f"one request may ask for at most {self.decoder.max_queue:,} answers", param="n")
        check_request(prompts, None, (), self.decoder.model.config)
        self.suffix = self._suffix()
        limits = [self._limit(len(prompt) + len(self.suffix)) for prompt in prompts]
        gaps: list[range | None] = [None] * len(prompts)
        if self.suffix:
            gaps = [range(len(prompt), len(prompt) + limit) for prompt, limit in zip(prompts, limits, strict=True)]
            prompts = [self._with_gap(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        drawing = self._drawing()
        repeated = [prompt for prompt in prompts for _ in range(choices)]
        keys = request_keys(repeated)
        if self.wishes.seed is None and drawing.temperature > 0:
            keys = [random_key() for _ in repeated]
        stops, tokenizer = self.wishes.stops, self.decoder.tokenizer
        return [
            Job(
                prompt=prompt,
                limit=limits[index // choices],
                key=keys[index],
                sampler=self.sampler,
                drawing=drawing,
                tell=self._teller(index),
                gap=gaps[index // choices],
                stop=StopStrings(stops, tokenizer) if stops else None,
                streams=bool(self.wishes.stream),
                records=bool(self.wishes.steps),
                log_probabilities=self.wishes.log_probabilities,
            )
            for index, prompt in enumerate(repeated)
        ]

    def _sampler(self) -> EngineSampler:
        name, known = self.wishes.sampler or OWN, self.decoder.samplers
        if name not in known:
            raise ApiError(f"there is no sampler '{name[:100]}'; there are {', '.join(known)}", param="sampler")
        return known[name]

    def _prompts(self) -> list[list[int]]:
        wishes, tokenizer = self.wishes, self.decoder.tokenizer
        if isinstance(wishes, ChatWishes):
            if tokenizer.chat_template is None:
                raise UserError("this model's tokenizer has no chat template: use /v1/completions")
            turns = [message.turn() for message in wishes.messages]
            if turns and turns[-1]["role"] == "assistant":
                raise UserError("the last message is the assistant's: end with the one to answer")
            return [encode_conversation(turns, tokenizer)]
        assert isinstance(wishes, CompletionWishes)
        prompts = [encode_prompt(one, tokenizer) if isinstance(one, str) else one for one in wishes.prompts]
        if not prompts:
            raise UserError("there is no prompt: give at least one")
        return prompts

    def _suffix(self) -> list[int]:
        """Returns the tokens that follow the answer."""
        text = getattr(self.wishes, "suffix", None)
        if not text:
            return []
        try:
            check_fills(self.decoder.model)
            return encode_prompt(text, self.decoder.tokenizer)
        except UserError as error:
            raise ApiError(str(error), param="suffix") from None

    def _with_gap(self, prompt: list[int], limit: int) -> list[int]:
        """Returns a prompt, masks where its answer will be, the suffix, and what the sampler shows behind a text."""
        mask, length = self.decoder.tokenizer.mask_id, limit + len(self.suffix)
        grid = self.decoder.model.config.grid
        behind = masks_behind(len(prompt), length, block_length_of(self.sampler), grid)
        return [*prompt, *[mask] * limit, *self.suffix, *[mask] * behind]

    def _limit(self, given: int) -> int:
        """Returns how long an answer may be to so many given tokens."""
        wishes, context, own = self.wishes, self.decoder.context, self.sampler.max_new_tokens
        asked = wishes.max_tokens
        if isinstance(wishes, ChatWishes) and wishes.max_completion_tokens is not None:
            asked = wishes.max_completion_tokens
        room = context - given
        if room < (asked or 1):
            taken = f"the prompt has {given:,} tokens"
            wanted = taken if asked is None else f"{taken}, and max_tokens is {asked:,}"
            message = f"{wanted}: this server takes {context:,} together, of which the answer needs one at least"
            raise ApiError(message, param="max_tokens" if room > 0 else "prompt", code="context_length_exceeded")
        return asked or min(own, room)

    def _drawing(self) -> Drawing:
        """Returns the sampler's way to draw, with what the request changes."""
        wishes, sampler = self.wishes, self.sampler
        given = {name: getattr(wishes, name) for name in Drawing._fields}
        if given["temperature"] and not can_draw(sampler):
            raise ApiError(
                "this server's sampler does not draw: leave out temperature, or set it to 0", param="temperature"
            )
        drawing = Drawing(**{n: getattr(sampler, n) if value is None else value for n, value in given.items()})
        if drawing.temperature == 0:  # nothing is drawn: all such requests share an engine
            return Drawing(0.0, sampler.top_k, sampler.top_p, sampler.seed)
        return drawing

    def _teller(self, index: int) -> Callable[[Told], None]:
        def tell(what: Told) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server was stopped at once
                self.loop.call_soon_threadsafe(self.events.put_nowait, (index, what))

        return tell

    def _known(self) -> list[LogProbabilities]:
        return [LogProbabilities(self.decoder.tokenizer, self.chat, self.wishes.log_probabilities) for _ in self.jobs]

    def _end(self) -> None:
        """Frees the rows of what is not finished, and counts a client that has gone."""
        if not self.complete:
            self.decoder.metrics.disconnected.inc()
        if left := [job for index, job in enumerate(self.jobs) if index not in self.answers]:
            self.decoder.cancel(left)

    # -- what the jobs tell --------------------------------------------------------------------------------------------

    async def _next(self) -> Event:
        """Returns the next event; raises ApiError when there is none in time or a job has failed, or Left."""
        try:
            with anyio.fail_after(self.began + self.settings.timeout - time.monotonic()):
                index, what = await self.events.get()
        except TimeoutError:
            took = f"the request took more than {self.settings.timeout:g} seconds"
            raise ApiError(took, 504, "server_error", code="timeout") from None
        if isinstance(what, Left):
            raise what
        if isinstance(what, Failed):
            raise ApiError(str(what), 500, "server_error")
        if isinstance(what, Exception):
            raise ApiError("the server is shutting down", 503, "server_error")
        if isinstance(what, Generation):
            self.answers[index] = what
        return index, what

    async def _whole(self) -> Response:
        """Returns the reply, or an empty one that nobody reads when the client has gone."""
        watching = asyncio.ensure_future(self._watch())
        try:
            while len(self.answers) < len(self.jobs):
                await self._next()
        except Left:
            return Response(status_code=499)
        except ApiError:
            self.complete = True
            raise
        finally:
            watching.cancel()
        self.complete = True
        answers = [self.answers[index] for index in range(len(self.jobs))]
        self._measure()
        known = [one.of(answer) for one, answer in zip(self._known(), answers, strict=True)]
        return JSONResponse(self.written.whole(answers, known, usage_of(answers, self.choices, len(self.suffix))))

    async def _watch(self) -> None:
        """Tells when the client goes away; the body has been read."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.events.put_nowait((0, Left()))

    async def _stream(self) -> AsyncIterator[bytes]:
        """Yields events: each choice's text as it grows, its end, and what it took when that is asked for."""
        shown, first, known = dict.fromkeys(range(len(self.jobs)), ""), True, self._known()
        try:
            if self.chat:
                for index in shown:
                    yield self.written.piece(index, None, first=True)
            while len(self.answers) < len(self.jobs):
                index, what = await self._next()
                if first:
                    self.decoder.metrics.first_text.observe(time.monotonic() - self.began)
                    first = False
                if isinstance(what, Part):
                    shown[index] += what.text
                    yield self.written.piece(index, what.text, logprobs=known[index].of(what, len(shown[index])))
                    continue
                if isinstance(what, RecordedStep):
                    yield self.written.piece(index, None, step=what.as_json(self.decoder.tokenizer))
                    continue
                assert isinstance(what, Generation)
                text = what.text or ""
                if not text.startswith(shown[index]):  # by a tokenizer whose later tokens change earlier text
                    raise ApiError("the text changed after it was sent: ask again, without stream", 500, "server_error")
                rest, own = text[len(shown[index]) :], known[index].of(what)
                if rest or own:
                    yield self.written.piece(index, rest, logprobs=own)
                more: dict[str, Any] = {"took": summary_of(what)} if self.wishes.steps else {}
                yield self.written.piece(index, None, what, **more)
            if self.wishes.stream_options is not None and self.wishes.stream_options.include_usage:
                answers = [self.answers[index] for index in shown]
                yield self.written.usage(usage_of(answers, self.choices, len(self.suffix)))
            self._measure()
            self.complete = True
            yield event("[DONE]")
        except ApiError as error:
            self.complete = True
            yield event(error.body())

    def _measure(self) -> None:
        self.decoder.metrics.latency.observe(time.monotonic() - self.began)


class EventStream(StreamingResponse):
    """Server-sent events; calls `end` when all are sent, or the client is gone."""

    def __init__(self, content: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()
