"""Small models for the samplers' tests: random ones, and ones whose predictions are known; saved as checkpoints."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

MASK, ENDS, VOCABULARY = 19, (3, 4), 20
PROMPTS = [
    torch.randint(5, 19, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 1, 14, 5, 2, 30)
]
BACKEND = Backend(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
BACKEND.pre_tokenizer = WhitespaceSplit()
TOKENIZER = Tokenizer(BACKEND, SpecialTokens(MASK, ENDS, 0))


def random_model(seed=0, **changes) -> Transformer:
    torch.manual_seed(seed)
    settings = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=VOCABULARY, mask_id=MASK)
    settings |= dict(terminator_ids=list(ENDS), pad_id=0, initializer_range=0.3)
    return Transformer(TransformerConfig(**{**settings, **changes})).eval()


def lookup_model(after: dict[int, int | tuple[int, ...]], otherwise: int, **changes) -> Transformer:
    """Predicts `after[token]` at each token, `otherwise` at those not named: attention and layers add nothing.

    Of several tokens each is as likely as the others.
    """
    model = random_model(num_layers=1, **changes)
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.zero_()
        model.layers[0].mlp.down_proj.weight.zero_()
        model.embedding.weight.copy_(torch.eye(VOCABULARY, 32))
        model.lm_head.weight.zero_()
        for token in range(VOCABULARY):
            predicted = after.get(token, otherwise)
            model.lm_head.weight[[predicted] if isinstance(predicted, int) else list(predicted), token] = 1.0
    return model


def save(model: Transformer, folder, tokenizer: Tokenizer = TOKENIZER) -> str:
    return str(save_checkpoint_folder(folder, model, tokenizer))


def shapes_of(model: Transformer) -> list[tuple[int, int]]:
    """Returns a list that gets the shape of each of the model's forwards from now on."""
    shapes: list[tuple[int, int]] = []
    original = model.hidden_states

    def counted(input_ids, *others, **named):
        shapes.append(tuple(input_ids.shape))
        return original(input_ids, *others, **named)

    model.hidden_states = counted
    return shapes
