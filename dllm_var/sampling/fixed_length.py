"""Diffusion on a canvas of fixed length, as LLaDA decodes, with or without approximate caches: the baseline."""

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

    LLaDA, arXiv 2502.09992, algorithm 5. Without a cache every step runs the whole row; a cache keeps the keys and
    values of some positions from an earlier step:

    - `prefix`, `dual` (Fast-dLLM, 2505.22618, section 3.2): a block's first step runs the whole row; later steps run
      the block and what is right of it, or the block alone.
    - `dkv` (dKV-Cache-Decode, 2505.15781): a step runs what is masked and what the step before committed, so that a
      token is run once as itself and then kept; the first two and every `refresh_every`-th step of a block run the
      whole row.
    - `free` (FreeCache, 2505.21467): a step runs the block and what is right of it; the prompt and finished blocks keep
      what their own last step gave. Nothing is refreshed: a block's last tokens are remembered as masks.

    Args:
        policy: Decides what is committed at each step; one token per step when None.
        canvas_length: Masks behind the prompt; the answer's length limit.
        block_length: The canvas is filled from left to right in blocks of this many positions; all at once when None.
        cache: `none`, or one of the above.
        batch_size: Rows decoded at a time.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws.
        refresh_every: Steps of a block from one run of the whole row to the next, for `dkv`.

    Raises:
        UserError: When a length, refresh_every or the batch size is below 1, or for `dkv` with a policy that needs to
            see committed positions predicted again.
    """

    def __init__(
        self,
        policy: UnmaskingPolicy | None = None,
        canvas_length: int = 256,
        block_length: int | None = None,
        cache: Literal["none", "prefix", "dual", "dkv", "free"] = "none",
        batch_size: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        refresh_every: int = 8,
    ) -> None:
        check_at_least_one(canvas_length=canvas_length, block_length=block_length, batch_size=batch_size)
        check_at_least_one(refresh_every=refresh_every)
        self.policy: UnmaskingPolicy = policy if policy is not None else FixedSteps(steps=1 << 30)
        if cache == "dkv" and self.policy.scores_committed:
            name = type(self.policy).__name__
            raise UserError(f"sampler.cache dkv does not run the committed positions that {name} needs: use another")
        self.canvas_length, self.block_length = canvas_length, block_length
        self.cache, self.batch_size, self.refresh_every = cache, batch_size, refresh_every
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
        self.real = (torch.arange(width) < torch.from_numpy(self.row_lengths)[:, None]).to(self.device)
        self.segments = None if bool(self.real.all()) else (~self.real).long()  # padding is a segment of its own
        self.settled = torch.zeros_like(self.real)  # `dkv`: positions that have been run as what they are,
        self.unsettled = self.row_lengths  # and how many of each row have not
        self.nfe = np.zeros(len(prompts), np.int64)
        self.stopped = np.zeros(len(prompts), bool)  # rows with a stop string: nothing more is decoded for them
        self.keys = np.array(keys, dtype=np.int64)
        self.cache: KVCache | None = None
        if sampler.cache != "none":
            self.cache = model.new_cache(len(prompts), width + self.block)

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
            hidden, shift = self._forward(start, place, step, done=left == 0)
            tokens = before = self.tokens.gather(1, place)
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
            counts = [masked.sum(dim=1)]
            if self.sampler.cache == "dkv":
                self.settled.scatter_(1, place, self.settled.gather(1, place) & (tokens == before))
                counts.append((self.real & ~self.settled).sum(dim=1))
            left, *unsettled = torch.stack(counts).cpu().numpy()
            self.unsettled = unsettled[0] if unsettled else self.unsettled
            step += 1

    def _forward(self, start: np.ndarray, place: Tensor, step: int, done: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns hidden states [R, L, hidden] of a step's forward and where each row's block begins in them [R].

        Args:
            start: Where each row's block begins in the row [R].
            place: Where its positions are [R, K].
            step: Steps the block has had.
            done: Rows whose block is full [R]; the forward is for the others.
        """
        begin = torch.from_numpy(start).to(self.device)
        if self.cache is None:
            return self.model.hidden_states(self.tokens, segment_ids=self.segments), begin
        kind, width = self.sampler.cache, place.size(1)
        if self._runs_whole_row(start, step):
            self.cache.lengths[:] = 0
            self.cache.open(self.tokens.size(1), self.row_lengths)
            self.settled = self.tokens != self.mask_id
            return self.model.hidden_states(self.tokens, cache=self.cache), begin
        if kind == "dkv":
            return self._forward_unsettled(place), torch.zeros_like(begin)
        self.cache.lengths[:] = start
        if kind == "free":  # a full block keeps what its last step gave
            self.cache.lengths += width * done
        self.cache.open(width if kind == "dual" else int((self.row_lengths - start).max()), visible=self.row_lengths)
        window = self.cache.positions.clamp(max=self.tokens.size(1) - 1)
        return self.model.hidden_states(self.tokens.gather(1, window), cache=self.cache), torch.zeros_like(begin)

    def _runs_whole_row(self, start: np.ndarray, step: int) -> bool:
        if self.sampler.cache == "dkv":
            return step == 1 or step % self.sampler.refresh_every == 0
        return step == 0 and (self.sampler.cache != "free" or bool((start == self.prompt_lengths).all()))

    def _forward_unsettled(self, place: Tensor) -> Tensor:
        """Runs the positions that are masked or have just changed; returns the block's hidden states [R, K, hidden]."""
        assert self.cache is not None
        run = self.real & ~self.settled
        width, number = int(self.unsettled.max()), torch.from_numpy(self.unsettled).to(self.device)
        window = (~run).long().argsort(dim=1, stable=True)[:, :width]  # [R, L], the positions to run first
        beyond = torch.arange(width, device=self.device) >= number[:, None]
        # A row with fewer positions than the widest stores its padding behind the canvas, where nobody looks.
        slots = window.masked_fill(beyond, self.tokens.size(1))
        self.cache.lengths[:] = 0
        self.cache.open(width, visible=self.row_lengths, slots=slots, positions=window)
        hidden = self.model.hidden_states(self.tokens.gather(1, window), cache=self.cache)
        self.settled = self.settled | (run & (self.tokens != self.mask_id))
        order = (run.cumsum(dim=1) - 1).gather(1, place).clamp(0, width - 1)  # where in the window, if it is there
        return hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.size(2)))

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
