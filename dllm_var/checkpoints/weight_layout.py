"""How the weights of a family's files are made of ours: the same, several joined, or one of a stack of experts."""

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dllm_var.checkpoints.families import OTHER, Family

STACKS = re.compile(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)$")  # of experts; files hold them one by one
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Layout = dict[str, list[tuple[str, int | None]]]  # by name in the files: our weights, each with the number of an expert
Readers = Mapping[str, Callable[[], Tensor]]


def layout_of(family: Family, shapes: Mapping[str, list[int]]) -> Layout:
    """Returns how a family's files hold our weights of these shapes; our own files hold them as they are."""
    layout: Layout = {}
    for name, shape in shapes.items():
        stack = None if family is OTHER else STACKS.match(name)
        if stack is None:
            layout.setdefault(family.theirs(name), []).append((name, None))
            continue
        for expert in range(shape[0]):
            layout[family.theirs(f"{stack[1]}.{expert}.{stack[2]}.weight")] = [(name, expert)]
    return layout


def stored_shape(parts: list[tuple[str, int | None]], shapes: Mapping[str, list[int]]) -> list[int]:
    """Returns the shape of a weight in the files."""
    first, expert = parts[0]
    return shapes[first][1:] if expert is not None else [sum(shapes[name][0] for name, _ in parts), *shapes[first][1:]]


def stored(parts: list[tuple[str, int | None]], read: Callable[[str], Tensor]) -> Tensor:
    """Returns a weight as the files hold it; `read` gives ours."""
    first, expert = parts[0]
    if expert is not None:
        return read(first)[expert].clone()
    return read(first) if len(parts) == 1 else torch.cat([read(name) for name, _ in parts])


def as_ours(layout: Layout, shapes: Mapping[str, list[int]], files: Readers) -> dict[str, Callable[[], Tensor]]:
    """Returns readers of our weights, which read no more of the files than the weight that is asked for.

    A weight in the files of another shape or kind than expected is given as it is, for its reader to refuse.
    """
    ours: dict[str, Callable[[], Tensor]] = {}
    stacks: dict[str, list[Callable[[], Tensor]]] = {}
    for theirs, parts in layout.items():
        first = 0
        for name, expert in parts:
            if expert is not None:
                stacks.setdefault(name, []).append(files[theirs])
            elif len(parts) == 1:
                ours[name] = files[theirs]
            else:
                rows = shapes[name][0]
                ours[name] = partial(_rows, files[theirs], stored_shape(parts, shapes), first, rows)
                first += rows
    return ours | {name: partial(_stacked, experts, shapes[name]) for name, experts in stacks.items()}


def _rows(read: Callable[[], Tensor], shape: list[int], first: int, rows: int) -> Tensor:
    whole = read()
    return whole.narrow(0, first, rows) if list(whole.shape) == shape else whole


def _stacked(experts: list[Callable[[], Tensor]], shape: list[int]) -> Tensor:
    stack: Tensor | None = None
    for number, read in enumerate(experts):
        expert = read()
        if list(expert.shape) != shape[1:] or expert.dtype not in FLOATING:
            return expert
        stack = expert.new_empty(shape) if stack is None else stack
        stack[number] = expert
    assert stack is not None
    return stack
