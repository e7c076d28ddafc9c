"""The Band operator: a trust region of radius delta, projected into an interval of ratios for each token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._input import check_tensor
from bandpo.operator.divergence import Divergence
from bandpo.operator.family import get_divergence
from bandpo.operator.radius import Delta, check_cap, check_delta, check_radii, delta_like
from bandpo.operator.solver import log_bounds
from bandpo.operator.tokens import Move, working_dtype


@dataclass(frozen=True)
class Bounds:
    """An interval of ratios per token, held as log-ratios so that it exists for every probability.

    Args:
        log_low: log of the least ratio allowed, <= 0, shape of the tokens.
        log_high: log of the greatest ratio allowed, >= 0, shape of the tokens.
    """

    log_low: Tensor
    log_high: Tensor

    @property
    def low(self) -> Tensor:
        """The least ratio allowed, in [0, 1]."""
        return torch.exp(self.log_low)

    @property
    def high(self) -> Tensor:
        """The greatest ratio allowed, in [1, 1/p]; inf where 1/p overflows and no cap is set."""
        return torch.exp(self.log_high)

    def margins(self) -> tuple[Tensor, Tensor]:
        """Return the bounds as a host takes them that clamps a ratio to [1 - eps_low, 1 + eps_high].

        Returns:
            (eps_low, eps_high), float32 of the tokens' shape: 0 <= eps_low <= 1, 0 <= eps_high, all finite.
        """
        eps_low, eps_high = -torch.expm1(self.log_low), torch.expm1(self.log_high)
        largest = torch.finfo(torch.float32).max
        return eps_low.clamp(0.0, 1.0).float(), eps_high.clamp(0.0, largest).float()


@torch.no_grad()
def band(
    old_logps: Tensor,
    delta: Delta = 0.05,
    divergence: str | Divergence = "kl",
    cap: float | None = None,
    *,
    validate: bool = False,
) -> Bounds:
    """Return, for each token, the interval of ratios whose divergence is at most delta.

    The roots of  g_f(p, r) = p f(r) + (1-p) f((1-rp)/(1-p)) = delta  on both sides of r = 1, within [0, 1/p].

    Args:
        old_logps: natural-log probabilities of the taken actions under the old policy, any shape; half types are
            computed in float32. NaN and positive values (padding) count as 0.
        delta: divergence radius (nats for kl), from 1e-8 to 1e4: a float, a tensor that broadcasts, or a pair
            (delta_low, delta_high). Where a divergence cannot reach it, the bounds are the simplex's ends, 0 and 1/p.
        divergence: a name or a `Divergence`.
        cap: greatest ratio allowed, >= 1, or None.
        validate: check the values of tensors too, at the price of a host synchronisation.

    Returns:
        `Bounds`, detached, finite in log space, low <= 1 <= high.

    Raises:
        InputError: a dtype that is not floating, delta out of its range, cap < 1, an unknown divergence; with
            `validate`, a tensor of radii that holds such a value, or old_logps that hold NaN or values above 0.

    Source: arXiv 2603.04918, section 3 (the operator), 1901.10314 (the same bounds for kl).
    """
    divergence = get_divergence(divergence)
    check_tensor("old_logps", old_logps)
    cap = check_cap(cap)
    if validate:
        check_radii(old_logps, delta)
    log_p = old_logps.to(working_dtype(old_logps))
    largest = torch.finfo(log_p.dtype).max
    log_p = log_p.nan_to_num(nan=0.0, neginf=-largest).clamp_(max=0.0)
    delta_low, delta_high = (delta_like(side, log_p, wide=True) for side in check_delta(delta))
    log_low, log_high = log_bounds(divergence, log_p, delta_low, delta_high)
    log_low = log_low.clamp(-largest, 0.0)
    log_high = torch.minimum(log_high.clamp(min=0.0), -log_p)
    return Bounds(log_low, log_high if cap is None else log_high.clamp(max=math.log(cap)))


def band_eps(
    old_logps: Tensor, delta: Delta = 0.05, divergence: str | Divergence = "kl", cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the band as the two margins that any host takes which clamps a ratio to [1 - eps_low, 1 + eps_high].

    Args:
        old_logps: as in `band`: the very tensor in the ratio's denominator.
        delta: as in `band`.
        divergence: as in `band`.
        cap: as in `band`; with None, eps_high is at most the largest float32.

    Returns:
        (eps_low, eps_high), detached float32 of the tokens' shape: 0 <= eps_low <= 1, 0 <= eps_high, all finite,
        padding too.

    Raises:
        InputError: as `band`.
    """
    return band(old_logps, delta, divergence, cap).margins()


@torch.no_grad()
def binary_divergence(logps: Tensor, old_logps: Tensor, divergence: str | Divergence = "kl") -> Tensor:
    """Return the divergence between the two-outcome distributions of each token.

    g_f(p, r) = p f(r) + (1-p) f((1-rp)/(1-p)): a lower bound of the whole distribution's divergence.

    Args:
        logps: natural-log probabilities of the taken actions under the new policy, any shape.
        old_logps: the same under the old policy, same shape.
        divergence: a name or a `Divergence`.

    Returns:
        Tensor of the tokens' shape, float32 (float64 for float64 input), nats for kl; finite: a log-probability of 0
        counts as certain to within the dtype's rounding.

    Raises:
        InputError: shapes or dtypes that do not fit, an unknown divergence.

    Source: arXiv 2603.04918, section 3; 2602.04879 (binary KL and TV).
    """
    check_tensor("logps", logps)
    check_tensor("old_logps", old_logps, like=logps)
    return get_divergence(divergence).of(Move(logps, old_logps))


@torch.no_grad()
def implied_delta(
    log_low: Tensor, log_high: Tensor, old_logps: Tensor, divergence: str | Divergence = "kl"
) -> tuple[Tensor, Tensor]:
    """Return which radius each of two given bounds equals, so that any clip can be read on the axis of a divergence.

    delta_low = g_f(p, e^log_low) and delta_high = g_f(p, e^log_high); `band` with that pair gives the bounds back.

    Args:
        log_low: log of the least ratio, <= 0, any shape that broadcasts with `old_logps`.
        log_high: log of the greatest ratio, >= 0, likewise; past -old_logps (outside the simplex) it counts as there.
        old_logps: natural-log probabilities under the old policy, any shape.
        divergence: a name or a `Divergence`.

    Returns:
        (delta_low, delta_high), tensors of the tokens' shape, nats for kl; inf where no radius reaches the bound.

    Raises:
        InputError: dtypes that do not fit, an unknown divergence.
    """
    for name, x in (("log_low", log_low), ("log_high", log_high), ("old_logps", old_logps)):
        check_tensor(name, x)
    chosen, old = get_divergence(divergence), old_logps.to(working_dtype(old_logps)).clamp(max=0.0)
    low, high = (chosen.of(Move((old + x).clamp(max=0.0), old)) for x in (log_low, log_high))
    if chosen.shape.at_zero == math.inf:
        high = torch.where(old + log_high >= 0, torch.inf, high)
    return low, high


@torch.no_grad()
def in_band(logps: Tensor, old_logps: Tensor, delta: Delta = 0.05, divergence: str | Divergence = "kl") -> Tensor:
    """Return whether each token's ratio lies inside its band; evaluates the divergence, solves nothing.

    Args:
        logps: as in `binary_divergence`.
        old_logps: as in `binary_divergence`.
        delta: as in `band`.
        divergence: a name or a `Divergence`.

    Returns:
        Bool tensor of the tokens' shape.

    Raises:
        InputError: as `binary_divergence` and `band`.
    """
    value = binary_divergence(logps, old_logps, divergence)
    delta_low, delta_high = (delta_like(d, value) for d in check_delta(delta))
    return value <= torch.where(logps < old_logps, delta_low, delta_high)
