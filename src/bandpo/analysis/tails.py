"""Quantiles and tails of a stream of values, without keeping the values: counts in bins of 0.1 %.

A positive float32 and the integer of the same bits are in the same order, so the upper bits are a logarithmic bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 13  # drops so many bits of a float32: bins of 2^-10 of their value
BINS = 1 << (31 - SHIFT)
LARGEST = 3e38


class Tails:
    """How many values, and how much weight, lie above any threshold; on the CPU.

    Attributes:
        counts: values by bin, int64.
        weights: the sum of their weights by bin, float64.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        self.weights = torch.zeros(BINS, dtype=torch.float64, device="cpu")

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Count values, which are at least 0, with weights or without."""
        index = _bin(values).flatten()
        self.counts.scatter_add_(0, index, torch.ones_like(index))  # bincount would make all bins anew
        if weights is not None:
            self.weights.scatter_add_(0, index, weights.flatten().double())

    def quantile(self, share: float) -> float:
        """Return the value of which this share of the values is not above it, to 0.1 %; 0 without values."""
        total = self.counts.cumsum(0)
        if int(total[-1]) == 0:
            return 0.0
        place = int(torch.searchsorted(total, max(round(share * int(total[-1])), 1)))
        return _edge(place) if place == 0 else 0.5 * (_edge(place) + _edge(place + 1))

    def threshold(self, wanted: float, *, weighted: bool = False, least: float = 0.0) -> tuple[float, float]:
        """Return the threshold above which lies what is nearest to `wanted`, and what lies above it.

        Args:
            wanted: a count, or a weight, > 0.
            weighted: which of both.
            least: no threshold below this.

        Returns:
            (threshold, found): the middle of the gap, in the logarithm, where no value lies near it.
        """
        sums = self.weights if weighted else self.counts
        above = sums.flip(0).cumsum(0).flip(0)  # in this bin and beyond
        start = 1 + int(_bin(torch.tensor(least, device="cpu")))
        place = int((above[start:] - wanted).abs().argmin()) + start
        found = float(above[place])
        same = (above == above[place]).to(torch.int8)
        first, last = int(same.argmax()), BINS - 1 - int(same.flip(0).argmax())
        low, high = max(_edge(max(first, 1)), least), _edge(last)
        if last == BINS - 1:  # nothing above
            return low, found
        return (low * high) ** 0.5 if last > first else _below(low), found


def _bin(values: Tensor) -> Tensor:
    return values.float().clamp(0.0, LARGEST).view(torch.int32).bitwise_right_shift(SHIFT).long()


def _edge(place: int) -> float:
    """The least value of a bin."""
    bits = torch.tensor(min(place, BINS - 1) << SHIFT, dtype=torch.int32, device="cpu")
    return float(bits.view(torch.float32))


def _below(value: float) -> float:
    """The float32 just below."""
    x = torch.tensor(value, device="cpu")
    return float(torch.nextafter(x, torch.zeros_like(x)))
