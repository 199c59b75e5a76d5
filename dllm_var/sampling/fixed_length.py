"""Diffusion on a canvas of fixed length, as LLaDA decodes, with or without Fast-dLLM's caches: the baseline."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Generation, Request, Sampler, check_at_least_one, special_ids
from dllm_var.sampling.commit import choose_commits
from dllm_var.sampling.draw import Draw, request_keys
from dllm_var.sampling.policies import BlockView, FixedSteps, UnmaskingPolicy
from dllm_var.sampling.scoring import position_keys, score_positions


class FixedLengthSampler(Sampler):
    """Fills a canvas of fixed length block by block, with every later mask in view, and cuts at the first terminator.

    LLaDA, arXiv 2502.09992, algorithm 5; the caches of Fast-dLLM, arXiv 2505.22618, section 3.2.

    Args:
        policy: Decides what is committed at each step; one token per step when null.
        canvas_length: Masks behind the prompt; the answer's length limit.
        block_length: The canvas is filled from left to right in blocks of this many positions; all at once when null.
        cache: `none` runs the whole row at every step. The others do so at each block's first step; later steps run the
            block and what is right of it (`prefix`), or the block alone (`dual`), on the keys and values from then.
        batch_size: Rows decoded at a time.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws.

    Raises:
        UserError: When a length or the batch size is below 1.
    """

    def __init__(
        self,
        policy: UnmaskingPolicy | None = None,
        canvas_length: int = 256,
        block_length: int | None = None,
        cache: Literal["none", "prefix", "dual"] = "none",
        batch_size: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_at_least_one(canvas_length=canvas_length, block_length=block_length, batch_size=batch_size)
        self.policy: UnmaskingPolicy = policy if policy is not None else FixedSteps(steps=1 << 30)
        self.canvas_length, self.block_length = canvas_length, block_length
        self.cache, self.batch_size = cache, batch_size
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.draw = Draw(temperature, top_k, top_p, seed)

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if model.config.causal:
            raise UserError("this checkpoint is autoregressive: decode it with dllm_var.sampling.AutoregressiveSampler")
        length = request.max_new_tokens or self.canvas_length
        keys = request_keys(prompts)
        answers: list[Generation] = []
        for first in range(0, len(prompts), self.batch_size):
            places = slice(first, first + self.batch_size)
            canvas = _Canvas(self, model, prompts[places], keys[places], length, request)
            for start in range(0, length, canvas.block):
                canvas.fill_block(start, min(canvas.block, length - start))
                if request.on_block is not None or request.stop is not None:
                    for row, answer in enumerate(canvas.answers()):
                        if request.on_block is not None:
                            request.on_block(first + row, answer.tokens)
                        canvas.stopped[row] = request.stopped(first + row, answer.tokens)
            answers += canvas.answers()
            for index in range(first, len(answers)):
                request.finished(index, answers[index])
        return answers


class _Canvas:
    """A batch of rows `prompt | canvas`, each with its own prompt length, all working on the same block."""

    def __init__(
        self,
        sampler: FixedLengthSampler,
        model: Transformer,
        prompts: list[list[int]],
        keys: list[int],
        length: int,
        request: Request,
    ) -> None:
        self.sampler, self.model, self.length, self.suppressed = sampler, model, length, request.suppressed
        self.began = time.perf_counter()
        self.mask_id, self.terminators = special_ids(model)
        self.block = min(sampler.block_length or length, length)
        self.device = model.embedding.weight.device
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts])
        self.row_lengths = self.prompt_lengths + length
        width = int(self.row_lengths.max())
        self.tokens = torch.full((len(prompts), width), self.mask_id, device=self.device)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        self.committed_at = torch.zeros_like(self.tokens)
        real = torch.arange(width) < torch.from_numpy(self.row_lengths)[:, None]
        self.segments = None if bool(real.all()) else (~real).long().to(self.device)  # padding is a segment of its own
        self.nfe = np.zeros(len(prompts), np.int64)
        self.stopped = np.zeros(len(prompts), bool)  # rows with a stop string: nothing more is decoded for them
        self.keys = np.array(keys, dtype=np.int64)
        self.cache: KVCache | None = None
        if sampler.cache != "none":
            dtype = model.embedding.weight.dtype
            self.cache = KVCache(model.config, len(prompts), width + self.block, self.device, dtype)

    def fill_block(self, offset: int, width: int) -> None:
        """Denoises the block that begins `offset` into the canvas until no row has a mask in it."""
        start = self.prompt_lengths + offset
        place = torch.from_numpy(start).to(self.device)[:, None] + torch.arange(width, device=self.device)
        template = self.sampler.policy.initial_state(width)
        rows = len(start)
        state = {name: value.to(self.device).repeat(rows, *[1] * value.dim()) for name, value in template.items()}
        left = np.where(self.stopped, 0, width)
        step = 0
        while (left > 0).any():
            self.nfe += left > 0
            hidden, shift = self._forward(start, width, refresh=step == 0)
            tokens = self.tokens.gather(1, place)
            open_rows = torch.from_numpy(left > 0).to(self.device)[:, None]
            masked = (tokens == self.mask_id) & open_rows
            inside = open_rows.expand_as(masked)
            all_scored = self.sampler.policy.scores_committed
            count = int((left > 0).sum()) * width if all_scored else int(left.sum())
            scored, logits = score_positions(
                self.model, hidden, inside if all_scored else masked, shift, count, self.suppressed
            )
            key = torch.from_numpy(self.keys + self.nfe).to(self.device)
            view = BlockView(
                scored_logits=logits,
                scored=scored,
                tokens=tokens,
                masked=masked,
                changeable=inside,
                step=torch.full((rows,), step, device=self.device),
                progress=torch.full((rows,), offset / self.length, device=self.device),
                key=key,
                sampled=self.sampler.draw(logits, position_keys(key, scored, width)),
            )
            decision = self.sampler.policy.decide(view, state)
            tokens, masked, written = choose_commits(view, decision, self.mask_id, self.terminators, False)
            at = torch.from_numpy(self.nfe).to(self.device)[:, None].expand_as(tokens)
            self.tokens.scatter_(1, place, tokens)
            self.committed_at.scatter_(1, place, torch.where(written, at, self.committed_at.gather(1, place)))
            left = masked.sum(dim=1).cpu().numpy()
            step += 1

    def _forward(self, start: np.ndarray, width: int, refresh: bool) -> tuple[Tensor, Tensor]:
        """Returns hidden states [R, L, hidden] of a forward and where each row's block begins in them [R]."""
        begin = torch.from_numpy(start).to(self.device)
        if self.cache is None:
            return self.model.hidden_states(self.tokens, segment_ids=self.segments), begin
        if refresh:
            self.cache.lengths[:] = 0
            self.cache.open(self.tokens.size(1), self.row_lengths)
            return self.model.hidden_states(self.tokens, cache=self.cache), begin
        self.cache.lengths[:] = start
        window = width if self.sampler.cache == "dual" else int((self.row_lengths - start).max())
        self.cache.open(window, visible=self.row_lengths)
        place = self.cache.positions.clamp(max=self.tokens.size(1) - 1)
        return self.model.hidden_states(self.tokens.gather(1, place), cache=self.cache), torch.zeros_like(begin)

    def answers(self) -> list[Generation]:
        """Cuts every row at its first terminator, or at its first mask while it is not finished."""
        ends = set(self.terminators)
        seconds = time.perf_counter() - self.began
        result = []
        for row, start in enumerate(self.prompt_lengths.tolist()):
            tokens = self.tokens[row, start : start + self.length].tolist()
            end = next((i for i, token in enumerate(tokens) if token in ends or token == self.mask_id), self.length)
            result.append(
                Generation(
                    tokens=tokens[:end],
                    finish_reason="eos" if end < self.length and tokens[end] in ends else "length",
                    nfe=int(self.nfe[row]),
                    seconds=seconds,
                    prompt_length=start,
                    commit_steps=self.committed_at[row, start : start + end].tolist(),
                )
            )
        return result
