"""Drawn tokens: their noise depends on the request alone, not on the batch it is decoded in."""

import hashlib
import random
from array import array

import torch
from torch import Tensor

from dllm_var.objectives.base import KeyedNoise

_FORWARDS = 1 << 20  # forwards of one request that get keys of their own
LOGITS_PER_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 23}  # drawn from at a time; noise and sorting take 30 bytes for each


def request_keys(prompts: list[list[int]]) -> list[int]:
    """Returns a number for each request from its prompt and how often that prompt came before it."""
    seen: dict[bytes, int] = {}
    keys = []
    for prompt in prompts:
        tokens = array("q", prompt).tobytes()
        occurrence = seen[tokens] = seen.get(tokens, -1) + 1
        digest = hashlib.blake2b(tokens, digest_size=8, salt=occurrence.to_bytes(8, "little")).digest()
        keys.append((int.from_bytes(digest, "little") >> 21) * _FORWARDS)
    return keys


def random_key() -> int:
    """Returns the number of a request that is to be drawn anew each time."""
    return random.SystemRandom().getrandbits(43) * _FORWARDS


def draw(logits: Tensor, keys: Tensor, temperature: float, top_k: int, top_p: float, seed: int) -> Tensor:
    """Returns one drawn token per position [M] from logits [M, V] in float32; equal `keys` [M] draw equal tokens."""
    rows = max(1, LOGITS_PER_CHUNK.get(logits.device.type, LOGITS_PER_CHUNK["cpu"]) // logits.size(1))
    drawn = []
    for chunk, of_chunk in zip(logits.split(rows), keys.split(rows), strict=True):
        likely = keep_likely(chunk, temperature, top_k, top_p)
        # The logarithm of an exponential number is minus Gumbel noise. Small numbers must be fine-grained, or rare
        # tokens are drawn too seldom (arXiv 2409.02908, section 5); 24 bits of uniform noise are not enough.
        noise = KeyedNoise(seed).exponential(of_chunk, logits.size(1), stream=5)
        drawn.append(noise.log_().mul_(-temperature).add_(likely).argmax(dim=-1))
    return torch.cat(drawn)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns the natural logarithms of the probabilities of tokens [...] by their logits [..., V]."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def keep_likely(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sets the logits [M, V] of unlikely tokens to -inf; the most likely one always stays."""
    if 0 < top_k < logits.size(1):
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = (ordered / temperature).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        unlikely = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p)
        logits = logits.masked_fill(unlikely, -torch.inf)
    return logits
