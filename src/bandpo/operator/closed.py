"""Closed forms of bounds, for the members of the family that have one; everything else is solved.

A tail is how far the outcome of probability A = shrink falls when the other, of B = grow = 1 - A, takes up its mass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bandpo.operator.tokens import above, expm1

SMALL_DELTA = 4e-3  # see `kl_tail`


def kl_tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    """Return v = A w > 0 with  A w - B log1p((A/B)(1 - e^-w)) = delta,  A = shrink, B = grow = 1 - A.

    w is how far the outcome of probability A falls in log-probability while the other takes up its mass. In v every
    quantity stays finite as A -> 0. The start is the root's expansion to second order in sqrt(delta); Newton on this
    convex function then doubles the digits: 2 steps give 7e-8, 3 give 1e-13, for every p and delta. Where delta is
    far below AB, and so w small, float32 leaves Newton eps / w, and the expansion to third order has more digits. The
    code keeps u = v - delta, of which v has all digits.
    """
    spread = shrink * grow
    first = (2 * delta * spread).sqrt()
    u = first + (shrink - 2) * (delta / 3)
    near = u + first * (1 / (spread + 1e-20) - 1) * (delta / 18)
    for _ in range(2 if shrink.dtype == torch.float32 else 3):
        m = expm1((u + delta).div_(shrink).neg_()).neg_()
        taken = shrink * m
        slope = (grow + taken).div_(m)  # dv = (q / m) dF, with q = B + A m
        u = u - torch.addcmul(u, grow, taken.div_(grow).log1p_(), value=-1.0).mul_(slope)
    if shrink.dtype == torch.float32:
        u = torch.addcmul(u, near - u, above(SMALL_DELTA * spread, delta))
    return u + delta


def neyman_tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    """Return A w from  (q-p)^2 = delta q (1-q), the Wilson interval."""
    root = (delta * (delta + 4 * shrink * grow)).sqrt()
    return torch.log1p((delta + root) / (2 * shrink)) * shrink


def hellinger_tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    """Return A w: A = sin^2 t falls to sin^2(t - angle), cos(angle) = 1 - delta/2, or to 0: the arcsine interval."""
    fall = delta / 2 + (delta * (1 - delta / 4).clamp(min=0.0) * grow / shrink).sqrt()
    return torch.log1p(-fall.clamp(max=1.0)) * (-2 * shrink)


def _one_plus_minus_exp(u_low: Tensor, u_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 - e^u_low), -inf where u_low >= 0, and log(1 + e^u_high)."""
    u = u_low.clamp(max=0.0)
    low = torch.where(u > -math.log(2), torch.log(-expm1(u)), torch.log1p(-torch.exp(u)))
    return low, torch.nn.functional.softplus(u_high, threshold=80.0)


def tv_bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of 1 -+ delta / p."""
    return _one_plus_minus_exp(torch.log(delta_low) - log_p, torch.log(delta_high) - log_p)


def chi2_bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of 1 -+ sqrt(delta (1-p) / p)."""
    log_odds = log_p - torch.log(-expm1(log_p))
    return _one_plus_minus_exp((torch.log(delta_low) - log_odds) / 2, (torch.log(delta_high) - log_odds) / 2)
