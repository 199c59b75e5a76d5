"""Tokenizer with the three kinds of token that diffusion needs: mask, terminators and padding.

It wraps a Rust `tokenizers.Tokenizer`, which imports in a tenth of a second. Text of people never becomes a special
token. A chat template puts messages and its own markers into one text; `Tokenizer.mark` therefore breaks up the special
tokens that a message spells before the template sees it, so that only the template's markers are read as such.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers

from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.text.tokenizer_files import MASKS, find_folder, load_backend, read_chat_template, read_if_there

if TYPE_CHECKING:
    from dllm_var.text.chat_templates import ChatTemplate

ROLES = ("system", "user", "assistant", "tool")  # that a message may have
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")  # that a chat template may ask for
ADDED_MASK = "<|mask|>"  # what a tokenizer without a mask token gets
TRAIN_TOKENIZER = "`python -m dllm_var tokenizer --data FILE.jsonl --vocab-size N --output DIR`"  # for messages
MARK = "\ufdd0"  # put behind each letter of what spells a special token; Unicode keeps it for internal use
_CONTEXT = 16  # tokens before one that its text may depend on
_ENCODING = threading.Lock()  # whether a backend reads special tokens is a flag of the whole backend


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own."""

    mask_id: int  # stands for a token not yet known
    terminator_ids: tuple[int, ...]  # end an answer; the first is appended to answers
    pad_id: int  # fills what is left of a row; never supervised, and a segment of its own


class Piece(NamedTuple):
    """A text that is encoded by itself."""

    text: str
    supervised: bool  # its tokens carry loss
    special_tokens: bool  # special tokens that it spells become those tokens


class Tokenizer:
    """Text to token ids and back; raises UserError for special tokens or a chat template that cannot be used.

    `chat_template` is Jinja source that turns messages into text; `named_tokens` are what it calls ``bos_token``,
    ``eos_token`` and so on.
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
        self.mask_id, self.terminator_ids, self.pad_id = special.mask_id, special.terminator_ids, special.pad_id
        self.terminator_id = special.terminator_ids[0]
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        ends = [("terminators", index) for index in special.terminator_ids]
        for setting, index in [("mask_token", self.mask_id), ("pad_token", self.pad_id), *ends]:
            if not fits(index, int) or not 0 <= index < self.vocab_size:
                raise UserError(f"{setting} has id {index}, outside the tokenizer's vocabulary of {self.vocab_size}")
        if self.mask_id in self.terminator_ids:
            raise UserError(f"mask_token and terminators are the same token {self.id_to_token(self.mask_id)}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_chat"}

    @cached_property
    def unknown_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot spell; None when it can spell everything."""
        name = getattr(self.backend.model, "unk_token", None)
        return None if name is None else self.backend.token_to_id(name)

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Returns the token ids of a text; a special token that it spells is text, unless `special_tokens` is set.

        Raises UserError when the vocabulary can write a part of a text only as a special token.
        """
        ids = [index for index, _, _ in self.spans(text, special_tokens)]
        if not special_tokens:
            self.check_plain(ids)
        return ids

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        """Returns the token ids of many texts, made in parallel; those of plain text are left to `check_plain`."""
        with _ENCODING:
            self.backend.encode_special_tokens = not special_tokens
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def spans(self, text: str, special_tokens: bool = False) -> list[tuple[int, int, int]]:
        """Returns the token ids of a text, each with where it begins and ends in the text."""
        with _ENCODING:
            self.backend.encode_special_tokens = not special_tokens
            encoding = self.backend.encode(text, add_special_tokens=False)
        return [(index, *span) for index, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_texts(self, ids: Sequence[int], first: int = 0) -> list[str]:
        """Returns what each token from the `first` on adds to the text of those before it.

        A character of several tokens comes with the last of them.
        """
        texts = []
        for stop in range(first + 1, len(ids) + 1):
            start = max(0, stop - _CONTEXT)
            before, now = (self.decode(ids[start:end]).rstrip("\ufffd") for end in (stop - 1, stop))
            texts.append(now[len(before) :])
        return texts

    def id_to_token(self, index: int) -> str:
        """Returns the name of one token; ids that the vocabulary leaves free get a name too."""
        return self.backend.id_to_token(index) or f"<{index}>"

    def shown(self, index: int) -> str:
        """Returns one token on one line: its text, or the vocabulary's name for one that has none."""
        text = self.decode([index])
        return printable(text if text.strip(" ") else "␣" * len(text) or self.id_to_token(index))

    @cached_property
    def _chat(self) -> ChatTemplate | None:
        if self.chat_template is None:
            return None
        from dllm_var.text.chat_templates import ChatTemplate  # imports Jinja

        return ChatTemplate(self.chat_template, self.named_tokens)

    def chat_pieces(self, messages: Sequence[dict[str, Any]], refuse: bool = False) -> list[Piece]:
        """Returns the texts that a conversation of ``role`` and ``content`` is encoded from, to train on it.

        What follows the last answer's terminator is left out. Without a template turns follow each other, and answers
        lack their terminators. Raises UserError when template and messages do not fit, with `refuse` also when a
        message spells a special token.
        """
        if self._chat is None:
            return [Piece(message["content"], message["role"] == "assistant", refuse) for message in messages]
        terminators = [self.id_to_token(index) for index in self.terminator_ids]
        text, answers = self._chat.render_answers(self.mark(messages, refuse), terminators)
        pieces: list[Piece] = []
        done = 0
        for start, stop in answers:
            pieces += self._split(text[done:start], supervised=False)
            pieces += self._split(text[start:stop], supervised=True)
            done = stop
        return pieces

    def encode_chat_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Returns the token ids of a conversation up to where the assistant's next turn begins."""
        if self._chat is not None:
            return self.encode_rendered(self.render(self.mark(messages), add_generation_prompt=True))
        ids = []
        for message in messages:
            ids += self.encode(message["content"])
            ids += [self.terminator_id] if message["role"] == "assistant" else []
        return ids

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Returns the text of messages that `mark` returned; raises UserError when no template takes them."""
        if self._chat is None:
            raise UserError("the tokenizer has no chat template")
        return self._chat.render(messages, add_generation_prompt)

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the token ids of a text that `render` has made."""
        pieces = self._split(text, supervised=False)
        return [index for piece in pieces for index in self.encode(piece.text, piece.special_tokens)]

    @cached_property
    def special_names(self) -> dict[int, str]:
        """All special tokens that text can spell, by id: those marked as special, and the mask."""
        added = self.backend.get_added_tokens_decoder()
        ids = {index for index, token in added.items() if token.special} | {self.mask_id}
        return {index: self.id_to_token(index) for index in ids}

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Finds what may spell a special token; matches any text when a normalizer may make one of it."""
        added = self.backend.get_added_tokens_decoder()
        if any(added[index].normalized for index in self.special_names if index in added):
            return re.compile("")
        return re.compile("|".join(map(re.escape, self.special_names.values())))

    def check_plain(self, ids: Sequence[int]) -> None:
        """Raises UserError for token ids of plain text with a special token, other than that for unknown characters."""
        if not self.special_names.keys().isdisjoint(ids):
            found = next((index for index in ids if index in self.special_names and index != self.unknown_id), None)
            if found is not None:
                raise UserError(f"spells the special token {self.special_names[found]}, which is kept for its own use")

    def mark(self, messages: Sequence[dict[str, Any]], refuse: bool = False) -> list[dict[str, Any]]:
        """Returns the messages with `MARK` behind each letter of a special token that one of their texts spells.

        Raises UserError for a special token that cannot be broken up; with `refuse` for any.
        """
        marked = []
        for number, message in enumerate(messages):
            try:
                marked.append(self._marked(message, refuse))
            except UserError as error:
                raise UserError(f"messages[{number}] {error}") from None
        return marked

    def _marked(self, value: Any, refuse: bool) -> Any:
        """Marks all strings of a nested value."""
        if isinstance(value, dict):
            return {self._marked(key, refuse): self._marked(entry, refuse) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(entry, refuse) for entry in value]
        if not isinstance(value, str):
            return value
        if MARK in value:
            raise UserError(f"contains U+{ord(MARK):04X}, which is no character")
        if not self._spelled.search(value):  # quick: most texts end here
            return value
        spans = [span for span in self.spans(value, special_tokens=True) if span[0] in self.special_names]
        if refuse:
            self.check_plain([index for index, _, _ in spans])
        places = {place for _, start, stop in spans for place in range(start, stop)}
        text = "".join(letter + MARK if place in places else letter for place, letter in enumerate(value))
        self.check_plain(self.encode(text, special_tokens=True))
        return text

    def _split(self, text: str, supervised: bool) -> list[Piece]:
        """Takes a text rendered from marked messages apart at the template's special tokens; removes the marks."""
        if MARK not in text:
            return [Piece(text, supervised, True)]
        pieces, done = [], 0
        for index, start, stop in self.spans(text, special_tokens=True):
            if index in self.special_names and MARK not in text[start:stop]:
                pieces.append(Piece(text[done:start].replace(MARK, ""), supervised, False))
                pieces.append(Piece(text[start:stop], supervised, True))
                done = stop
        pieces.append(Piece(text[done:].replace(MARK, ""), supervised, False))
        return [piece for piece in pieces if piece.text]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text gets."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole tokenizer as strings, integers, lists and dicts, fit for a checkpoint."""
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        ends = [self.id_to_token(index) for index in self.terminator_ids]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.named_tokens,
            "mask_token": self.id_to_token(self.mask_id),
            "pad_token": self.id_to_token(self.pad_id),
            "eos_token": ends[0],
            "terminators": ends,
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
        """Loads a tokenizer from a folder, or from the Hugging Face hub by a name such as ``GSAI-ML/LLaDA-8B-Base``.

        Tokens that are not given are looked up: the mask token in ``tokenizer_config.json`` or as ``mask_token_id`` of
        ``config.json``; the terminators as ``terminators`` or ``eos_token`` of the former and ``eos_token_id`` of
        ``generation_config.json`` and ``config.json``; padding as ``pad_token``, else the first terminator. A tokenizer
        that names no mask token gets one. Raises UserError for a token that is not found or not in the vocabulary.
        """
        folder = find_folder(path_or_name)
        backend = load_backend(folder, path_or_name)
        config = read_if_there(folder / "tokenizer_config.json")
        model, generation = (read_if_there(folder / name) for name in ("config.json", "generation_config.json"))
        entries = {name: config.get(name) for name in NAMED_TOKENS}  # a text, or a dictionary with it
        texts = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
        named = {name: text for name, text in texts.items() if isinstance(text, str)}

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
        masks = masks or known(MASKS.get(str(model.get("model_type"))))
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
        wanted = terminators or config.get("terminators") or []
        ends = [to_id(token, "terminators") for token in (wanted if isinstance(wanted, list | tuple) else [wanted])]
        ends = ends or known(named.get("eos_token"), generation.get("eos_token_id"), model.get("eos_token_id"))
        if not ends:
            raise UserError(
                f"{path_or_name} has no end-of-sequence token; name one or more with terminators, or train a tokenizer "
                f"that has all special tokens with {TRAIN_TOKENIZER}"
            )
        pads = [to_id(pad_token, "pad_token")] if pad_token else known(named.get("pad_token"), ends[0])
        special = SpecialTokens(masks[0], tuple(dict.fromkeys(ends)), pads[0])
        return cls(backend, special, read_chat_template(folder, config), named)


def printable(text: str) -> str:
    """Returns a text on one line: what cannot be printed as Python writes it."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
