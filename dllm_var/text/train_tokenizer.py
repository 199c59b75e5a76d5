"""A tokenizer for one's own data: byte-level BPE with the special tokens of diffusion and of conversations."""

from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from dllm_var.errors import UserError
from dllm_var.text.tokenizer import ADDED_MASK, ROLES, SpecialTokens, Tokenizer

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = [PAD, ADDED_MASK, END, *(f"<|{role}|>" for role in ROLES)]  # they have the first ids
# A turn is its role's token, its text and the terminator.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '"
    + END
    + "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte has a token, so that no text is unknown


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocab_size` tokens from texts; digits stay tokens of their own.

    It has a mask token, a terminator, a padding token and a chat template. Raises UserError for a vocabulary that is
    smaller than the bytes and the special tokens.
    """
    if vocab_size < LEAST_VOCABULARY:
        raise UserError(
            f"--vocab-size is {vocab_size}; it must be at least {LEAST_VOCABULARY}: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    backend = Backend(models.BPE())
    # Single digits: numbers that are cut at other places each time are hard to compute with.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    pad, mask, end = map(SPECIAL_TOKENS.index, (PAD, ADDED_MASK, END))
    named = {"pad_token": PAD, "mask_token": ADDED_MASK, "eos_token": END}
    return Tokenizer(backend, SpecialTokens(mask, (end,), pad), CHAT_TEMPLATE, named)
