"""Keys and values of what a row has already decoded, for rows of different lengths."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dllm_var.model.config import TransformerConfig

# Share of real tokens under which the padding is left out of the layers, at the price of two copies per layer. Without,
# batches of 32 take 15 to 20 % more time (the shipped models of both tasks).
PACKED_BELOW = 0.9
CACHE_LINE = 64  # bytes


class KVCache:
    """A preallocated cache in which every row has its own length.

    A forward writes its window of tokens behind each row's frozen ones and attends to both. Nothing written stays
    unless `advance` freezes it: a block can be denoised many times at the same place without a copy. Where much of a
    forward would be padding, its real tokens go through the layers as one row, `packed`, and only attention sees rows.

    Lengths, windows and numbers of rows are int64 tensors on the CPU, so that no forward waits for the device.

    A row may hold `capacity` tokens, windows included. `num_kv_heads` is the number of heads that this process has,
    when it does not have all of the shape's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
        num_kv_heads: int | None = None,
    ) -> None:
        assert config.num_kv_heads is not None and config.head_dim is not None
        shape = (config.num_layers, 2, rows, capacity, num_kv_heads or config.num_kv_heads, config.head_dim)
        self.storage = zeros(shape, device, dtype)  # what is read under a mask must at least be numbers
        shifted = config.token_shift and not config.causal
        self.hidden = zeros((rows, capacity, config.hidden_size), device, dtype) if shifted else None
        self.capacity, self.grid = capacity, config.grid
        self.lengths = torch.zeros(rows, dtype=torch.long, device="cpu")  # frozen tokens of each row

    def open(
        self,
        width: int,
        windows: Tensor | None = None,
        rows: Tensor | None = None,
        visible: Tensor | None = None,
        slots: Tensor | None = None,
        positions: Tensor | None = None,
        seen: Tensor | None = None,
        left_to_right: Tensor | None = None,
    ) -> None:
        """Prepares one forward of `width` tokens per row.

        Args:
            width: Tokens of the forward, L.
            windows: How many of them are real in each row, the rest being padding on the right; all when None.
            rows: The rows that take part, when not all do; each must be empty (a prefill into free rows).
            visible: Tokens that each row attends to, when what an earlier forward wrote behind the window counts too.
            slots: Where each token is stored [B, L], when that is not right behind the frozen ones; needs `visible`.
            positions: Rotary position of each token [B, L], when that is not where it is stored.
            seen: Which of the window's tokens each of them sees [B, L, L], beside the frozen ones; all when None.
            left_to_right: How many of each row's first tokens see nothing to the right of them [B]; none when None.
        """
        lengths = self.lengths if rows is None else self.lengths[rows]
        assert rows is None or not lengths.any(), "a forward of some rows starts from empty ones"
        assert slots is None or visible is not None
        device, offsets = self.storage.device, torch.arange(width, device="cpu")
        self._rows = None if rows is None else rows.to(device)
        self._width = width
        self._end = int(lengths.max()) + width  # where the longest row's window ends
        self.reach = self._end if visible is None else max(self._end, int(visible.max()))
        assert self.reach <= self.capacity, f"cache of {self.capacity} tokens is too short for {self.reach}"
        self._uniform = slots is None and bool((lengths == lengths[0]).all())
        self._slots = (lengths[:, None] + offsets).to(device) if slots is None else slots
        self.positions = self._slots if positions is None else positions
        self._starts, self._seen, self._constant = lengths, seen, False
        ends = lengths + (width if windows is None else windows) if visible is None else visible
        last = ends[:, None] - 1  # the last token that is seen, in each row [B, 1] or by each of its tokens [B, L]
        if left_to_right is not None:
            last = torch.where(offsets < left_to_right[:, None], lengths[:, None] + offsets, last)
        if self.grid is not None:
            own = lengths[:, None] + offsets if slots is None and positions is None else self.positions
            last = torch.minimum(last.to(own.device), self.block_ends(own))
        self._last_seen = None if bool((last == self.reach - 1).all()) else last.to(device)
        self.packed: Tensor | None = None
        if windows is not None and len(windows) > 1 and visible is None:
            self._pack(windows, rows, offsets)

    def open_constant(
        self,
        slots: Tensor,
        last_seen: Tensor | None,
        reach: int,
        positions: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        """Prepares a forward whose numbers are all on the device: of all rows, in which only shapes are fixed.

        Args:
            slots: Where each token is stored [B, L].
            last_seen: The last stored token that each row's tokens see [B, 1], or that each of them sees [B, L].
            reach: Keys that the forward reads of each row, whether they are seen or not.
            positions: Rotary position of each token [B, L], when that is not where it is stored.
            seen: Which of the window's tokens each of them sees [B, L, L], beside the frozen ones, when `last_seen` is
                None.
        """
        self._rows, self.packed, self._uniform = None, None, False
        self._width, self.reach, self._slots = slots.size(1), reach, slots
        self.positions = slots if positions is None else positions
        if self.grid is not None and last_seen is not None:
            last_seen = torch.minimum(last_seen, self.block_ends(self.positions))
        self._starts, self._seen, self._last_seen, self._constant = slots[:, 0], seen, last_seen, True

    def block_ends(self, positions: Tensor) -> Tensor:
        """Returns the last position of each token's block in a block-causal model."""
        assert self.grid is not None
        return positions // self.grid * self.grid + self.grid - 1

    def _pack(self, windows: Tensor, rows: Tensor | None, offsets: Tensor) -> None:
        """Finds the real tokens of a forward when much of it is padding."""
        real = offsets < windows[:, None]  # [B, L]
        if int(real.sum()) > PACKED_BELOW * real.numel():
            return
        device = self.storage.device
        row = torch.arange(len(windows), device="cpu") if rows is None else rows
        places = (row * self.capacity + self.lengths[row])[:, None] + offsets
        self.packed = real.flatten().nonzero().squeeze(1).to(device)  # [T], in the flattened window
        self._places = places[real].to(device)  # [T], in the flattened cache
        self._padded = (real.flatten().cumsum(0) - 1).clamp(min=0).to(device)  # [B * L], in the packed row

    def pack(self, values: Tensor) -> Tensor:
        """Returns the real tokens' values as one row [1, T, ...], from a window's [B, L, ...]; all when not packed."""
        return values if self.packed is None else values.flatten(0, 1).index_select(0, self.packed).unsqueeze(0)

    def pad(self, values: Tensor) -> Tensor:
        """Returns a window's values [B, L, ...] from the packed row's [1, T, ...]; padding repeats real ones."""
        if self.packed is None:
            return values
        return values.squeeze(0).index_select(0, self._padded).view(-1, self._width, *values.shape[2:])

    def mask(self, causal: bool) -> Tensor | None:
        """Returns the mask [B, 1, 1 or L, reach] of this forward, None when every token sees everything.

        It is boolean, or in a forward of constant shape what is added to the scores: kernels on a GPU want that, and
        would make it of booleans in each layer.
        """
        seen = self._visible(causal)
        if seen is None or not self._constant:
            return seen
        return self.storage.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    def _visible(self, causal: bool) -> Tensor | None:
        keys = torch.arange(self.reach, device=self.storage.device)
        if self._seen is not None:  # each key's place in the window [B, reach] is below 0 when it is frozen
            window = keys - self._starts.to(keys.device)[:, None]
            place = window.clamp(0, self._width - 1)[:, None].expand(-1, self._width, -1)
            inside = (window < self._width)[:, None] & self._seen.gather(2, place)
            return ((window < 0)[:, None] | inside).unsqueeze(1)
        if causal and self._width > 1:
            return (keys <= self.positions.unsqueeze(2)).unsqueeze(1)
        # A padding query sees what the real ones see: its output is never used, and no softmax is empty.
        return None if self._last_seen is None else (keys <= self._last_seen.unsqueeze(2)).unsqueeze(1)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's keys and values [B, L, kv_heads, D], or [1, T, kv_heads, D] when packed.

        Returns all that the forward's queries attend to, each [B, reach, kv_heads, D].
        """
        stored = self.storage[layer]  # [2, rows, capacity, kv_heads, D]
        for kind, fresh in ((stored[0], keys), (stored[1], values)):
            if self.packed is not None:
                kind.flatten(0, 1).index_copy_(0, self._places, fresh.squeeze(0))
            elif self._rows is not None:
                kind[self._rows, : self._width] = fresh
            elif self._uniform:
                kind[:, self._end - self._width : self._end] = fresh
            else:
                kind[torch.arange(fresh.size(0), device=fresh.device)[:, None], self._slots] = fresh
        if self._rows is not None and self.packed is None:  # the rows were empty: what was just computed is all
            return keys, values
        seen = stored[:, :, : self.reach] if self._rows is None else stored[:, self._rows, : self.reach]
        return seen[0], seen[1]

    def shift(self, hidden: Tensor) -> Tensor:
        """Stores this forward's last hidden states [B, L, hidden] and returns those left of each token.

        A block's first token is predicted at the token before it: as that came out of the forward that froze it, like
        its keys and values. Position 0 keeps its own.
        """
        assert self.hidden is not None
        row = torch.arange(hidden.size(0), device=hidden.device) if self._rows is None else self._rows
        self.hidden[row[:, None], self._slots] = hidden
        return self.hidden[row[:, None], (self.positions - 1).clamp(min=0)]

    def advance(self, counts: Tensor, rows: Tensor | None = None) -> None:
        """Freezes the first `counts[i]` tokens that the last forward wrote into row i (of `rows`, or of all)."""
        self.lengths[slice(None) if rows is None else rows] += counts

    def free(self, row: int) -> None:
        """Empties a row for another prompt."""
        self.lengths[row] = 0

    def keep(self, rows: Tensor, in_place: bool = False) -> None:
        """Drops every row but `rows`; `in_place` they become the first ones where they are, in the same memory."""
        index, used = rows.to(self.storage.device), int(self.lengths.max())
        self.storage = self._kept(self.storage, index, in_place, 2, used)
        self.hidden = None if self.hidden is None else self._kept(self.hidden, index, in_place, 0, used)
        self.lengths = self.lengths[rows]

    def _kept(self, values: Tensor, rows: Tensor, in_place: bool, dim: int, used: int) -> Tensor:
        """Returns the `rows` of a tensor along `dim`, of whose tokens, the next dimension, only some are `used`."""
        if in_place:
            return kept_rows(values, rows, in_place, dim)
        shape = list(values.shape)
        shape[dim] = len(rows)
        kept = zeros(shape, values.device, values.dtype)
        kept.narrow(dim + 1, 0, used).copy_(values.narrow(dim + 1, 0, used).index_select(dim, rows))
        return kept


def zeros(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Returns a tensor of zeros; on the CPU it takes memory only where it is written."""
    if torch.device(device).type != "cpu" or 0 in shape:
        return torch.zeros(shape, device=device, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


def kept_rows(values: Tensor, rows: Tensor, in_place: bool, dim: int = 0) -> Tensor:
    """Returns the `rows` of a tensor along `dim`; `in_place` as a view of it, into whose first rows they are moved."""
    kept = values.index_select(dim, rows)
    return values.narrow(dim, 0, len(rows)).copy_(kept) if in_place else kept
