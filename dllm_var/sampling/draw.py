"""Drawing tokens: temperature, top-k and top-p, with noise that depends on the request and not on its batch."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.objectives.noise import KeyedNoise

_FORWARDS = 1 << 20  # forwards of one request that get keys of their own
LOGITS_PER_CHUNK = {
    "cpu": 1 << 18,
    "cuda": 1 << 23,
}  # drawn from at a time; each takes some 30 bytes for noise and sorting


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn.

    Args:
        temperature: 0 takes the most likely token; otherwise logits + temperature x Gumbel noise (LLaDA's form).
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the noise.

    Raises:
        UserError: When a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                "sampler needs temperature >= 0, top_k >= 0 and top_p in (0, 1], got "
                f"{self.temperature}, {self.top_k} and {self.top_p}"
            )

    def __call__(self, logits: Tensor, keys: Tensor) -> Tensor | None:
        """Returns one token per position [M], or null when the most likely one is meant.

        Args:
            logits: [M, V] float32.
            keys: Number of each position's draw [M], int64; equal keys draw equal tokens.
        """
        if self.temperature == 0:
            return None
        rows = max(1, LOGITS_PER_CHUNK.get(logits.device.type, LOGITS_PER_CHUNK["cpu"]) // logits.size(1))
        tokens = [self._draw(*chunk) for chunk in zip(logits.split(rows), keys.split(rows), strict=True)]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def _draw(self, logits: Tensor, keys: Tensor) -> Tensor:
        logits = keep_likely(logits, self.temperature, self.top_k, self.top_p)
        # The logarithm of an exponential number is minus Gumbel noise. Small numbers must be fine-grained, or rare
        # tokens are drawn too seldom (arXiv 2409.02908, section 5); 24 bits of uniform noise are not enough.
        noise = KeyedNoise(self.seed).exponential(keys, logits.size(1), stream=5)
        return noise.log_().mul_(-self.temperature).add_(logits).argmax(dim=-1)


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
