"""Bounds of any f-divergence, by bracketing in log space: fixed iteration count, no host synchronisation, no state.

One side of the band is: an outcome of probability A shrinks by the factor e^-w and the other, of probability
B = 1 - A, takes up the mass. g grows with w from 0, so its root is bracketed. The lower bound is (A, B) = (p, 1-p) with
log r = -w; by the mirror identity r_low(p) = (1 - (1-p) r_high(1-p)) / p the upper bound is (A, B) = (1-p, p).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bandpo.divergences import Divergence

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
    log_a = log_p.double().clamp(min=-700.0)  # f itself loses digits near 1, and float32 has none to spare
    p, rest = torch.exp(log_a), torch.expm1(log_a).neg_().clamp_(min=1e-300)
    w_low = _bracket(divergence, p, rest, delta_low.double())
    moved = -torch.expm1(-_bracket(divergence, rest, p, delta_high.double())) * rest
    log_high = torch.log1p(moved / p) + (log_a - log_p)
    return -w_low.to(log_p.dtype), log_high.to(log_p.dtype)


def _bracket(divergence: Divergence, shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    low = torch.full_like(shrink, -90.0)
    high = (math.log(2.0) + torch.log(delta) - torch.log(shrink)).clamp(min=90.0) + torch.zeros_like(shrink)
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        w = torch.exp(middle)
        other = 1 - shrink / grow * torch.expm1(-w)
        inside = shrink * divergence.f(torch.exp(-w)) + grow * divergence.f(other) <= delta
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.exp(low)
