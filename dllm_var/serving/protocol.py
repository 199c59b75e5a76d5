"""The protocol of OpenAI's API: requests as they are checked, replies as they are written."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dllm_var.sampling.base import Generation
from dllm_var.serving.jobs import Part
from dllm_var.text.tokenizer import Tokenizer

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
NEUTRAL: dict[str, Any] = {  # values that ask for nothing
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "modalities": ["text"],
}
MOST_CHOICES, MOST_STOPS, LONGEST_STOP = 128, 16, 1_000
SEED = 1 << 63


class ApiError(Exception):
    """A request that gets an error as its reply."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind = message, status, kind
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> str:
        """Returns the error in OpenAI's form, as ASCII: what it quotes may not be valid Unicode."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})


def own_alone(value: int | None) -> int | None:
    if value:
        raise ValueError("this server tells how likely an answer's own tokens were, not others: set it to 0")
    return value


OwnAlone = Annotated[int | None, AfterValidator(own_alone)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Wishes(BaseModel):
    """What requests of both kinds have in common."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-SEED, lt=SEED)
    stop: str | list[str] | None = None
    logprobs: int | bool | None = None  # the legacy API has a number of other tokens here
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sampler: str | None = None  # not in OpenAI's API: one of those that the server has
    steps: bool | None = None  # nor is this: whether a stream tells what each forward does

    @model_validator(mode="after")
    def check(self) -> Wishes:
        for name, value in (self.model_extra or {}).items():
            asks = value is not None and value is not False and value not in ([], {}, "")
            if asks and name not in IGNORED and not (name in NEUTRAL and value == NEUTRAL[name]):
                raise ValueError(f"this server does not support '{name}': leave it out")
        if self.steps and not self.stream:
            raise ValueError("'steps' goes with 'stream': set both, or leave it out")
        stops = self.stops
        if len(stops) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in stops):
            raise ValueError(f"'stop' takes at most {MOST_STOPS} texts of 1 to {LONGEST_STOP:,} characters")
        return self

    @property
    def log_probabilities(self) -> bool:
        """Whether those of the answers' tokens are wanted."""
        return self.logprobs is not None and self.logprobs is not False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionWishes(Wishes):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    logprobs: OwnAlone = None

    @model_validator(mode="after")
    def check_suffix(self) -> CompletionWishes:
        if self.suffix and self.max_tokens is None:
            raise ValueError("with 'suffix', 'max_tokens' is how many tokens stand before it: give it, too")
        if self.suffix and self.stops:
            raise ValueError("'suffix' does not go with 'stop': leave out one of them")
        return self

    @property
    def prompts(self) -> list[Any]:
        """The prompts, texts or token ids."""
        one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if one else list(self.prompt)


class TextPart(BaseModel):
    type: str
    text: str = ""


class Message(BaseModel):
    role: str
    content: str | list[TextPart]

    @model_validator(mode="after")
    def check(self) -> Message:
        if isinstance(self.content, list) and any(part.type != "text" for part in self.content):
            raise ValueError("this server reads text alone: leave out images, sounds and files")
        return self

    def turn(self) -> dict[str, str]:
        """Returns the message as a chat template reads it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatWishes(Wishes):
    """The body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: OwnAlone = None


class LogProbabilities:
    """Writes the log-probabilities of one choice's tokens in OpenAI's form, in a stream each with its token's text."""

    def __init__(self, tokenizer: Tokenizer, chat: bool, wanted: bool) -> None:
        self.tokenizer, self.chat, self.wanted = tokenizer, chat, wanted
        self.told = self.offset = 0  # tokens that the client has, and characters of their text

    def of(self, answer: Part | Generation, length: float = math.inf) -> dict[str, Any] | None:
        """Returns those of the tokens that were not told yet and whose text ends in the first `length` characters.

        None when they are not wanted.
        """
        if not self.wanted or answer.log_probabilities is None:
            return None
        texts, offsets = [], []
        for text in self.tokenizer.token_texts(answer.tokens, self.told):
            if self.offset + len(text) > length:
                break
            texts.append(text)
            offsets.append(self.offset)
            self.offset += len(text)
        values = answer.log_probabilities[self.told : self.told + len(texts)]
        self.told += len(texts)
        if not self.chat:
            return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
        entries = zip(texts, values, strict=True)
        content = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in entries
        ]
        return {"content": content, "refusal": None}


class Reply:
    """Writes the answers of one request in OpenAI's form."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + f"{random.getrandbits(128):032x}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, answers: Sequence[Generation], logprobs: Sequence[dict[str, Any] | None], usage: dict[str, int]
    ) -> dict[str, Any]:
        """Returns the reply that is not streamed."""
        choices = []
        for index, (answer, known) in enumerate(zip(answers, logprobs, strict=True)):
            text = answer.text or ""
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": known, "finish_reason": finish_reason(answer)})
        return {**self.head, "choices": choices, "usage": usage}

    def piece(
        self, index: int, text: str | None, answer: Generation | None = None, first: bool = False, **more: Any
    ) -> bytes:
        """Returns an event with a piece of one choice's text, and `more` about the choice.

        The last one says why the answer ended.
        """
        role = {"role": "assistant"} if first else {}
        delta = role if text is None else {**role, "content": text}
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": text or ""}
        about = {"logprobs": None, "finish_reason": None if answer is None else finish_reason(answer), **more}
        return self._event([{"index": index, **said, **about}])

    def usage(self, usage: dict[str, int]) -> bytes:
        """Returns the event behind the last piece."""
        return self._event([], usage=usage)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(json.dumps({**self.head, "object": kind, "choices": choices, **more}))


def event(data: str) -> bytes:
    """Returns a server-sent event."""
    return f"data: {data}\n\n".encode()


def finish_reason(answer: Generation) -> str:
    return "length" if answer.finish_reason in ("length", "filled") else "stop"


def usage_of(answers: Sequence[Generation], choices: int, suffix: int = 0) -> dict[str, int]:
    """Returns what answers took; a prompt with several `choices` counts once, and so do the tokens of its `suffix`."""
    prompt = sum(answer.prompt_length + suffix for answer in answers[::choices])
    completion = sum(answer.new_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "forwards": sum(answer.nfe for answer in answers),
    }
