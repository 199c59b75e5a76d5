"""Folders named by path or by their name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from dllm_var.errors import UserError

TOKENIZER_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*config.json",
    "*.model",
]
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]


def is_hub_name(path_or_name: str | Path) -> bool:
    """Says whether a name that is no path here can be one of the hub's: `owner/name`, `owner` being no folder here."""
    name = str(path_or_name)
    owner, slash, rest = name.partition("/")
    if isinstance(path_or_name, Path) or name.startswith((".", "/", "~")) or "/" in rest:
        return False
    return not slash or (bool(rest) and not Path(owner).is_dir())


def download(name: str, what: str, patterns: list[str]) -> Path:
    """Returns the folder with a hub repository's files, downloaded unless they are there already.

    Args:
        name: Repository, `owner/name`.
        what: What is wanted, for the message.
        patterns: Files to take; code and pickles are never among them.

    Raises:
        UserError: When the hub cannot be reached or does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, not found, gated: the hub has many ways to say no
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {name} is no folder, and cannot be had from the hub: {reason}") from None
