"""The feed-forward layer that every token passes."""

import torch.nn.functional as F
from torch import Tensor, nn

from dllm_var.model.matrices import Fused, autocast_dtype, project, usable


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama (2002.05202), `inner` wide between matrices `hidden` wide."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.fused: Fused | None = None

    def forward(self, x: Tensor, on_masks: Tensor | None = None) -> Tensor:
        x = x.to(autocast_dtype(x))
        if (fused := usable(self.fused, self.gate_proj, self.up_proj)) is not None:
            gate, up = fused(x, on_masks).chunk(2, dim=-1)
        else:
            gate, up = project(self.gate_proj, x, on_masks), project(self.up_proj, x, on_masks)
        return project(self.down_proj, F.silu(gate) * up, on_masks)
