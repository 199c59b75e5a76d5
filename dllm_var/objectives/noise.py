"""Randomness as a pure function of (seed, row, position), the same on every device, rank and worker."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts the 64 bits right, filling with zeros (torch fills with the sign)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each input bit flips each output bit half the time."""
    x = (x ^ _shift_right(x, 30)).mul_(_MIX_1)
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 31))


@cache
def _first_key(seed: int, stream: int) -> int:
    """Returns the 64 bits that seed and stream come to; on the host, as each constant sent to a GPU makes it wait."""
    return int(_mix(torch.tensor(seed, dtype=torch.int64, device="cpu") * _GOLDEN + stream + 1))


def golden_fractions(numbers: Tensor) -> Tensor:
    """Returns the fractional part of each number times the golden ratio, in float32 [B]: spread evenly over [0, 1)."""
    return _shift_right(numbers * _GOLDEN, 40).to(torch.float32) * 2.0**-24


class KeyedNoise:
    """Random numbers keyed by (seed, stream, row, position): no state, so nothing to restore and nothing to shard."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, rows: Tensor, length: int, stream: int = 0) -> Tensor:
        """Returns float32 numbers in [0, 1) of shape [B, length], for the global row numbers [B].

        Streams are independent sequences; an objective uses one for mask rates and one for positions.
        """
        bits = _shift_right(self._bits(rows, length, stream), 40)  # the 24 bits a float32 holds exactly
        return bits.to(torch.float32) * 2.0**-24

    def exponential(self, rows: Tensor, length: int, stream: int = 0) -> Tensor:
        """Returns float32 numbers of the exponential distribution with mean 1, above 0, of shape [B, length].

        The small ones, which win races, come from 63 bits and have a float32's relative precision down to 2^-63.
        """
        bits = _shift_right(self._bits(rows, length, stream), 1).bitwise_or_(1)
        return bits.to(torch.float32).mul_(-(2.0**-63)).log1p_().neg_()

    def _bits(self, rows: Tensor, length: int, stream: int) -> Tensor:
        """Returns 64 random bits each, as int64 [B, length]."""
        base = _mix(rows * _GOLDEN + _first_key(self.seed, stream))
        counters = torch.arange(1, length + 1, dtype=torch.int64, device=rows.device) * _GOLDEN
        return _mix(base[:, None] + counters)
