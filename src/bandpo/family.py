"""The family: every divergence that has a name. To add one, add one entry to `FAMILY` at the end of this file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bandpo._checks import InputError, check_number, nearest
from bandpo.arithmetic import expm1, log1p
from bandpo.divergences import Divergence, by_tail
from bandpo.move import LARGE, Move, above
from bandpo.shape import Shape

SMALL_DELTA = 4e-3  # see `_kl_tail`


def _kl_binary(move: Move) -> Tensor:
    # -p log r - (1-p) log((1-q)/(1-p)), where (1-q)/(1-p) = 1 - p (r-1) / (1-p)
    p = move.p()
    x, weighted = move.rise.mul_(p), move.log_ratio.mul_(p)
    del p
    minus_rest = move.minus_rest()
    x.div_(minus_rest).clamp_(-1.0, LARGE)
    return log1p(x).mul_(minus_rest).sub_(weighted)


def _tv_binary(move: Move) -> Tensor:
    return move.rise.mul_(move.p()).abs_()


def _chi2_binary(move: Move) -> Tensor:
    return move.rise.mul_(move.rise).mul_(move.p()).div_(move.rest())


def _kl_tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    """Return v = A w > 0 with  A w - B log1p((A/B)(1 - e^-w)) = delta,  A = shrink, B = grow = 1 - A.

    w is how far the outcome of probability A falls in log-probability while the other takes up its mass. In v every
    quantity stays finite as A -> 0. The start is the root's expansion to second order in sqrt(delta); Newton on this
    convex function then doubles the digits: 2 steps give 7e-8, 3 give 1e-13, for every p and delta. Where delta is
    far below AB, and so w small, float32 leaves Newton eps / w, and the expansion to third order has more digits. The
    code keeps u = v - delta, and -m, -1/A and -B in place of m = 1 - e^-w, 1/A and B, to save operations.
    """
    minus_inverse, minus_grow, spread = shrink.reciprocal().neg_(), -grow, shrink * grow
    first = (2 * delta * spread).sqrt_()
    u = torch.addcmul(first, shrink - 2, delta / 3)
    if shrink.dtype == torch.float32:
        near = torch.addcmul(u, first, ((spread + 1e-20).reciprocal_() - 1).mul_(delta / 18))
        small = above(spread.mul_(SMALL_DELTA), delta)
    del first, spread
    for _ in range(2 if shrink.dtype == torch.float32 else 3):
        minus_m = torch.add(u, delta).mul_(minus_inverse)
        minus_m = expm1(minus_m, out=minus_m)
        x = shrink * minus_m
        slope = torch.add(x, minus_grow).div_(minus_m)  # dv = (q / m) dF, with q = B + A m
        excess = torch.addcmul(u, log1p(x.div_(minus_grow)), minus_grow)
        u.addcmul_(excess, slope, value=-1.0)
    if shrink.dtype == torch.float32:
        u.addcmul_(near.sub_(u), small)
    return u.add_(delta)


def _neyman_tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    root = (delta * (delta + 4 * shrink * grow)).sqrt_()  # (q-p)^2 = delta q (1-q): the Wilson interval
    return torch.log1p((delta + root) / (2 * shrink)).mul_(shrink)


def _hellinger_tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    # A = sin^2 t falls to sin^2(t - angle) with cos(angle) = 1 - delta/2, or to 0: the arcsine interval
    fall = delta / 2 + (delta * (1 - delta / 4).clamp(min=0.0) * grow / shrink).sqrt_()
    return torch.log1p(-fall.clamp_(max=1.0)).mul_(-2 * shrink)


def _one_plus_minus_exp(u_low: Tensor, u_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 - e^u_low), -inf where u_low >= 0, and log(1 + e^u_high)."""
    u = u_low.clamp(max=0.0)
    near_one = torch.log(-expm1(u))
    low = torch.where(u > -math.log(2), near_one, torch.log1p(-torch.exp(u)))
    return low, torch.nn.functional.softplus(u_high, threshold=80.0)


def _tv_bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    return _one_plus_minus_exp(torch.log(delta_low) - log_p, torch.log(delta_high) - log_p)  # 1 -+ delta / p


def _chi2_bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    log_odds = log_p - torch.log(-expm1(log_p))  # 1 -+ sqrt(delta (1-p)/p)
    return _one_plus_minus_exp((torch.log(delta_low) - log_odds) / 2, (torch.log(delta_high) - log_odds) / 2)


def alpha_divergence(a: float, name: str = "", **closed: Any) -> Divergence:
    """Return the Cressie-Read divergence of order a.

    f(u) = (u^a - 1 - a (u-1)) / (a (a-1));  a -> 0 is kl, a -> 1 reverse_kl, a = 2 chi2 / 2, a = -1 neyman / 2 and
    a = 1/2 twice hellinger.

    Args:
        a: the order, any finite real.
        name: its name; "alpha:A" when empty.
        **closed: further fields of the `Divergence`.

    Returns:
        The `Divergence`.

    Raises:
        InputError: an order that is not finite.

    Source: Cressie and Read (1984).
    """
    a = check_number("alpha", a, -math.inf)
    series = [0.5]
    for n in range(2, 17):
        series.append(series[-1] * (a - n) / (n + 1))

    def term(log_u: Tensor, rise: Tensor) -> Tensor:
        if a == 0:
            return rise - log_u
        if a < 0.5:
            return (torch.expm1(a * log_u) / a - rise) / (a - 1)
        # u^a - u = u (u^(a-1) - 1); where that power overflows, u itself has long been 0
        largest = 80.0 if rise.dtype == torch.float32 else 600.0
        power = log_u if a == 1 else torch.expm1(((a - 1) * log_u).clamp(max=largest)) / (a - 1)
        return ((1 + rise) * power - rise) / a

    def f(u: Tensor) -> Tensor:
        return term(torch.log(u), u - 1)

    radius = 0.1 / max(1.0, abs(a))
    growth = max(a, 1.0)
    at_zero, fall = (1 / a, min(a, 1.0)) if a > 0 else (math.inf, max(-a, 1e-9))

    def far(log_u: Tensor) -> Tensor:  # for a near 1, where u^a is no power law before u overflows
        y = log_u.clamp(min=9.0)
        return torch.log((y if a == 1 else torch.expm1((a - 1) * y) / (a - 1)) - 1)

    near_one, smooth = abs(a - 1) < 0.03, -20 <= a <= 10
    shape = Shape(at_zero, 1.0, fall, growth, 600 / growth, smooth=smooth, far=far if near_one else None)
    return Divergence(name or f"alpha:{a:g}", f, term, tuple(series), radius, shape=shape, **closed)


def _neyman_term(log_u: Tensor, rise: Tensor) -> Tensor:
    return rise * rise * torch.exp(-log_u)


def _hellinger_term(log_u: Tensor, rise: Tensor) -> Tensor:
    return (rise / (1 + torch.exp(log_u / 2))) ** 2


def _js_term(log_u: Tensor, rise: Tensor) -> Tensor:
    return (1 + rise) * log_u - (2 + rise) * torch.log1p(rise / 2)


_JS_SERIES = tuple((-1) ** n * (1 - 2.0 ** (1 - n)) / (n * (n - 1)) for n in range(2, 19))

FAMILY: dict[str, Divergence] = {
    d.name: d
    for d in (
        alpha_divergence(0, "kl", binary=_kl_binary, bounds=by_tail(_kl_tail), narrow=True),  # KL(old || new)
        Divergence("tv", lambda u: (u - 1).abs() / 2, lambda _, t: t.abs() / 2, binary=_tv_binary, bounds=_tv_bounds),
        # Pearson
        Divergence("chi2", lambda u: (u - 1) ** 2, lambda _, t: t * t, binary=_chi2_binary, bounds=_chi2_bounds),
        alpha_divergence(1, "reverse_kl"),  # KL(new || old)
        Divergence("neyman", lambda u: (u - 1) ** 2 / u, _neyman_term, bounds=by_tail(_neyman_tail), narrow=True),
        Divergence(
            "hellinger",  # squared, in [0, 2]
            lambda u: (u.sqrt() - 1) ** 2,
            _hellinger_term,
            bounds=by_tail(_hellinger_tail),
        ),
        Divergence("js", lambda u: _js_term(torch.log(u), u - 1), _js_term, _JS_SERIES),  # twice Jensen-Shannon
    )
}


def get_divergence(divergence: str | Divergence) -> Divergence:
    """Return the divergence of that name; a `Divergence` is returned as it is.

    Args:
        divergence: a name in the family, "alpha:A" for any real A, or a `Divergence`.

    Returns:
        The `Divergence`.

    Raises:
        InputError: no divergence has that name (the nearest one is named), or it is some other object.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise InputError(
            f"divergence={divergence!r}: a {type(divergence).__name__} is no bandpo.Divergence; wrap its f, a function "
            "of u = new / old that is convex, 0 at u = 1 and made of torch operations:\n"
            "    def f(u):\n"
            "        return ...\n"
            "    divergence = bandpo.Divergence(name='mine', f=f)"
        )
    if divergence in FAMILY:
        return FAMILY[divergence]
    if divergence.startswith("alpha:"):
        try:
            return alpha_divergence(float(divergence.removeprefix("alpha:")))
        except ValueError:
            raise InputError(f"divergence={divergence!r}: alpha must be a finite number, as in 'alpha:0.5'") from None
    raise InputError(
        f"divergence={divergence!r}: must be one of {', '.join(FAMILY)}, alpha:A{nearest(divergence, FAMILY)}, "
        "or your own: bandpo.Divergence(name='mine', f=lambda u: ...)"
    )
