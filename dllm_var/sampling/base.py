"""The contract of samplers: prompts in, answers out, with stop strings, streaming and checks around every sampler."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.sampling.stopping import StopStrings

if TYPE_CHECKING:
    from dllm_var.model.config import TransformerConfig
    from dllm_var.model.transformer import Transformer
    from dllm_var.text.tokenizer import Tokenizer

OnBlock = Callable[[int, list[int]], None]
OnAnswer = Callable[[int, "Generation"], None]


@dataclass
class Request:
    """What the caller of `generate` asks of every prompt, and the way of tokens and answers back to the caller.

    Args:
        max_new_tokens: Longest answer, instead of the sampler's own limit.
        suppressed: Token ids that are never produced; the mask token never is.
        tokenizer: The model's, when known; a second model must have the same.
        stop: Finds the texts that end an answer.
        tell_block: The caller's `on_block`.
        tell_answer: The caller's `on_answer`.
        check: Raises when the model's predictions were not numbers.
    """

    max_new_tokens: int | None = None
    suppressed: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None
    stop: StopStrings | None = None
    tell_block: OnBlock | None = None
    tell_answer: OnAnswer | None = None
    check: Callable[[], None] = lambda: None
    _told: set[int] = field(init=False, default_factory=set)  # prompts whose answer the caller has

    @property
    def on_block(self) -> OnBlock | None:
        """Tells the caller (prompt index, the answer's tokens so far) as a row gets further; None when nobody asks."""
        return None if self.tell_block is None else self._on_block

    def _on_block(self, index: int, tokens: list[int]) -> None:
        assert self.tell_block is not None
        self.check()
        cut = self.stop.cut(tokens) if self.stop is not None and self.stop.found(index, tokens) else None
        self.tell_block(index, tokens if cut is None else tokens[: cut[0]])

    def stopped(self, index: int, tokens: list[int]) -> bool:
        """Says whether a stop string is in an answer's finished tokens, so that no more need be decoded."""
        return self.stop is not None and self.stop.found(index, tokens)

    def finished(self, index: int, answer: Generation) -> None:
        """Cuts a complete answer at its stop string, adds its text, and tells the caller; once for each prompt."""
        if index in self._told:
            return
        self.check()
        self._told.add(index)
        cut = None if self.stop is None else self.stop.cut(answer.tokens)
        if cut is not None:
            kept, answer.text = cut
            answer.tokens, answer.finish_reason = answer.tokens[:kept], "stop"
            answer.commit_steps = None if answer.commit_steps is None else answer.commit_steps[:kept]
        elif self.tokenizer is not None:
            answer.text = self.tokenizer.decode(answer.tokens)
        if self.tell_answer is not None:
            self.tell_answer(index, answer)


@dataclass
class Generation:
    """One prompt's answer.

    Args:
        tokens: Token ids of the answer, up to and excluding the terminator.
        finish_reason: `eos` when the model ended the answer, `length` when the limit did, `stop` for a stop string.
        nfe: Forward passes of the model that this row took part in, the prefill included.
        seconds: Wall time from the row's admission to its end.
        prompt_length: Tokens of the prompt.
        text: The answer decoded, when a tokenizer was given.
        commit_steps: For each token the forward pass, counted from 1, that committed it.
        auxiliary_nfe: Forward passes of a sampler's second model that this row took part in.
    """

    tokens: list[int]
    finish_reason: str
    nfe: int
    seconds: float
    prompt_length: int
    text: str | None = None
    commit_steps: list[int] | None = None
    auxiliary_nfe: int = 0

    @property
    def new_tokens(self) -> int:
        """How many tokens were decoded."""
        return len(self.tokens)

    def as_json(self, prompt: str, **more: Any) -> str:
        """Returns the answer, its prompt's text and `more` entries as a line of JSON, for `generate --json`."""
        line = {
            "prompt": prompt,
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_length,
            "finish_reason": self.finish_reason,
            "nfe": self.nfe,
            "tokens_per_forward": round(self.new_tokens / max(self.nfe, 1), 4),
            "seconds": round(self.seconds, 6),
        }
        shown = {*line, "prompt_length"}
        others = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in shown}
        return json.dumps({**line, **others, **more}, ensure_ascii=False)


class Sampler(ABC):
    """Turns prompts into answers with a model; a new sampler is a subclass named by `class_path` in a config."""

    @abstractmethod
    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        """Decodes token-id prompts with a transformer in eval mode; the one method a sampler must have."""

    def generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        *,
        tokenizer: Tokenizer | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        suppress: Sequence[int] = (),
        on_block: OnBlock | None = None,
        on_answer: OnAnswer | None = None,
    ) -> list[Generation]:
        """Decodes prompts to their own ends and returns the answers in the prompts' order.

        Args:
            model: A `Transformer`, or a module that holds one as `.transformer` (a `DiffusionLM`).
            prompts: Token ids or, with a tokenizer, texts.
            tokenizer: Encodes text prompts and decodes the answers.
            max_new_tokens: Overrides the sampler's limit.
            stop: Texts that an answer ends before; needs a tokenizer.
            suppress: Token ids that are never produced. Without a terminator an answer runs into its limit.
            on_block: Called with (prompt index, the answer's tokens so far) each time a row gets further. A later call
                may have fewer tokens: those that turn out to begin a stop string are taken back.
            on_answer: Called with (prompt index, answer) once for each prompt, as soon as the answer is complete.

        Raises:
            UserError: When a prompt is empty or holds ids outside the vocabulary, text or stop strings come without a
                tokenizer, or no token is left to produce; `NotFinite` when the model's logits are NaN or infinite.
        """
        transformer = getattr(model, "transformer", model)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        ids = [encode_prompt(index, prompt, tokenizer, transformer.config) for index, prompt in enumerate(prompts)]
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        check_suppressed(suppress, transformer.config)
        strings = None
        if stop:
            if tokenizer is None:
                raise UserError("stop strings need a tokenizer: pass generate(..., tokenizer=...)")
            strings = StopStrings([stop] if isinstance(stop, str) else stop, tokenizer)
        was_training = transformer.training
        if was_training:  # visiting every module takes a noticeable part of a short answer's time
            transformer.eval()
        try:
            with torch.inference_mode(), without_training_modes(transformer), finite_logits(transformer) as check:
                request = Request(max_new_tokens, tuple(suppress), tokenizer, strings, on_block, on_answer, check)
                answers = self.decode(transformer, ids, request)
                for index, answer in enumerate(answers):
                    request.finished(index, answer)
        finally:
            if was_training:
                transformer.train()
        return answers


@contextmanager
def without_training_modes(transformer: Transformer) -> Iterator[None]:
    """Switches off mixed precision and compiled blocks, where they are on: both are for training only.

    Decoding runs in the type of the weights, which is also the cache's; compiled blocks would be compiled again for
    every shape that decoding meets.
    """
    device_type = transformer.embedding.weight.device.type
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if transformer.compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class NotFinite(UserError):
    """A model's logits were NaN or infinite, so that there is no most likely token."""


@contextmanager
def finite_logits(model: Transformer) -> Iterator[Callable[[], None]]:
    """Watches the output head of a model while any sampler decodes with it.

    Yields:
        A function that raises `NotFinite` when a logit so far was NaN or infinite. It waits for the device, so it is
        called only when an answer is told; each forward leaves one number on the device.
    """
    largest: list[Tensor] = []

    def watch(head: Any, inputs: Any, logits: Tensor) -> None:
        if logits.numel():
            largest.append(logits.aminmax().max)  # NaN when any is; amax is slower in 16 bits
        if len(largest) > 1:
            largest[:] = [torch.maximum(*largest)]

    def check() -> None:
        if largest and not largest[0].isfinite():
            raise NotFinite(
                "the model's predictions are not numbers (NaN or infinite): its training diverged, or its numbers are "
                "too large for its type; take an earlier checkpoint, or weights in bfloat16 or float32"
            )

    handle = model.lm_head.register_forward_hook(watch)
    try:
        yield check
    finally:
        handle.remove()


def check_suppressed(suppress: Sequence[int], config: TransformerConfig) -> None:
    """Raises UserError for an id outside the vocabulary, or when no token is left."""
    assert config.vocab_size is not None
    wrong = next((token for token in suppress if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise UserError(f"suppress has token id {wrong}, outside the vocabulary of {config.vocab_size}")
    if len({*suppress, config.mask_id} - {None}) >= config.vocab_size:
        raise UserError("suppress names every token: leave at least one that can be produced")


def encode_prompt(
    index: int, prompt: Sequence[Any] | str, tokenizer: Tokenizer | None, config: TransformerConfig
) -> list[int]:
    """Returns the token ids of one prompt; raises UserError for an empty prompt and for ids outside the vocabulary."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("text prompts need a tokenizer: pass generate(..., tokenizer=...), or pass token ids")
        ids = tokenizer.encode(prompt)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise UserError(f"prompt {index} is empty: give at least one token")
    vocab_size = config.vocab_size
    assert vocab_size is not None
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise UserError(f"prompt {index} has token id {wrong}, outside the vocabulary of {vocab_size}")
    return ids


def special_ids(model: Transformer) -> tuple[int, tuple[int, ...]]:
    """Returns the model's mask id and terminator ids; raises UserError when its config lacks either."""
    config = model.config
    if config.mask_id is None or not config.terminator_ids:
        raise UserError("the model's config has no mask_id or terminator_ids: set both to decode by diffusion")
    return config.mask_id, tuple(config.terminator_ids)
