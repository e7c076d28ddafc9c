"""Bounds of any f-divergence, by bracketing in log space: fixed iteration count, no host synchronisation, no state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bandpo.divergences import Divergence, by_tail

ITERATIONS = 64  # halvings of log w over [e^-90, e^90]: the bracket ends at a relative width of 1e-17


def log_bounds(divergence: Divergence, log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the roots of g_f(p, r) = delta on both sides of r = 1, as log-ratios.

    Args:
        divergence: which f.
        log_p: log-probabilities in nats, <= 0 and finite, any shape.
        delta_low: radius for the lower bound, broadcasts with `log_p`.
        delta_high: radius for the upper bound, broadcasts with `log_p`.

    Returns:
        (log_low, log_high) in the dtype of `log_p`; -inf and about -log_p where the region reaches the simplex's end.

    Source: arXiv 2603.04918, section 3.
    """
    if divergence.bounds is not None:
        return divergence.bounds(log_p, delta_low, delta_high)

    def tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
        return _bracket(divergence, shrink, grow, delta) * shrink

    # f itself loses digits near 1, and float32 has none to spare; Apple's GPUs have nothing wider
    wide = log_p.dtype if log_p.device.type == "mps" else torch.float64
    low, high = by_tail(tail)(log_p.to(wide), delta_low.to(wide), delta_high.to(wide))
    return low.to(log_p.dtype), high.to(log_p.dtype)


def _bracket(divergence: Divergence, shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    """Return w, by how much log(shrink) falls at the edge of the region; inf where even shrink = 0 is inside."""
    low = torch.full_like(shrink, -90.0)
    high = top = (math.log(2.0) + torch.log(delta) - torch.log(shrink)).clamp(min=90.0) + torch.zeros_like(shrink)
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        w = torch.exp(middle)
        fall = torch.expm1(-w)
        rise = -shrink / grow * fall
        other = divergence.value(torch.log1p(rise), rise).mul_(grow)
        inside = divergence.value(-w, fall).mul_(shrink).add_(other) <= delta
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(low > top - 1e-3, math.inf, torch.exp(low))
