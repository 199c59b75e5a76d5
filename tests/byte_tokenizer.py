"""A tokenizer for tests: every byte is a token, and a chat template with the usual turn markers."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ["<|pad|>", "<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_byte_tokenizer(folder: Path, chat_template: str | None = None, **config) -> Path:
    """Writes a tokenizer folder; `config` overrides entries of tokenizer_config.json, None removes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "pad_token": "<|pad|>",
        "mask_token": "<|mask|>",
        "eos_token": "<|im_end|>",
        "chat_template": chat_template,
    }
    settings.update(config)
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return folder


def encode_chat(tokenizer, messages):
    """Returns the token ids of a conversation, and which are supervised, as training has them."""
    ids, supervised = [], []
    for piece in tokenizer.chat_pieces(messages):
        ids += tokenizer.encode(piece.text, piece.special_tokens)
        supervised += [piece.supervised] * (len(ids) - len(supervised))
    return ids, supervised
