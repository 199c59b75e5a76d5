"""A layer of experts: feed-forward layers of which each token passes a few, chosen by a router."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.feed_forward import SwiGLU
from dllm_var.model.matrices import autocast_dtype


class Router(nn.Module):
    """Chooses the experts of each token and their weights, in 32 bits.

    An expert's score is a softmax over all of them (OLMoE, arXiv 2409.02060) or a sigmoid (DeepSeek-V3, 2412.19437,
    section 2.1.2). With groups, experts are chosen only from the groups whose two best score highest together. A bias,
    which gradients do not train, changes the choice and not the weights.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.num_experts is not None and config.experts_per_token is not None
        self.chosen, self.sigmoid = config.experts_per_token, config.router == "sigmoid"
        self.groups, self.groups_chosen = config.expert_groups, config.groups_per_token
        self.scale = config.router_scale
        self.normalise = config.router_normalise and self.chosen > 1
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias: nn.Parameter | None = None
        if config.router_bias:
            self.expert_bias = nn.Parameter(torch.empty(config.num_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns numbers and weights of the experts of tokens [N, hidden], both [N, experts_per_token]."""
        with torch.autocast(x.device.type, enabled=False):
            products = F.linear(x.float(), self.weight.float())
        scores = products.sigmoid() if self.sigmoid else products.softmax(dim=-1)
        ranked = scores if self.expert_bias is None else scores + self.expert_bias
        if self.groups > 1:
            grouped = ranked.unflatten(-1, (self.groups, -1))  # [N, groups, experts of a group]
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.groups_chosen, dim=-1).indices
            outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            ranked = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
        numbers = ranked.topk(self.chosen, dim=-1).indices
        weights = scores.gather(-1, numbers)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return numbers, weights * self.scale


class Experts(nn.Module):
    """Gated feed-forward layers, their matrices stacked; only those that are chosen are computed."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.num_experts is not None and config.experts_per_token is not None
        assert config.expert_intermediate_size is not None
        count, hidden, inner = config.num_experts, config.hidden_size, config.expert_intermediate_size
        self.share_chosen = config.experts_per_token / count
        self.gate_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))

    @property
    def num_parameters(self) -> int:
        """Number of weights of all experts."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def active_parameters(self) -> int:
        """Number of weights that one token passes."""
        return round(self.num_parameters * self.share_chosen)

    def forward(self, x: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """Returns for tokens [N, hidden] the weighted sum of their experts; `numbers` and `weights` are a router's.

        Each token is copied to each of its experts, and the copies are sorted by expert: a product of groups then
        multiplies each group of rows by a matrix of its own.
        """
        sorted_numbers, order = numbers.flatten().sort(stable=True)
        experts = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(sorted_numbers, experts, right=True, out_int32=True)  # of each expert's rows
        copies = x.index_select(0, order // numbers.size(1))
        gate, up = grouped_product(copies, self.gate_proj, ends), grouped_product(copies, self.up_proj, ends)
        outputs = grouped_product(F.silu(gate) * up, self.down_proj, ends)
        outputs = outputs.index_select(0, order.argsort()).unflatten(0, numbers.shape)  # [N, experts_per_token, hidden]
        return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiplies rows [N, in] by matrices [G, out, in]: those before `ends[0]` by the first, and so on."""
    matrices = matrices.to(x.dtype).transpose(1, 2)
    return F.grouped_mm(x, matrices, offs=ends) if x.dtype == torch.bfloat16 else _untraced(x, matrices, ends)


@torch.compiler.disable
def _untraced(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """A grouped product outside of a compiled graph: torch 2.13 traces those in bfloat16 alone."""
    return F.grouped_mm(x, matrices, offs=ends)


def keeps_the_host_out(weight: Tensor) -> bool:
    """Whether products with experts of a weight's type and device are computed without the host knowing their sizes.

    Elsewhere torch copies them to the host, which waits for the device at each product.
    """
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(weight.device)[0] in (9, 10)  # Hopper and Blackwell


class ExpertLayer(nn.Module):
    """The feed-forward layer of a mixture of experts: a router, its experts, and one layer that every token passes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        inner = config.shared_experts * (config.expert_intermediate_size or 0)
        self.shared_experts = SwiGLU(config.hidden_size, inner) if inner else None

    def forward(self, x: Tensor, on_masks: Tensor | None = None) -> Tensor:
        tokens = x.flatten(0, -2)
        numbers, weights = self.gate(tokens)
        mixed = self.experts(tokens.to(autocast_dtype(x)), numbers, weights).view(x.shape)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x, on_masks)


def refuse_experts(config: TransformerConfig, setting: str) -> None:
    """Raises UserError when a model has experts, which a setting does not work with."""
    if config.num_experts is not None:
        raise UserError(f"{setting} does not work with a mixture of {config.num_experts} experts: leave it out")
