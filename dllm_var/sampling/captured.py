"""Decoding steps of constant shape: captured once, with the memory they work in, and replayed with other numbers.

On a GPU a step of a few hundred small kernels takes as long as Python takes to launch them. A CUDA graph launches all
of them at once, if their shapes and addresses stay: rows are idle where they are not needed, windows are padded to
whole blocks, keys are read up to a fixed reach under a mask, and every position of a block is scored. What differs from
step to step reaches the graph in one table of numbers, and what the host has to know comes back in another.

The memory and the graphs of an engine are kept for the next call of `generate` with the same settings and sizes.
"""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dllm_var.errors import one_line
from dllm_var.model.experts import keeps_the_host_out
from dllm_var.model.transformer import Transformer

EAGER_USES = 2  # of a step before it is captured: a short answer should not pay for it
ARENAS_KEPT = 2  # of a model
CAPACITY_MULTIPLE = 256  # tokens: calls with prompts of other lengths find their arena again
LEAST_REACH = 1_024  # keys: to read fewer than these takes as long

T = TypeVar("T")
Function = Callable[[Tensor], Tensor]


def cuda_graph(function: Function, numbers: Tensor) -> Callable[[], Tensor]:
    """Returns a function that does what `function(numbers)` does, with what is in `numbers` at that time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may pin batches meanwhile
        found = function(numbers)

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


CAPTURES: dict[str, Callable[[Function, Tensor], Callable[[], Tensor]]] = {"cuda": cuda_graph}  # by type of device


@dataclass(eq=False)
class Step:
    """One step with one set of constants."""

    numbers: Tensor  # what differs from use to use, on the device
    uses: int = 0
    replay: Callable[[], Tensor] | None = None


@dataclass(eq=False)
class Arena:
    """The memory of an engine, by names, and the steps that work in it."""

    device: torch.device
    memory: dict[str, Any] = field(default_factory=dict)
    steps: dict[Any, Step] = field(default_factory=dict)
    refused: bool = False  # whether a step could not be captured

    def lasting(self, name: str, make: Callable[[], T]) -> T:
        """Returns what has this name, made when there is none yet."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]

    def run(self, function: Function, numbers: Tensor, *constants: int | bool) -> list[Any]:
        """Returns `function(numbers)` as a list, from its third use with the same constants on by a replay.

        The constants and the shape of the numbers, which are on the host, decide all shapes in the function, and all
        else that is not in the memory or in the numbers. To fetch the result is the one wait for the device.
        """
        key, kind = (*numbers.shape, *constants), self.device.type
        step = self.steps.get(key)
        if step is None:
            step = self.steps[key] = Step(torch.empty_like(numbers, device=self.device))
        step.numbers.copy_(numbers.pin_memory() if kind == "cuda" else numbers, non_blocking=True)
        if step.replay is None and step.uses >= EAGER_USES and not self.refused:
            try:
                step.replay = CAPTURES[kind](function, step.numbers)
            except RuntimeError as error:  # nothing is lost: what a step has computed it computes again
                self.refused = True
                warnings.warn(f"decoding steps cannot be captured, and are slower: {one_line(error)}", stacklevel=2)
        step.uses += 1
        return (function(step.numbers) if step.replay is None else step.replay()).tolist()


_ARENAS: "weakref.WeakKeyDictionary[Transformer, dict[Any, Arena]]" = weakref.WeakKeyDictionary()


def can_capture(model: Transformer) -> bool:
    """Whether steps of a model can be captured: on a GPU, where neither a process nor the host is waited for."""
    weight = model.embedding.weight
    if weight.device.type not in CAPTURES:
        return False
    if model.config.num_experts is not None and not keeps_the_host_out(weight):
        return False
    return not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def take_arena(model: Transformer, settings: Any) -> Arena:
    """Returns the arena that was given back with these settings, or a new one."""
    return _ARENAS.get(model, {}).pop((settings, _addresses(model)), None) or Arena(model.embedding.weight.device)


def give_back(model: Transformer, settings: Any, arena: Arena) -> None:
    """Keeps an arena for the next engine with these settings, and drops those that were not asked for lately."""
    kept = _ARENAS.setdefault(model, {})
    kept[settings, _addresses(model)] = arena
    while len(kept) > ARENAS_KEPT:
        del kept[next(iter(kept))]


def release(model: Transformer) -> None:
    """Frees what is kept for a model."""
    _ARENAS.pop(model, None)


def _addresses(model: Transformer) -> tuple[int, ...]:
    """Where a model's weights are: a graph reads them there, so it is of no use once they have moved."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())


def reach_of(needed: int, capacity: int) -> int:
    """Returns how many keys a step reads that needs to see so many: few different numbers, each at most twice that."""
    return min(capacity, max(LEAST_REACH, 1 << (needed - 1).bit_length()))


def rows_kept(rows: int, needed: int) -> int:
    """Returns to how many rows a batch of `rows` shrinks when so many are needed: to a power of two."""
    return min(rows, 1 << max(needed - 1, 0).bit_length())
