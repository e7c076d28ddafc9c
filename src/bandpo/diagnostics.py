"""What a clip did to a batch: counts by bucket of old probability, as sums that add up over batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EDGES = (0.01, 0.1, 0.5, 0.9)
BUCKETS = tuple(f"p{low:g}-{high:g}" for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True))
FIELDS = ("tokens", "outside_below", "outside_above", "zero_grad_below", "zero_grad_above", "divergence")
STATES = 5  # below without gradient, below, inside, above, above without gradient


@dataclass(frozen=True)
class ClipStats:
    """Sums over tokens by bucket of old probability; add two to join batches, sum the fields to join ranks.

    Args:
        sums: shape (buckets, fields): tokens, outside_below, outside_above, zero_grad_below, zero_grad_above (counts)
            and divergence (sum, nats for kl).
        maxima: shape (buckets,): the largest divergence reached.
    """

    sums: Tensor
    maxima: Tensor

    def __add__(self, other: ClipStats) -> ClipStats:
        return ClipStats(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def metrics(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the shares, overall and by bucket, as tensors of no dimension; 0 where there is no token.

        Args:
            prefix: put before each name.

        Returns:
            outside_below, outside_above, zero_grad_below, zero_grad_above, zero_grad (shares of the tokens),
            divergence_mean and divergence_max; the same with "/" and the bucket's name for each, and share/BUCKET.
        """
        rows = torch.cat([self.sums.sum(0, keepdim=True), self.sums])
        maxima = torch.cat([self.maxima.amax(0, keepdim=True), self.maxima])
        shares = rows[:, 1:] / rows[:, :1].clamp(min=1.0)
        tokens = rows[:, :1] / rows[0, 0].clamp(min=1.0)
        table = torch.cat([shares, shares[:, 2:4].sum(1, keepdim=True), maxima[:, None], tokens], dim=1)
        names = (*FIELDS[1:5], "divergence_mean", "zero_grad", "divergence_max", "share")
        keys = [f"{prefix}{name}{place}" for place in ("", *(f"/{bucket}" for bucket in BUCKETS)) for name in names]
        metrics = dict(zip(keys, table.flatten().unbind(), strict=True))
        del metrics[f"{prefix}share"]  # the share of all tokens among all tokens
        return metrics


@torch.no_grad()
def count(state: Tensor, reached: Tensor, old_logps: Tensor, mask: Tensor | None) -> ClipStats:
    """Return the sums over tokens of what the gate did.

    Args:
        state: as in `Gated`; overwritten.
        reached: divergence of each token.
        old_logps: log-probabilities under the old policy.
        mask: 1 for tokens, 0 for padding, or None.

    Returns:
        `ClipStats`.
    """
    code, scratch = state.add_(STATES // 2 + 1), torch.empty_like(state)
    old_logps = old_logps.to(reached.dtype)  # a half type would round the edges
    for edge in EDGES:  # code = 1 + STATES * bucket + (state + 2)
        code.add_(torch.gt(old_logps, math.log(edge), out=scratch), alpha=STATES)
    if mask is not None:
        code.mul_(scratch.copy_(mask))  # padding goes to bin 0
    del scratch
    bins = 1 + STATES * len(BUCKETS)
    counts = torch.zeros(bins, dtype=torch.int32, device=code.device)
    total, largest = (torch.zeros(bins, dtype=reached.dtype, device=code.device) for _ in range(2))
    for part, value in _parts(code.flatten(), reached.flatten()):
        index = part.long()
        counts.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        total.add_(torch.zeros_like(total).index_add_(0, index, value))
        largest.scatter_reduce_(0, index, value, "amax")
    by_state = counts[1:].view(len(BUCKETS), STATES).to(reached.dtype)
    lost_below, below, inside, above, lost_above = by_state.unbind(1)
    columns = (by_state.sum(1), below + lost_below, above + lost_above, lost_below, lost_above)
    sums = torch.stack([*columns, total[1:].view(-1, STATES).sum(1)], dim=1)
    return ClipStats(sums, largest[1:].view(-1, STATES).amax(1))


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield pieces small enough that an int64 index costs little memory and a float32 sum loses no digits."""
    if torch.compiler.is_compiling():
        yield tensors
    else:
        yield from zip(*(torch.split(x, 1 << 16) for x in tensors), strict=True)
