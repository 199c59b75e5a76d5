"""The denoising step of engines that follow a policy: its memory, its view, and the writing of its decision."""

import torch
from torch import Tensor

from dllm_var.sampling.engine import AnyRow, Batch, Engine
from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy


class DenoisingEngine(Engine[AnyRow]):
    """An engine whose steps an unmasking policy decides."""

    policy: UnmaskingPolicy
    initial: State  # the policy's memory of a new block; `state` has that of each slot's blocks

    def use_policy(self, policy: UnmaskingPolicy, width: int, blocks: int = 1) -> None:
        """Takes a policy for blocks of this width, with a memory for each of the `blocks` that a slot has at a time."""
        self.policy, rows = policy, len(self.rows)

        def initial() -> State:
            return {name: value.to(self.device) for name, value in policy.initial_state(width).items()}

        def state() -> State:
            return {name: value.expand(rows, blocks, *value.shape).clone() for name, value in self.initial.items()}

        self.initial = self.lasting("initial", initial)
        self.state |= self.lasting("state", state)

    def memory(self, batch: Batch[AnyRow], step: Tensor) -> State:
        """Returns the policy's memory of the batch's blocks [R, ...], a new one where `step` is 0."""
        found = {}
        for name, initial in self.initial.items():
            first = (step == 0).view(-1, *[1] * initial.dim())
            value = self.state[name] if batch.index is None else self.state[name][batch.slots]
            found[name] = torch.where(first, initial, value.view(-1, *initial.shape))
        return found

    def remember(self, batch: Batch[AnyRow], memory: State) -> None:
        for name, value in memory.items():
            where = slice(None) if batch.index is None else batch.slots
            self.state[name][where] = value.view(-1, *self.state[name].shape[1:])

    def scored(self, row: AnyRow) -> int:
        """Returns how many positions of a row have logits in the policy's view."""
        return row.width if self.policy.scores_committed else row.left

    def view(
        self,
        hidden: Tensor,
        places: Tensor,
        tokens: Tensor,
        inside: Tensor,
        count: int | None,
        spacing: Tensor | None = None,
        **state: Tensor,
    ) -> BlockView:
        """Returns what a policy sees of blocks [R, K], scored at `count` of their `places` (see `score`).

        With a `count` of None all are scored, and the policy does not see what need not be. `spacing` is how many keys
        each row's draws take [R], K when None; `state` are its step, progress and key.
        """
        masked = (tokens == self.mask_id) & inside
        where = inside if self.policy.scores_committed else masked
        scored, logits = self.score(self.model, hidden, places, where, where.numel() if count is None else count)
        view = BlockView(logits, scored, tokens, masked, inside, unscored=~where if count is None else None, **state)
        view.sampled = self.sample(view, spacing)
        return view

    def sample(self, view: BlockView, spacing: Tensor | None = None) -> Tensor | None:
        """Returns a drawn token for each scored position [M]; None at temperature 0."""
        if self.sampler.temperature == 0:
            return None
        width = view.tokens.size(1)
        owner, offset = view.scored // width, view.scored % width
        keys = view.key[owner] * (width if spacing is None else spacing[owner]) + offset
        return self.sampler.draw(view.scored_logits, keys)

    def decide(self, batch: Batch[AnyRow], view: BlockView) -> Decision:
        memory = self.memory(batch, view.step)
        decision = self.policy.decision(view, memory)
        self.remember(batch, memory)
        return decision

    def write(
        self, cells: Tensor, tokens: Tensor, written: Tensor, nfe: Tensor, log_probabilities: Tensor | None
    ) -> None:
        """Writes blocks [R, K] at `cells` of the flat canvas.

        Where they are `written` it keeps the number of the forward [R], and log-probabilities [R, K] if they are given.
        """
        self.canvas.put_(cells, tokens)
        self.committed_at.put_(cells, torch.where(written, nfe[:, None], self.committed_at.take(cells)))
        if log_probabilities is not None:
            known = self.log_probabilities
            known.put_(cells, torch.where(written, log_probabilities, known.take(cells)))

    def wanted_log_probabilities(self, view: BlockView, tokens: Tensor) -> Tensor | None:
        """Returns the log-probabilities of tokens [R, K] at the scored positions; None when they are not wanted."""
        return view.log_probability_of(tokens) if self.request.log_probabilities else None
