"""Tokenizer with the three kinds of token diffusion needs: mask, terminators and padding.

It wraps a Rust `tokenizers.Tokenizer`, which imports in a tenth of a second.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.text.special_text import Piece, Spans, SpecialText
from dllm_var.text.tokenizer_files import NAMED_TOKENS, read_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from dllm_var.text.chat_templates import ChatTemplate

_ENCODING = threading.Lock()  # whether a backend reads special tokens is a flag of the whole backend


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own.

    Args:
        mask_id: Stands for a token not yet known.
        terminator_ids: Tokens that end an answer; the first is the one appended to answers.
        pad_id: Fills what is left of a row; never supervised, and a segment of its own.
    """

    mask_id: int
    terminator_ids: tuple[int, ...]
    pad_id: int


class Tokenizer:
    """Text to token ids and back, knowing mask, terminators and padding.

    Args:
        backend: The Rust tokenizer.
        special: Ids of mask, terminators and padding.
        chat_template: Jinja source that turns a list of messages into text, if the model has one.
        named_tokens: What the chat template calls ``bos_token``, ``eos_token`` and so on.

    Raises:
        UserError: When an id is outside the vocabulary, mask and terminator are the same, or the chat template or a
            named token is no text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: SpecialTokens,
        chat_template: str | None = None,
        named_tokens: dict[str, str] | None = None,
    ) -> None:
        if not fits(chat_template, str | None):
            raise UserError(f"the tokenizer's chat template must be text, not {type(chat_template).__name__}")
        if not fits(named_tokens, dict[str, str] | None) or not set(named_tokens or {}) <= set(NAMED_TOKENS):
            raise UserError(f"the tokenizer's named tokens must be texts under {', '.join(NAMED_TOKENS)}")
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = special
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        ends = [("terminators", index) for index in special.terminator_ids]
        for setting, index in [("mask_token", special.mask_id), ("pad_token", special.pad_id), *ends]:
            if not fits(index, int) or not 0 <= index < self.vocab_size:
                raise UserError(f"{setting} has id {index}, outside the tokenizer's vocabulary of {self.vocab_size}")
        if special.mask_id in special.terminator_ids:
            raise UserError(f"mask_token and terminators are the same token {self.id_to_token(special.mask_id)}")

    @property
    def mask_id(self) -> int:
        """Stands for a token not yet known."""
        return self.special.mask_id

    @property
    def terminator_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.special.terminator_ids

    @property
    def terminator_id(self) -> int:
        """The terminator that is appended to answers."""
        return self.special.terminator_ids[0]

    @property
    def pad_id(self) -> int:
        """Fills what is left of a row."""
        return self.special.pad_id

    @cached_property
    def unknown_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot spell; None when it can spell everything."""
        name = getattr(self.backend.model, "unk_token", None)
        return None if name is None else self.backend.token_to_id(name)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens that text can spell: those marked as special, and the mask."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset({index for index, token in added.items() if token.special} | {self.mask_id})

    @cached_property
    def special_text(self) -> SpecialText:
        """Finds special tokens that people spell."""
        added = self.backend.get_added_tokens_decoder()
        normalized = any(added[index].normalized for index in self.special_ids if index in added)
        normalize = getattr(self.backend.normalizer, "normalize_str", None) if normalized else None
        names = {index: self.id_to_token(index) for index in self.special_ids}
        return SpecialText(names, self.unknown_id, lambda text: self.spans(text, True), normalize)

    @cached_property
    def _chat(self) -> ChatTemplate | None:
        if self.chat_template is None:
            return None
        from dllm_var.text.chat_templates import ChatTemplate  # imports Jinja

        return ChatTemplate(self.chat_template, self.named_tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("special_text", "_chat")}

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Token ids of a text, nothing added at either end.

        Args:
            text: What to encode.
            special_tokens: Whether a special token that the text spells becomes that token. By default it is text like
                any other, so that nobody who writes a prompt or an answer can end it or speak for somebody else.

        Raises:
            UserError: When the vocabulary can write a part of a text only as a special token.
        """
        ids = [index for index, _, _ in self.spans(text, special_tokens)]
        if not special_tokens:
            self.special_text.check(ids)
        return ids

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        """Token ids of many texts, in parallel.

        Args:
            texts: What to encode.
            special_tokens: Whether a special token that a text spells becomes that token; else see `SpecialText.check`.
        """
        with _ENCODING:
            self.backend.encode_special_tokens = not special_tokens
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def spans(self, text: str, special_tokens: bool = False) -> Spans:
        """Token ids of a text, each with where it begins and ends in the text; the arguments of `encode_batch`."""
        with _ENCODING:
            self.backend.encode_special_tokens = not special_tokens
            encoding = self.backend.encode(text, add_special_tokens=False)
        return [(index, *span) for index, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def id_to_token(self, index: int) -> str:
        """Name of one token; ids the vocabulary leaves free get a name too."""
        return self.backend.id_to_token(index) or f"<{index}>"

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation and which of them are supervised: the assistant's turns with their terminators.

        What follows the last answer's terminator is left out. A special token that a message spells is text like any
        other; only the template writes special tokens. Without a template turns simply follow each other.

        Args:
            messages: Turns with ``role`` and ``content``, the last one the assistant's.

        Raises:
            UserError: When the template refuses the messages, or they or the template's ends of answers do not fit.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        for piece in self.chat_pieces(messages):
            piece_ids = self.encode(piece.text, piece.special_tokens)
            if piece.supervised and self.chat_template is None:
                piece_ids.append(self.terminator_id)
            ids += piece_ids
            supervised += [piece.supervised] * len(piece_ids)
        return ids, supervised

    def chat_pieces(self, messages: Sequence[dict[str, Any]], refuse: bool = False) -> list[Piece]:
        """Texts that a conversation is encoded from, one by one; without a template answers lack their terminators.

        Raises:
            UserError: As `encode_chat`; with `refuse` also for a message that spells a special token.
        """
        if self._chat is None:
            return [Piece(message["content"], message["role"] == "assistant", refuse) for message in messages]
        terminators = [self.id_to_token(index) for index in self.terminator_ids]
        text, answers = self._chat.render_answers(self.special_text.mark(messages, refuse), terminators)
        pieces: list[Piece] = []
        done = 0
        for start, stop in answers:
            pieces += self.special_text.split(text[done:start], supervised=False)
            pieces += self.special_text.split(text[start:stop], supervised=True)
            done = stop
        return pieces

    def encode_chat_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's next turn begins; `messages` as in `encode_chat`."""
        if self._chat is None:
            return self.encode_chat(messages)[0]
        return self.encode_rendered(self.render(self.special_text.mark(messages), add_generation_prompt=True))

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Text of messages that `special_text` has marked; `add_generation_prompt` as transformers has it.

        Raises:
            UserError: When there is no chat template, or it refuses the messages.
        """
        if self._chat is None:
            raise UserError("the tokenizer has no chat template")
        return self._chat.render(messages, add_generation_prompt)[0]

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a text that `render` has made."""
        pieces = self.special_text.split(text, supervised=False)
        return [index for piece in pieces for index in self.encode(piece.text, piece.special_tokens)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text gets."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as strings, integers, lists and dicts, fit for a checkpoint."""
        return {
            "tokenizer_json": self.backend.to_str(),
            "mask_id": self.mask_id,
            "terminator_ids": list(self.terminator_ids),
            "pad_id": self.pad_id,
            "chat_template": self.chat_template,
            "named_tokens": self.named_tokens,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Tokenizer:
        """Builds again what `to_dict` took apart."""
        special = SpecialTokens(state["mask_id"], tuple(state["terminator_ids"]), state["pad_id"])
        backend = tokenizers.Tokenizer.from_str(state["tokenizer_json"])
        return cls(backend, special, state.get("chat_template"), state.get("named_tokens"))

    def save(self, folder: str | Path) -> None:
        """Writes a folder that Hugging Face libraries and `from_pretrained` read; makes it if it is not there."""
        ends = [self.id_to_token(index) for index in self.terminator_ids]
        special = {"mask_token": self.id_to_token(self.mask_id), "pad_token": self.id_to_token(self.pad_id)}
        write_tokenizer(
            Path(folder),
            self.backend,
            {**self.named_tokens, **special, "eos_token": ends[0], "terminators": ends},
            self.chat_template,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        mask_token: str | None = None,
        terminators: Sequence[str] | None = None,
        pad_token: str | None = None,
    ) -> Tokenizer:
        """Loads a tokenizer from a folder, or from the Hugging Face hub by name.

        What is not given is looked up in its files. A tokenizer that names no mask token gets one: `mask_token`, which
        may be a token it has no other use for, or a new one.

        Args:
            path_or_name: Folder with ``tokenizer.json``, or a hub name such as ``GSAI-ML/LLaDA-8B-Base``.
            mask_token: Token that stands for the unknown.
            terminators: Tokens that end an answer, the one to append first.
            pad_token: Token that fills rows.

        Raises:
            UserError: When there is no tokenizer, or a token is neither known nor given, or not in the vocabulary.
        """
        backend, special, chat_template, named = read_tokenizer(path_or_name, mask_token, terminators, pad_token)
        return cls(backend, SpecialTokens(*special), chat_template, named)
