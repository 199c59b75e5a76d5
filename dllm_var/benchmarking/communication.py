"""What processes send each other in a training step, and how long that takes beside the computation."""

from __future__ import annotations

from dataclasses import dataclass

from dllm_var.benchmarking.cost_model import Strategy
from dllm_var.model.config import TransformerConfig

# Times the size of the parameters that each device sends, and receives, in a step; (n - 1) / n of it with n devices.
# Reduce-scatter and all-gather count one each, an all-reduce is both (ring; arXiv 1910.02054, section 7).
VOLUMES: dict[Strategy, tuple[int, int]] = {  # of parameters, of gradients
    "ddp": (0, 2),
    "fsdp2": (2, 1),  # gathered for the forward and again for the backward
    "zero2": (1, 1),  # gathered once updated
}


@dataclass(frozen=True)
class Links:
    """What devices are connected by.

    Args:
        per_node: Devices of one node.
        inside: Bytes per second and device between devices of a node, in one direction.
        between: The same between nodes.
        achieved: Share of these that collectives reach.
    """

    per_node: int = 8
    inside: float = 450e9  # NVLink 4
    between: float = 50e9  # one 400 Gbit/s port for each device
    achieved: float = 0.7

    def bandwidth(self, devices: int) -> float:
        """Returns what a ring over so many devices goes at: its slowest link."""
        return self.achieved * (self.inside if devices <= self.per_node else self.between)


def communication_bytes(strategy: Strategy, parameters: int, devices: int, width: int, trained: int) -> float:
    """Returns what each device sends in an optimizer step.

    Args:
        strategy: How training is spread; `ddp`, `fsdp2` or `zero2`.
        parameters: Number of weights.
        devices: How many devices.
        width: Bytes in which weights and gradients travel.
        trained: Number of weights that get gradients.
    """
    of_parameters, of_gradients = VOLUMES[strategy]
    if strategy == "zero2":
        parameters = trained  # the others do not change
    return (of_parameters * parameters + of_gradients * trained) * width * (devices - 1) / devices


def tensor_parallel_bytes(
    config: TransformerConfig, tokens: int, scored: int, ranks: int, width: int, recompute: bool = False
) -> float:
    """Returns what each process of a tensor-parallel group sends of activations in a step (arXiv 1909.08053).

    Each layer all-reduces its tokens' hidden states twice in the forward pass and twice in the backward one, the
    embedding once, and the head the gradients at the scored positions, with four numbers for each of these. What comes
    after the last layer's attention is about these positions alone.

    Args:
        config: The transformer.
        tokens: Tokens that the group reads.
        scored: Positions on which the head runs.
        ranks: Processes of the group.
        width: Bytes in which hidden states travel.
        recompute: Whether blocks are computed again in the backward pass, all but their last all-reduce.
    """
    in_layers, after_attention = (5, 4) if recompute else (4, 3)
    everywhere = config.num_layers * in_layers + 1 - after_attention
    hidden_states = tokens * everywhere + scored * (after_attention + 1)
    return 2 * (hidden_states * config.hidden_size * width + 4 * scored * 4) * (ranks - 1) / ranks


def step_with_communication(compute: float, communication: float, overlapped: float = 0.8) -> float:
    """Returns the time of a step whose communication goes on beside the computation, as far as that lasts.

    Args:
        compute: Seconds of computation.
        communication: Seconds of communication.
        overlapped: Share of the communication that may go on beside computation; the rest waits for it.
    """
    return max(compute, overlapped * communication) + (1 - overlapped) * communication
