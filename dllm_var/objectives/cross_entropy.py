"""The output head and the loss where, and only where, a prediction is scored."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dllm_var.model.matrices import autocast_dtype
from dllm_var.model.sharding import VocabularySlice, vocabulary_slice

LOGITS_PER_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}  # float32 logits alive at a time: 64 and 512 MiB
TILE = 128  # rows
TokenLoss = Callable[[Tensor, Tensor], Tensor]
cross_entropy: TokenLoss = partial(F.cross_entropy, reduction="none")  # [M] in nats, from logits [M, V], targets [M]


class Scores(NamedTuple):
    """The loss of predictions at M positions."""

    loss_sum: Tensor  # weighted sum of the losses, from which backward starts
    token_loss: Tensor  # loss of each, in nats, without its weight and out of the graph [M]
    correct: Tensor  # whether the most likely token, the first of equals, is the right one [M], bool


def head_loss(
    head: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    token_loss: TokenLoss = cross_entropy,
    logits_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the loss [M, ...] and the most likely token [M] at M positions with hidden states [M, hidden].

    `token_loss` computes the loss [M], or several terms of it [M, n], from logits [M, V] in float32 and targets [M].
    Beyond `logits_per_chunk` (None for `LOGITS_PER_CHUNK`) the head runs in chunks whose logits are computed again in
    the backward pass, so that [M, vocabulary] never exists as a whole.
    """

    def of_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        return token_loss(logits, targets), logits.detach().argmax(dim=-1)

    rows = _rows_per_chunk(head, hidden, logits_per_chunk)
    if hidden.size(0) <= rows:
        return of_chunk(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat([loss for loss, _ in parts]), torch.cat([tokens for _, tokens in parts])


def summed_cross_entropy(
    head: nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor | None = None, logits_per_chunk: int | None = None
) -> Scores:
    """Returns the sum of the cross-entropies at M positions, weighted by `weights` [M]; other arguments as `head_loss`.

    The weights are known with the logits: each chunk's gradient is made at once, and no logit is computed twice. (The
    idea of Liger's and torch's `linear_cross_entropy`, which tells neither the single losses nor which predictions are
    right, and on CPUs is slower than all logits at once.)
    """
    # Adapters have more than a weight; and in float16 the loss scale must come before the gradients.
    if type(head) is not nn.Linear or head.bias is not None or autocast_dtype(hidden) == torch.float16:
        token_loss, guesses = head_loss(head, hidden, targets, cross_entropy, logits_per_chunk)
        loss_sum = (token_loss if weights is None else token_loss * weights).sum()
        return Scores(loss_sum, token_loss.detach(), guesses == targets)
    rows = _rows_per_chunk(head, hidden, logits_per_chunk)
    matrix, slice_ = vocabulary_slice(head.weight)
    if not torch.is_grad_enabled():  # a Function is not told
        hidden, matrix = hidden.detach(), matrix.detach()
    return Scores(*_SummedCrossEntropy.apply(hidden, matrix, targets, weights, rows * slice_.ranks, slice_))


def _rows_per_chunk(head: nn.Linear, hidden: Tensor, logits: int | None) -> int:
    """Returns how many positions' logits may exist at a time: whole tiles of a matrix product, when they are many."""
    rows = max(1, (logits or LOGITS_PER_CHUNK["cuda" if hidden.is_cuda else "cpu"]) // head.out_features)
    return rows - rows % TILE if rows > TILE else rows


class _SummedCrossEntropy(torch.autograd.Function):
    """The loss and both gradients in one pass over chunks of positions; backward only scales them.

    Where the vocabulary is divided among processes, each has some of the logits [chunk, V / ranks]. For a chunk they
    exchange the largest logit, the sum of the exponentials, the right token's logit and whether another token beats
    it, [chunk] each. In the end they add up the gradient of the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        rows: int,
        vocabulary: VocabularySlice,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = autocast_dtype(hidden)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if for_hidden else None
        exact = torch.float32 if dtype == torch.bfloat16 else dtype
        # Chunks are added up in float32, also where the weight has 16 bits.
        weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, exact)) if for_weight else None
        token_loss = torch.empty(hidden.size(0), dtype=exact, device=hidden.device)
        correct = torch.empty(hidden.size(0), dtype=torch.bool, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            room = torch.empty(min(rows, hidden.size(0)), weight.size(0), dtype=dtype, device=hidden.device)
            for start in range(0, hidden.size(0), rows):
                at = slice(start, start + rows)
                states = hidden[at].to(dtype)
                logits = torch.mm(states, matrix.t(), out=room[: len(states)])
                chances = logits.float() if dtype == torch.bfloat16 else logits  # the latter is changed in place
                right, here = vocabulary.find(targets[at, None], len(matrix))
                best_here, guess = chances.max(dim=1, keepdim=True)  # the first of equals
                best = vocabulary.reduced(best_here.clone(), dist.ReduceOp.MAX)
                of_right = chances.gather(1, right).where(here, 0.0)
                # Another token is the guess when it is larger, or as large and before the right one.
                lost = (best_here == best) & (guess + vocabulary.first < targets[at, None])
                total = chances.sub_(best).exp_().sum(dim=1, keepdim=True)
                sums = vocabulary.reduced(torch.stack((total, of_right, lost.to(total.dtype))))
                total, of_right, lost = sums.unbind()
                token_loss[at] = (total.log() + best - of_right)[:, 0]
                correct[at] = ((of_right == best) & (lost == 0))[:, 0]
                if not (for_hidden or for_weight):
                    continue
                chances.scatter_add_(1, right, -total.where(here, 0.0))
                slope = total.reciprocal() if weights is None else weights[at, None] / total
                slopes = torch.mul(chances, slope, out=logits)
                if hidden_grad is not None:
                    hidden_grad[at] = slopes @ matrix
                if weight_grad is not None and weight_grad.dtype == dtype:
                    weight_grad.addmm_(slopes.t(), states)
                elif weight_grad is not None:
                    weight_grad.add_(slopes.t() @ states)
        if hidden_grad is not None:
            vocabulary.reduced(hidden_grad)
        ctx.gradients = (hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(token_loss, correct)
        loss_sum = token_loss.sum() if weights is None else (token_loss * weights).sum()
        return loss_sum, token_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("summed_cross_entropy: backward a second time; its gradients are kept for one")
        hidden_grad, weight_grad = (part if part is None else part.mul_(grad.to(part.dtype)) for part in ctx.gradients)
        ctx.gradients = None
        return hidden_grad, weight_grad, None, None, None, None
