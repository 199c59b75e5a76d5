"""Block diffusion with a plain KV cache: decode block by block until the terminator (arXiv 2510.24605, section 4)."""

from __future__ import annotations

from typing import ClassVar, Literal

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Generation, Request, Sampler, check_at_least_one
from dllm_var.sampling.block_length import AdaptiveRun, BlockLengthPolicy
from dllm_var.sampling.block_run import BlockRun
from dllm_var.sampling.draw import Draw
from dllm_var.sampling.policies import ConfidenceThreshold, UnmaskingPolicy


class BlockDiffusionSampler(Sampler):
    """Decodes block by block until each row's own terminator.

    Args:
        policy: Decides which masked positions become tokens at each step; `ConfidenceThreshold(0.9)` when null.
        block_length: Tokens decoded together.
        max_new_tokens: Longest answer; a row that reaches it has finish reason `length`.
        batch_size: Rows decoded at a time; a finished row's place goes to the next prompt.
        terminator_last: Commits a terminator only when everything left of it is, and nothing right of a sure one.
        kv_commit: How a finished block enters the cache: `joint_next` in one forward with the next block (the paper),
            `alone` in a forward of its own, `last_step` as its last denoising step left it (FreeCache, 2505.21467):
            what that step committed is remembered as masks, so accuracy suffers.
        grid: Where blocks start: at the `prompt`'s end (the paper) or at `absolute` multiples of the block length.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: Draws among the k most likely tokens; all when 0.
        top_p: Draws among the most likely tokens that together have this probability.
        seed: Seed of the draws; a row's draws do not depend on its batch.
        block_length_policy: Decides how wide each block is, `block_length` being the widest; all are when null.

    Raises:
        UserError: When a length or the batch size is below 1.
    """

    run_class: ClassVar[type[BlockRun]] = BlockRun
    blocks_per_window: int = 2  # a finished block and the next; what a row's cache has room for

    def __init__(
        self,
        policy: UnmaskingPolicy | None = None,
        block_length: int = 64,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        terminator_last: bool = True,
        kv_commit: Literal["joint_next", "alone", "last_step"] = "joint_next",
        grid: Literal["prompt", "absolute"] = "prompt",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        block_length_policy: BlockLengthPolicy | None = None,
    ) -> None:
        check_at_least_one(block_length=block_length, max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.policy: UnmaskingPolicy = policy if policy is not None else ConfidenceThreshold()
        self.block_length, self.max_new_tokens, self.batch_size = block_length, max_new_tokens, batch_size
        self.terminator_last, self.kv_commit, self.grid = terminator_last, kv_commit, grid
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.block_length_policy = block_length_policy
        self.draw = Draw(temperature, top_k, top_p, seed)

    def decode(self, model: Transformer, prompts: list[list[int]], request: Request) -> list[Generation]:
        if model.config.causal:
            raise UserError("this checkpoint is autoregressive: decode it with dllm_var.sampling.AutoregressiveSampler")
        run_class = self.run_class if self.block_length_policy is None else AdaptiveRun
        run = run_class(self, model, prompts, request)
        while run.waiting or run.in_flight:
            run.admit()
            run.step()
        return [run.answers[index] for index in range(len(prompts))]
