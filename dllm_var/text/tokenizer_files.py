"""Tokenizers as published models have them: folders of files, on this machine or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dllm_var.errors import UserError
from dllm_var.files import fits, read_object, read_text

TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt"]
TOKENIZER_FILES += ["*config.json", "*.model"]
ADDED_MASK = "<|mask|>"  # what a tokenizer without a mask token gets
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")


def read_tokenizer(
    path_or_name: str | Path,
    mask_token: str | None = None,
    terminators: Sequence[str] | None = None,
    pad_token: str | None = None,
) -> tuple[tokenizers.Tokenizer, tuple[int, tuple[int, ...], int], str | None, dict[str, str]]:
    """Reads a tokenizer's folder, or the hub's by its name; arguments and errors as in `Tokenizer.from_pretrained`.

    The mask token is looked up in ``tokenizer_config.json`` or as ``mask_token_id`` of ``config.json``; the terminators
    as ``terminators`` or ``eos_token`` of the former and ``eos_token_id`` of ``generation_config.json`` and
    ``config.json``; padding as ``pad_token``, else the first terminator.

    Returns:
        The Rust tokenizer; ids of mask, terminators and padding; the chat template; its named tokens.
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
    given = terminators or config.get("terminators") or []
    given = given if isinstance(given, list | tuple) else [given]
    ends = list(dict.fromkeys(to_id(token, "terminators") for token in given))
    ends = ends or known(named.get("eos_token"), generation.get("eos_token_id"), model.get("eos_token_id"))
    if not ends:
        raise UserError(f"{path_or_name} has no end-of-sequence token; name one or more with terminators")
    pads = [to_id(pad_token, "pad_token")] if pad_token else known(named.get("pad_token"), ends[0])
    return backend, (masks[0], tuple(ends), pads[0]), _read_chat_template(folder, config), named


def download(name: str, what: str, patterns: list[str]) -> Path:
    """Returns the folder with a hub repository's files of these patterns, downloaded unless they are there already.

    Raises:
        UserError: When the hub cannot be reached or does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, not found, gated: the hub has many ways to say no
        raise UserError(f"{what} {name} is no folder, and cannot be had from the hub: {_first_line(error)}") from None


def is_hub_name(path_or_name: str | Path) -> bool:
    """Says whether a name that is no path here can be one of the hub's: `owner/name`, `owner` being no folder here."""
    name = str(path_or_name)
    owner, slash, rest = name.partition("/")
    if isinstance(path_or_name, Path) or name.startswith((".", "/", "~")) or "/" in rest:
        return False
    return not slash or (bool(rest) and not Path(owner).is_dir())


def _find_folder(path_or_name: str | Path) -> Path:
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(path_or_name):
        raise UserError(f"tokenizer folder {path_or_name} does not exist")
    return download(str(path_or_name), "tokenizer", TOKENIZER_FILES)


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


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
