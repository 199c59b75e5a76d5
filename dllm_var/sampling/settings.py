"""The settings that samplers share, and how tokens are drawn: with noise that depends on the request, not its batch."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.objectives.base import KeyedNoise

_FORWARDS = 1 << 20  # forwards of one request that get keys of their own
LOGITS_PER_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 23}  # drawn from at a time; noise and sorting take 30 bytes for each


@dataclass(eq=False, kw_only=True)
class DecodingSettings:
    """The base of samplers that are dataclasses: their fields are the settings that a config names.

    Args:
        max_new_tokens: Longest answer in tokens; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        temperature: 0 takes the most likely token; otherwise logits + temperature x Gumbel noise (LLaDA's form).
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws; a row's draws do not depend on its batch.

    Raises:
        UserError: When a value is out of range.
    """

    max_new_tokens: int = 512
    batch_size: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_at_least_one("max_new_tokens", "batch_size")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                "sampler needs temperature >= 0, top_k >= 0 and top_p in (0, 1], got "
                f"{self.temperature}, {self.top_k} and {self.top_p}"
            )

    def check_at_least_one(self, *names: str) -> None:
        """Raises UserError for a setting below 1; None passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"sampler.{name} must be at least 1, got {value}")

    def check_shares(self, *names: str) -> None:
        """Raises UserError for a setting outside [0, 1]."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"sampler.{name} must be in [0, 1], got {getattr(self, name)}")

    def draw(self, logits: Tensor, keys: Tensor) -> Tensor | None:
        """Returns one drawn token per position [M], or None at temperature 0.

        Args:
            logits: [M, V] float32.
            keys: Number of each position's draw [M], int64; equal keys draw equal tokens.
        """
        if self.temperature == 0:
            return None
        rows = max(1, LOGITS_PER_CHUNK.get(logits.device.type, LOGITS_PER_CHUNK["cpu"]) // logits.size(1))
        return torch.cat([self._draw(*chunk) for chunk in zip(logits.split(rows), keys.split(rows), strict=True)])

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
