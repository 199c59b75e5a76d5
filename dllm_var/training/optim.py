"""Learning-rate schedules, parameter groups and optimizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from dllm_var.errors import UserError
from dllm_var.model.sharding import local_part


@dataclass
class Schedule:
    """Learning rate over the run, as a share of the optimizer's own.

    Args:
        kind: Shape after the warm-up: `cosine` or `linear` down to `final`, `constant`, or `wsd` (warm-up, stable,
            decay: constant, then linear down to `final`; MiniCPM, arXiv 2404.06395, section 4).
        warmup_steps: Steps of linear warm-up.
        final: Share of the learning rate at the last step.
        decay_share: Share of all steps of the run, warm-up and the steps before a resume included, over which `wsd`
            decays at the end; never reaches into the warm-up.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 50
    final: float = 0.0
    decay_share: float = 0.2

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final <= 1 or not 0 < self.decay_share <= 1:
            raise UserError(
                "model.schedule needs warmup_steps >= 0, final in [0, 1] and decay_share in (0, 1], got "
                f"{self.warmup_steps}, {self.final}, {self.decay_share}"
            )

    def share(self, step: int, total_steps: int) -> float:
        """Returns the share of the learning rate that step number `step` (from 0) of `total_steps` uses."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        after_warmup = max(1, total_steps - self.warmup_steps)
        if self.kind == "wsd":
            decay_steps = min(self.decay_share * max(1, total_steps), after_warmup)
            return self.final + (1 - self.final) * min(1.0, max(0, total_steps - step) / decay_steps)
        progress = min(1.0, (step - self.warmup_steps) / after_warmup)
        fall = progress if self.kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1 - (1 - self.final) * fall

    def scheduler(self, optimizer: Optimizer, total_steps: float) -> LambdaLR:
        """Returns the scheduler, to be stepped after every optimizer step.

        `total_steps` is infinite or negative when nobody knows it, as with `max_time` or an endless stream; raises
        UserError when the shape of the schedule depends on it.
        """
        known = 0 <= total_steps < math.inf
        if not known and self.kind != "constant":
            raise UserError(
                f"model.schedule.kind {self.kind} must know how long training lasts: set trainer.max_steps, or "
                "model.schedule.kind to constant"
            )
        steps = int(total_steps) if known else 0
        return LambdaLR(optimizer, lambda step: self.share(step, steps))


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the trained parameters by role: `hidden` weight matrices, the `head`, and the `rest` without decay.

    The rest is embeddings, norms and biases; a head tied to the embedding is one of them.
    """
    roles: dict[str, list[nn.Parameter]] = {"hidden": [], "head": [], "rest": []}
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}  # FSDP1 leaves them one dimension
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = (parameter.dim() >= 2 or id(parameter) in linear) and id(parameter) not in embeddings
        roles["rest" if not matrix else "head" if "lm_head" in name else "hidden"].append(parameter)
    groups: list[dict[str, Any]] = [{"params": params, "role": role} for role, params in roles.items() if params]
    for group in groups:
        if group["role"] == "rest":
            group["weight_decay"] = 0.0
    return groups


def check_state(optimizer: Optimizer, state_dict: dict[str, Any], option: str) -> None:
    """Raises UserError for a checkpoint's state that torch would take up and the first step would fail on.

    Every group has `option` if an optimizer of the same class wrote the state.
    """
    saved = [(group.get("role"), len(group["params"]), option in group) for group in state_dict["param_groups"]]
    if saved != [(group.get("role"), len(group["params"]), True) for group in optimizer.param_groups]:
        raise UserError(
            f"the checkpoint's optimizer state is of another optimizer than {type(optimizer).__name__} or of another "
            "model: use those it was trained with, or start a new run from it with model.init_from"
        )


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with the defaults of language-model training.

    Set `fused` to false for 16-mixed precision with clipping by value, which Lightning refuses with fused optimizers.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=fused)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of an AdamW with the same groups; raises UserError for any other."""
        check_state(self, state_dict, "amsgrad")
        super().load_state_dict(state_dict)


class Muon(Optimizer):
    """Muon for hidden weight matrices, AdamW for embeddings, head and norms, in one optimizer.

    Momentum is orthogonalised by five Newton-Schulz iterations, matrices of one shape together (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). Parameters may be sharded as DTensors (FSDP2): the processes then deal whole
    matrices among themselves, so that each is orthogonalised once.

    torch.optim.Muon takes one matrix after the other, in bfloat16: ten times the time of this one on a CPU.

    Args:
        params: Groups from `parameter_groups`; those of another role than `hidden` are AdamW's.
        lr: Learning rate of the hidden matrices.
        adamw_lr: Learning rate of everything else.
        momentum: Decay of the momentum, Nesterov's.
        betas: AdamW's decays.
        eps: AdamW's epsilon.
        weight_decay: Decoupled decay of every group that does not set its own.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        adamw_lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if min(lr, adamw_lr) < 0:
            raise UserError(f"model.optimizer needs lr >= 0 and adamw_lr >= 0, got {lr} and {adamw_lr}")
        groups: list[dict[str, Any]] = [
            dict(group) if isinstance(group, dict) else {"params": [group]} for group in params
        ]
        for group in groups:
            group["lr"] = lr if group.setdefault("role", "rest") == "hidden" else adamw_lr
        defaults = dict(momentum=momentum, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        # `fused` is for torch: it makes load_state_dict bring AdamW's step counts to the parameters' device.
        super().__init__(groups, {**defaults, "fused": True})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of a Muon with the same groups; raises UserError for any other."""
        check_state(self, state_dict, "momentum")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["role"] == "hidden":
                self._step_hidden(group)
            else:
                self._step_rest(group)
        return loss

    def _step_rest(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        parameters = [p for p in parameters if local_part(p).numel()]  # a short one may lie with other processes
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        adamw(  # element by element, so that shards need no others
            [local_part(p) for p in parameters],
            [local_part(p.grad) for p in parameters if p.grad is not None],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_hidden(self, group: dict[str, Any]) -> None:
        shapes: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                placements = parameter.placements if isinstance(parameter, DTensor) else ()
                shapes.setdefault((parameter.shape, placements), []).append(parameter)
        for (shape, _), parameters in shapes.items():
            stack = torch.stack([p.grad for p in parameters if p.grad is not None])  # a DTensor if these are
            gradients = local_part(stack)
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [local_part(self.state[p]["momentum_buffer"]) for p in parameters]
            momentum = torch.stack(buffers).lerp_(gradients, 1 - group["momentum"])
            torch._foreach_copy_(buffers, list(momentum.unbind()))
            update = orthogonalise_as_placed(gradients.lerp(momentum, group["momentum"]), stack)
            weights = [local_part(p) for p in parameters]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, shape[-2] / shape[-1]) ** 0.5  # a tall matrix has fewer singular values than rows
            torch._foreach_add_(weights, list(update.unbind()), alpha=-group["lr"] * scale)


def orthogonalise_as_placed(matrices: Tensor, like: Tensor) -> Tensor:
    """Orthogonalises the part of a stack of matrices [N, R, C] that this process has, divided as the stack `like` is.

    The processes exchange parts, so that each gets some of the matrices whole, and exchange them again afterwards. Over
    a mesh of two dimensions, torch gathers the whole stack on every process in between.
    """
    if not isinstance(like, DTensor):
        return orthogonalise(matrices)

    def moved(part: Tensor, source: Sequence[Placement], target: Sequence[Placement]) -> Tensor:
        shape, stride = like.shape, like.stride()
        placed = DTensor.from_local(part, like.device_mesh, source, run_check=False, shape=shape, stride=stride)
        return placed.redistribute(placements=target).to_local()

    each_whole = [Shard(0)] * like.device_mesh.ndim
    return moved(orthogonalise(moved(matrices, like.placements, each_whole)), each_whole, like.placements)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Returns matrices [..., R, C] with all singular values brought near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices.bfloat16() if matrices.is_cuda else matrices.float()).flatten(0, -3)
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype).view(matrices.shape)
