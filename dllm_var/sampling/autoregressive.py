"""One token per forward, left to right, with a KV cache: the baseline."""

from __future__ import annotations

import time

import numpy as np
import torch

from dllm_var.errors import UserError
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Generation, Request, Sampler, check_at_least_one


class AutoregressiveSampler(Sampler):
    """Greedy next-token decoding of a causal transformer.

    Args:
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row leaves the batch.

    Raises:
        UserError: When a setting is below 1.
    """

    def __init__(self, max_new_tokens: int = 512, batch_size: int = 32) -> None:
        check_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if not model.config.causal:
            raise UserError("this checkpoint is bidirectional: decode it with dllm_var.sampling.BlockDiffusionSampler")
        limit = request.max_new_tokens or self.max_new_tokens
        answers: list[Generation] = []
        for first in range(0, len(prompts), self.batch_size):
            group = prompts[first : first + self.batch_size]
            answers += _decode_group(model, group, limit, first, request)
        return answers


def _decode_group(
    model: Transformer, prompts: list[list[int]], limit: int, first: int, request: Request
) -> list[Generation]:
    began = time.perf_counter()
    device, terminators = model.embedding.weight.device, set(model.config.terminator_ids or [])
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    cache = KVCache(model.config, len(prompts), longest + limit, device, model.embedding.weight.dtype)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    cache.open(longest, lengths)
    hidden = model.hidden_states(tokens, cache=cache)
    cache.advance(lengths)
    last = hidden[torch.arange(len(prompts), device=device), torch.from_numpy(lengths - 1).to(device)]
    rows = np.arange(len(prompts))  # the prompt of each row still in the batch
    generated: list[list[int]] = [[] for _ in prompts]
    answers: dict[int, Generation] = {}
    nfe = 1
    while True:
        logits = model.lm_head(last).float()
        if model.config.mask_id is not None:
            logits[:, model.config.mask_id] = -torch.inf
        chosen = logits.argmax(dim=-1)
        stay = []
        for place, token in enumerate(chosen.tolist()):
            row = int(rows[place])
            ended = token in terminators
            if not ended:
                generated[row].append(token)
                if request.on_block is not None:
                    request.on_block(first + row, list(generated[row]))
            if ended or len(generated[row]) == limit:
                answers[row] = Generation(
                    tokens=generated[row],
                    finish_reason="eos" if ended else "length",
                    nfe=nfe,
                    seconds=time.perf_counter() - began,
                    prompt_length=len(prompts[row]),
                    commit_steps=list(range(1, len(generated[row]) + 1)),
                )
            else:
                stay.append(place)
        if not stay:
            return [answers[row] for row in range(len(prompts))]
        if len(stay) < len(rows):
            kept = np.array(stay)
            cache.keep(kept)
            rows, chosen = rows[kept], chosen[torch.from_numpy(kept).to(device)]
        cache.open(1)
        last = model.hidden_states(chosen[:, None], cache=cache)[:, 0]
        cache.advance(np.ones(len(rows), dtype=np.int64))
        nfe += 1
