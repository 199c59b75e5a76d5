"""Tokenizers as published models have them: folders of files, on this machine or on the Hugging Face hub."""

from pathlib import Path
from typing import Any

import tokenizers

from dllm_var.errors import UserError, one_line
from dllm_var.files import fits, read_object, read_text

TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt"]
TOKENIZER_FILES += ["*config.json", "*.model"]
# Classes that come as code with a checkpoint, and the class of transformers that they are a copy of.
_SAME_AS = {"DreamTokenizer": "Qwen2TokenizerFast"}
# Mask tokens by `model_type`, where only the published code names them.
MASKS = {"Fast_dLLM_Qwen": "|<MASK>|"}


def find_folder(path_or_name: str | Path) -> Path:
    """Returns a tokenizer's folder, downloaded when a hub name is given; raises UserError when there is none."""
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(path_or_name):
        raise UserError(f"tokenizer folder {path_or_name} does not exist")
    return download(str(path_or_name), "tokenizer", TOKENIZER_FILES)


def is_hub_name(path_or_name: str | Path) -> bool:
    """Says whether a name that is no path here can be one of the hub's: `owner/name`, `owner` being no folder here."""
    name = str(path_or_name)
    owner, slash, rest = name.partition("/")
    if isinstance(path_or_name, Path) or name.startswith((".", "/", "~")) or "/" in rest:
        return False
    return not slash or (bool(rest) and not Path(owner).is_dir())


def download(name: str, what: str, patterns: list[str]) -> Path:
    """Returns the folder with a hub repository's files of these patterns; raises UserError when it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # not found, gated: the hub has many ways to say no
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "it cannot be reached" if offline else one_line(error)[:200]
        files = " ".join([name, *(patterns if len(patterns) == 1 else [])])
        raise UserError(
            f"{what} {name} is no folder, and the hub does not give it: {reason}; where the hub can be reached, run "
            f"hf download {files} --local-dir DIR, and give DIR instead of the name"
        ) from None


def load_backend(folder: Path, name: str | Path) -> tokenizers.Tokenizer:
    """Returns the Rust tokenizer of a folder, `name` in messages; files older than tokenizer.json are converted."""
    if (folder / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the Rust side raises a bare Exception
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {one_line(error)[:200]}") from None
    config = read_if_there(folder / "tokenizer_config.json")
    kind = _SAME_AS.get(str(config.get("tokenizer_class")))
    decides = config if "tokenizer_class" in config else {**read_if_there(folder / "config.json"), **config}
    if kind is None and decides.get("auto_map"):
        raise UserError(
            f"the tokenizer of {name} is code of its own (auto_map), which is never run: give a folder with a "
            "tokenizer.json"
        )
    try:  # older formats (vocab.json and merges.txt, sentencepiece) are converted there
        import transformers

        # Left unset, transformers asks on standard input whether to run the folder's code.
        loader = getattr(transformers, kind or "AutoTokenizer")
        return loader.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
    except Exception as error:
        reason = f"tokenizer.json, or files that can be converted: {one_line(error)[:100]}"
        remedy = "give a folder that has one, or train one with python -m dllm_var tokenizer"
        raise UserError(f"no tokenizer in {name} ({reason}): {remedy}") from None


def read_if_there(path: Path) -> dict[str, Any]:
    """Reads a JSON file of settings by name; there are none when there is no file."""
    return read_object(path) if path.is_file() else {}


def read_chat_template(folder: Path, config: dict[str, Any]) -> Any:
    """Returns the chat template of a folder, from its own file or from `tokenizer_config.json`; None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template: Any = config.get("chat_template")
    if fits(template, list[dict[str, str]]):  # several, each with a name
        return next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template
