"""What every sampler takes and gives."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dllm_var.errors import UserError

if TYPE_CHECKING:
    from dllm_var.model.config import TransformerConfig
    from dllm_var.model.transformer import Transformer
    from dllm_var.tokenization import Tokenizer

OnBlock = Callable[[int, list[int]], None]
FindStop = Callable[[list[int]], "int | None"]


@dataclass(frozen=True)
class Request:
    """What the caller of `generate` asks of every prompt, beside the sampler's own settings.

    Args:
        max_new_tokens: Longest answer, instead of the sampler's own limit.
        on_block: Called with (prompt index, the answer's tokens so far) each time a row gets further.
        suppressed: Token ids that are never produced; the mask token never is.
        find_stop: Says how many of an answer's finished tokens stay when a stop string is in them, null when none is.
    """

    max_new_tokens: int | None = None
    on_block: OnBlock | None = None
    suppressed: tuple[int, ...] = ()
    find_stop: FindStop | None = None


@dataclass
class Generation:
    """One prompt's answer.

    Args:
        tokens: Token ids of the answer, up to and excluding the terminator.
        finish_reason: `eos` when the model ended the answer, `length` when the limit did.
        nfe: Forward passes this row took part in, the prefill included.
        seconds: Wall time from the row's admission to its end.
        prompt_length: Tokens of the prompt.
        text: The answer decoded, when a tokenizer was given.
        commit_steps: For each token the forward pass, counted from 1, that committed it.
    """

    tokens: list[int]
    finish_reason: str
    nfe: int
    seconds: float
    prompt_length: int
    text: str | None = None
    commit_steps: list[int] | None = None

    def as_json(self, prompt: str) -> str:
        """Returns the answer and its prompt's text as one line of JSON, as `generate --json` and `predict` write it."""
        fields = {
            "prompt": prompt,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "nfe": self.nfe,
            "seconds": round(self.seconds, 6),
        }
        return json.dumps(fields, ensure_ascii=False)


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
        on_block: OnBlock | None = None,
    ) -> list[Generation]:
        """Decodes prompts, in order, each to its own end.

        Args:
            model: A `Transformer`, or a module that holds one as `.transformer` (a `DiffusionLM`).
            prompts: Token ids or, with a tokenizer, texts.
            tokenizer: Encodes text prompts and decodes the answers.
            max_new_tokens: Overrides the sampler's limit.
            on_block: Called with (prompt index, the answer's tokens so far) each time a row gets further.

        Raises:
            UserError: When a prompt is empty or holds ids outside the vocabulary, or text comes without a tokenizer.
        """
        transformer = getattr(model, "transformer", model)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        ids = [encode_prompt(index, prompt, tokenizer, transformer.config) for index, prompt in enumerate(prompts)]
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        was_training = transformer.training
        transformer.eval()
        try:
            # Blocks compiled for training would be compiled again for every shape that decoding meets.
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
                answers = self.decode(transformer, ids, Request(max_new_tokens, on_block))
        finally:
            transformer.train(was_training)
        if tokenizer is not None:
            for answer in answers:
                answer.text = tokenizer.decode(answer.tokens)
        return answers


def encode_prompt(
    index: int, prompt: Sequence[Any] | str, tokenizer: Tokenizer | None, config: TransformerConfig
) -> list[int]:
    """Returns the token ids of one prompt; raises UserError for what cannot be decoded from."""
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


def check_at_least_one(**settings: int | None) -> None:
    """Raises UserError for a sampler's setting below 1; null is left to the sampler."""
    for name, value in settings.items():
        if value is not None and value < 1:
            raise UserError(f"sampler.{name} must be at least 1, got {value}")


def special_ids(model: Transformer) -> tuple[int, tuple[int, ...]]:
    """Returns the model's mask id and terminator ids, or says what is missing."""
    config = model.config
    if config.mask_id is None or not config.terminator_ids:
        raise UserError("the model's config has no mask_id or terminator_ids: set both to decode by diffusion")
    return config.mask_id, tuple(config.terminator_ids)
