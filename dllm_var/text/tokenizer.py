"""Tokenizer with the three kinds of token diffusion needs: mask, terminators and padding.

Wraps a Rust `tokenizers.Tokenizer`, which imports in a tenth of a second; transformers is imported only to convert
tokenizers that have no ``tokenizer.json``.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from dllm_var.checkpoints.plain import fits, read_object, read_text
from dllm_var.errors import UserError
from dllm_var.text.hub import TOKENIZER_FILES, download, is_hub_name

ADDED_MASK = "<|mask|>"  # what a tokenizer without a mask token gets
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
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
        settings = {
            "mask_token": [special.mask_id],
            "pad_token": [special.pad_id],
            "terminators": special.terminator_ids,
        }
        for setting, indices in settings.items():
            for index in indices:
                if not fits(index, int) or not 0 <= index < self.vocab_size:
                    raise UserError(
                        f"{setting} has id {index}, outside the tokenizer's vocabulary of {self.vocab_size}"
                    )
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
            self.check_text(ids)
        return ids

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        """Token ids of many texts, in parallel.

        Args:
            texts: What to encode.
            special_tokens: Whether a special token that a text spells becomes that token; else see `check_text`.
        """
        with _ENCODING:
            self.backend.encode_special_tokens = not special_tokens
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def spans(self, text: str, special_tokens: bool = False) -> list[tuple[int, int, int]]:
        """Token ids of a text, each with where it begins and ends in the text; the arguments of `encode_batch`."""
        with _ENCODING:
            self.backend.encode_special_tokens = not special_tokens
            encoding = self.backend.encode(text, add_special_tokens=False)
        return [(index, *span) for index, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def check_text(self, ids: Sequence[int]) -> None:
        """Refuses token ids of text that hold a special token; the one for unknown text may be among them.

        Raises:
            UserError: Names the special token.
        """
        if not self.special_ids.isdisjoint(ids):
            found = next((index for index in ids if index in self.special_ids and index != self.unknown_id), None)
            if found is not None:
                raise UserError(f"spells the special token {self.id_to_token(found)}, which is kept for its own use")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def id_to_token(self, index: int) -> str:
        """Name of one token; ids the vocabulary leaves free get a name too."""
        return self.backend.id_to_token(index) or f"<{index}>"

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation and which of them are supervised: see `chat_templates.encode_chat`."""
        from dllm_var.text.chat_templates import encode_chat

        return encode_chat(self, messages)

    def encode_chat_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's next turn begins."""
        from dllm_var.text.chat_templates import encode_chat_prompt

        return encode_chat_prompt(self, messages)

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
        """Writes the files that Hugging Face libraries and `from_pretrained` read.

        Args:
            folder: Created if missing; gets ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.named_tokens,
            "mask_token": self.id_to_token(self.mask_id),
            "eos_token": self.id_to_token(self.terminator_id),
            "pad_token": self.id_to_token(self.pad_id),
            "terminators": [self.id_to_token(index) for index in self.terminator_ids],
            "clean_up_tokenization_spaces": False,
        }
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

        What is not given is looked up: the mask token in ``tokenizer_config.json`` or as ``mask_token_id`` of
        ``config.json``; the terminators as ``terminators`` or ``eos_token`` of the former and ``eos_token_id`` of
        ``generation_config.json`` and ``config.json``; padding as ``pad_token``, else the first terminator. A tokenizer
        that names no mask token gets one: `mask_token`, which may be a token it has no other use for, or a new one.

        Args:
            path_or_name: Folder with ``tokenizer.json``, or a hub name such as ``GSAI-ML/LLaDA-8B-Base``.
            mask_token: Token that stands for the unknown.
            terminators: Tokens that end an answer, the one to append first.
            pad_token: Token that fills rows.

        Raises:
            UserError: When there is no tokenizer, or a token is neither known nor given, or not in the vocabulary.
        """
        folder = _find_folder(path_or_name)
        backend = _load_backend(folder, path_or_name)
        config = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json")
        named = {name: token for name in NAMED_TOKENS if (token := _token_text(config.get(name))) is not None}

        def to_id(token: Any, setting: str) -> int:
            index = backend.token_to_id(token) if isinstance(token, str) else None
            if index is None:
                raise UserError(f"{setting} {token!r} is not in the vocabulary of {path_or_name}; name a token that is")
            return index

        def known(*candidates: str | int | list[int] | None) -> list[int]:
            ids: list[int] = []
            for candidate in candidates:
                if not fits(candidate, str | int | list[int] | None):
                    raise UserError(f"{path_or_name} names a token by {candidate!r}: give its text or its id")
                index = backend.token_to_id(candidate) if isinstance(candidate, str) else candidate
                ids += index if isinstance(index, list) else [] if index is None else [index]
            return list(dict.fromkeys(ids))

        masks = known(named.get("mask_token"), model.get("mask_token_id"))
        if not masks:
            mask_token = mask_token or named.get("mask_token") or ADDED_MASK
            backend.add_special_tokens([tokenizers.AddedToken(mask_token, special=True, normalized=False)])
        if mask_token:
            masks = [to_id(mask_token, "mask_token")]
        if len(masks) > 1:
            raise UserError(
                f"{path_or_name} has the mask token {named['mask_token']!r}, id {masks[0]}, and its config.json has "
                f"mask_token_id {masks[1]}: correct the wrong one, or name the token with mask_token"
            )
        given = terminators or config.get("terminators")
        given = given if isinstance(given, list | tuple | None) else [given]
        ends = (
            list(dict.fromkeys(to_id(token, "terminators") for token in given))
            if given
            else known(named.get("eos_token"), generation.get("eos_token_id"), model.get("eos_token_id"))
        )
        if not ends:
            raise UserError(f"{path_or_name} has no end-of-sequence token; name one or more with terminators")
        pads = [to_id(pad_token, "pad_token")] if pad_token else known(named.get("pad_token"), ends[0])
        return cls(backend, SpecialTokens(masks[0], tuple(ends), pads[0]), _read_chat_template(folder, config), named)


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _find_folder(path_or_name: str | Path) -> Path:
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(path_or_name):
        raise UserError(f"tokenizer folder {path_or_name} does not exist")
    return download(str(path_or_name), "tokenizer", TOKENIZER_FILES)


# Classes that come as code with a checkpoint, and the class of transformers that they are a copy of.
_SAME_AS = {"DreamTokenizer": "Qwen2TokenizerFast"}


def _load_backend(folder: Path, name: str | Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the Rust side raises a bare Exception
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {_first_line(error)}") from None
    config = _read_json(folder / "tokenizer_config.json")
    kind = _SAME_AS.get(str(config.get("tokenizer_class")))
    decides = config if "tokenizer_class" in config else {**_read_json(folder / "config.json"), **config}
    if kind is None and decides.get("auto_map"):
        raise UserError(
            f"the tokenizer of {name} is code of its own (auto_map), which is never run: give a folder with a "
            "tokenizer.json"
        )
    try:  # older formats (vocab.json and merges.txt, sentencepiece) are converted there
        import transformers

        # Left unset, transformers asks on standard input whether to run the folder's code.
        loader = getattr(transformers, kind or "AutoTokenizer")
        backend = loader.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
    except Exception as error:
        raise UserError(f"no tokenizer.json in {name}, and it cannot be converted: {_first_line(error)}") from None
    return backend


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template: Any = config.get("chat_template")
    if fits(template, list[dict[str, str]]):  # several, each with a name
        return next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template
