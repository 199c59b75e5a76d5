"""Tokenizer with the three kinds of token diffusion needs: mask, terminators and padding.

Wraps a Rust `tokenizers.Tokenizer`, which imports in a tenth of a second; transformers is imported only for what needs it
(a name on the Hugging Face hub, a chat template).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from dllm_var.errors import UserError


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own.

    Args:
        mask_id: stands for a token not yet known.
        terminator_ids: tokens that end an answer; the first is the one appended to answers.
        pad_id: fills what is left of a row; never attended to, never supervised.
    """

    mask_id: int
    terminator_ids: tuple[int, ...]
    pad_id: int


class Tokenizer:
    """Text to token ids and back, knowing mask, terminators and padding.

    Args:
        backend: the Rust tokenizer.
        special: ids of mask, terminators and padding.
        chat_template: Jinja source that turns a list of messages into text, if the model has one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = special
        self.chat_template = chat_template
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        for name, index in _named_ids(special):
            if not 0 <= index < self.vocab_size:
                raise UserError(f"{name} {index} is outside the tokenizer's vocabulary of {self.vocab_size}")
        if special.mask_id in special.terminator_ids:
            raise UserError(f"mask_token and terminators are the same token {self.id_to_token(special.mask_id)!r}")

    @property
    def mask_id(self) -> int:
        return self.special.mask_id

    @property
    def terminator_ids(self) -> tuple[int, ...]:
        return self.special.terminator_ids

    @property
    def terminator_id(self) -> int:
        """The terminator that is appended to answers."""
        return self.special.terminator_ids[0]

    @property
    def pad_id(self) -> int:
        return self.special.pad_id

    @cached_property
    def unknown_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot spell; None when it can spell everything."""
        name = getattr(self.backend.model, "unk_token", None)
        return None if name is None else self.backend.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added at either end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, in parallel."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def id_to_token(self, index: int) -> str:
        """Name of one token; ids the vocabulary leaves free get a name too."""
        return self.backend.id_to_token(index) or f"<{index}>"

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation and which of them are supervised: the assistant's turns with their terminators.

        Args:
            messages: turns with ``role`` and ``content``.

        Raises:
            UserError: the template ends the assistant's turns with something that is no terminator.
        """
        from dllm_var.chat_templates import encode_chat

        return encode_chat(self, messages)

    def encode_chat_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's next turn begins."""
        from dllm_var.chat_templates import encode_chat_prompt

        return encode_chat_prompt(self, messages)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text gets."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as strings, integers and lists, fit for a checkpoint."""
        return {
            "tokenizer_json": self.backend.to_str(),
            "mask_id": self.mask_id,
            "terminator_ids": list(self.terminator_ids),
            "pad_id": self.pad_id,
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Tokenizer:
        """Builds again what `to_dict` took apart."""
        special = SpecialTokens(state["mask_id"], tuple(state["terminator_ids"]), state["pad_id"])
        return cls(tokenizers.Tokenizer.from_str(state["tokenizer_json"]), special, state["chat_template"])

    def save(self, folder: str | Path) -> None:
        """Writes the files Hugging Face libraries (and `from_pretrained`) read.

        Args:
            folder: created if missing; gets ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "mask_token": self.id_to_token(self.mask_id),
            "eos_token": self.id_to_token(self.terminator_id),
            "pad_token": self.id_to_token(self.pad_id),
            "terminators": [self.id_to_token(index) for index in self.terminator_ids],
            "clean_up_tokenization_spaces": False,
        }
        if self.unknown_id is not None:
            config["unk_token"] = self.id_to_token(self.unknown_id)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        mask_token: str | None = None,
        terminators: Sequence[str] | None = None,
        pad_token: str | None = None,
    ) -> Tokenizer:
        """Loads a tokenizer from a folder, or from the Hugging Face hub by name.

        What is not given is looked up in the folder: the mask token in ``tokenizer_config.json`` or as ``mask_token_id`` of
        ``config.json``; the terminators as ``terminators`` or ``eos_token`` there and ``eos_token_id`` of
        ``generation_config.json`` and ``config.json``; padding as ``pad_token``, else the terminator.

        Args:
            path_or_name: folder with ``tokenizer.json``, or a hub name such as ``GSAI-ML/LLaDA-8B-Base``.
            mask_token: token that stands for the unknown; must be in the vocabulary.
            terminators: tokens that end an answer, the one to append first.
            pad_token: token that fills rows.

        Raises:
            UserError: no tokenizer there, no mask token or terminator known, or one that is not in the vocabulary.
        """
        folder = _find_folder(path_or_name)
        backend = _load_backend(folder, path_or_name)
        config = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")

        def to_id(token: str, setting: str) -> int:
            index = backend.token_to_id(token)
            if index is None:
                raise UserError(f"{setting} {token!r} is not in the vocabulary of {path_or_name}; name a token that is")
            return index

        def configured(name: str) -> int | None:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            return None if token is None else backend.token_to_id(token)

        mask_id = to_id(mask_token, "mask_token") if mask_token else _first(configured("mask_token"), model.get("mask_token_id"))
        if mask_id is None:
            raise UserError(f"{path_or_name} has no mask token; name a token of its vocabulary with mask_token")
        if terminators or config.get("terminators"):
            ends = [to_id(token, "terminators") for token in terminators or config["terminators"]]
        else:
            generation = _read_json(folder / "generation_config.json")
            candidates = [configured("eos_token"), *_as_list(generation.get("eos_token_id")), *_as_list(model.get("eos_token_id"))]
            ends = [index for index in candidates if index is not None]
        if not ends:
            raise UserError(f"{path_or_name} has no end-of-sequence token; name one or more with terminators")
        pad_id = to_id(pad_token, "pad_token") if pad_token else _first(configured("pad_token"), ends[0])
        special = SpecialTokens(mask_id, tuple(dict.fromkeys(ends)), pad_id)
        return cls(backend, special, _read_chat_template(folder, config))


def _named_ids(special: SpecialTokens) -> list[tuple[str, int]]:
    return [
        ("mask_token", special.mask_id),
        ("pad_token", special.pad_id),
        *(("terminators", index) for index in special.terminator_ids),
    ]


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _find_folder(path_or_name: str | Path) -> Path:
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    looks_local = isinstance(path_or_name, Path) or str(path_or_name).startswith((".", "/", "~")) or str(path_or_name).count("/") > 1
    if looks_local:
        raise UserError(f"tokenizer folder {path_or_name} does not exist")
    from huggingface_hub import snapshot_download

    patterns = ["tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*config.json", "*.model"]
    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=patterns))
    except Exception as error:  # offline, not found, gated: the hub has many ways to say no
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer {path_or_name} is no folder and cannot be had from the hub: {reason}") from None


def _load_backend(folder: Path, name: str | Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the Rust side raises a bare Exception
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    from transformers import AutoTokenizer

    try:  # older formats (vocab.json and merges.txt, sentencepiece) are converted there
        loaded = AutoTokenizer.from_pretrained(str(folder), use_fast=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no tokenizer.json in {name}, and it cannot be converted: {reason}") from None
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise UserError(f"{name} has no fast tokenizer; save one with a tokenizer.json")
    return loaded.backend_tokenizer


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
