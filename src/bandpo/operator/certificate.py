"""A certificate that bounds are the exact extremes: an enclosure of each, from evaluations of g_f alone, no solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._input import InputError, check_number, check_tensor
from bandpo.operator.band import Bounds
from bandpo.operator.divergence import Divergence
from bandpo.operator.family import get_divergence
from bandpo.operator.radius import Delta, check_cap, check_delta, delta_like
from bandpo.operator.tokens import Outcome

ROUNDING = 64 * torch.finfo(torch.float64).eps  # of one term of g_f, see `evaluate`
NEVER = -1e30  # log-ratios below this are ratio 0 for any use


@dataclass(frozen=True)
class Certificate:
    """Where the exact bounds lie: between `inside` and `outside`, on each side of r = 1, as float64 log-ratios.

    g_f falls before r = 1 and rises after it. So if g_f <= delta at one point and g_f > delta at another, or if that
    other point is no distribution (r > 1/p) or past the cap, then the exact bound lies between the two. Both
    comparisons are with delta to within `rtol`, and hold with the rounding error of g_f in float64 to spare.

    Args:
        inside_low: a little inside the lower bound.
        outside_low: a little outside the lower bound.
        inside_high: a little inside the upper bound.
        outside_high: a little outside the upper bound.
        holds_low: whether the exact lower bound is proven to lie between the first two.
        holds_high: whether the exact upper bound is proven to lie between the other two.
        rtol: how far the points lie from the bounds, and the radii compared with from delta, both relative.
    """

    inside_low: Tensor
    outside_low: Tensor
    inside_high: Tensor
    outside_high: Tensor
    holds_low: Tensor
    holds_high: Tensor
    rtol: float

    @property
    def holds(self) -> Tensor:
        """Whether both bounds of each token are proven, a bool tensor of the tokens' shape."""
        return self.holds_low & self.holds_high

    def all(self, mask: Tensor | None = None) -> Tensor:
        """Return whether both bounds of every token are proven, as a bool tensor of no dimension.

        Args:
            mask: 1 for tokens, 0 for padding, which then counts as proven; or None.

        Returns:
            Bool tensor of no dimension.
        """
        return (self.holds if mask is None else self.holds | (mask == 0)).all()


@torch.no_grad()
def certify(
    bounds: Bounds,
    old_logps: Tensor,
    delta: Delta,
    divergence: str | Divergence = "kl",
    cap: float | None = None,
    rtol: float = 4e-6,
) -> Certificate:
    """Return a proof, token by token, that bounds are the extremes of the ratio over the trust region.

    g_f(p, e^((1 - rtol) log_bound)) <= delta (1 + rtol)  and  g_f(p, e^((1 + rtol) log_bound)) > delta (1 - rtol), or
    the latter point lies past 1/p or the cap: two evaluations of g_f a side, in float64. In words: each bound is the
    exact one of a radius within rtol of delta, up to rtol of its log-ratio. The radius has its share because a lower
    bound that is about to reach ratio 0 has no digits of its own: the last place of delta decides them.

    Args:
        bounds: of any origin: `band`, a clip, a solver of your own.
        old_logps: natural-log probabilities under the old policy, as the bounds were made from: what a half type has
            rounded is the exact p here. NaN and positive values count as 0, as in `band`.
        delta: as in `band`.
        divergence: as in `band`.
        cap: as in `band`, where one was used.
        rtol: how much is allowed, relative; by default 34 units of the last place of float32. `band` needs 2e-6 in
            float32 for delta of at least 1e-3 and 7e-5 down to 1e-6; in float64 2e-12 and 3e-11.

    Returns:
        `Certificate`. Not proven is not refuted: below log p = -690, at ratios below 1e-300 of an f without
        `perspective`, or with an rtol below the rounding error of g_f, nothing can be proven.

    Raises:
        InputError: shapes or dtypes that do not fit, a device without float64, `delta`, `cap` or `rtol` out of range,
            an unknown divergence.

    Source: arXiv 2603.04918, section 3, for the reduction to g_f.
    """
    chosen, cap = get_divergence(divergence), check_cap(cap)
    check_tensor("old_logps", old_logps)
    for name, x in (("bounds.log_low", bounds.log_low), ("bounds.log_high", bounds.log_high)):
        check_tensor(name, x, like=old_logps)
    if old_logps.device.type == "mps":
        raise InputError("old_logps is on mps, which has no float64: move bounds and old_logps to the CPU first")
    rtol = check_number("rtol", rtol, 0.0, 0.5)
    log_p = old_logps.double().nan_to_num(nan=0.0).clamp_(max=0.0)
    delta_low, delta_high = (delta_like(d, log_p) for d in check_delta(delta))
    low, high = bounds.log_low.double(), bounds.log_high.double()
    (inside_low, inside_high), (outside_low, outside_high) = (
        [x * s for x in (low, high)] for s in (1 - rtol, 1 + rtol)
    )
    known, more, less = log_p >= -690.0, 1 + rtol, 1 - rtol
    holds_low = known & (low <= 0) & _within(chosen, log_p, inside_low, delta_low * more)
    holds_low &= (outside_low < NEVER) | _beyond(chosen, log_p, outside_low, delta_low * less)
    limit = -log_p if cap is None else torch.minimum(-log_p, torch.log(torch.full_like(log_p, cap)))
    holds_high = known & (high >= 0) & (inside_high <= limit) & _within(chosen, log_p, inside_high, delta_high * more)
    holds_high &= (outside_high >= limit) | _beyond(chosen, log_p, outside_high, delta_high * less)
    return Certificate(inside_low, outside_low, inside_high, outside_high, holds_low, holds_high, rtol)


def _within(divergence: Divergence, log_p: Tensor, log_ratio: Tensor, delta: Tensor) -> Tensor:
    value, rounding = evaluate(divergence, log_p, log_ratio)
    return value + rounding <= delta


def _beyond(divergence: Divergence, log_p: Tensor, log_ratio: Tensor, delta: Tensor) -> Tensor:
    value, rounding = evaluate(divergence, log_p, log_ratio)
    return value - rounding > delta


def evaluate(divergence: Divergence, log_p: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return g_f in float64 and a bound of its rounding error.

    The two terms of g_f are each computed to a few eps of themselves, and of their powers' exponents, if f comes with
    a `perspective`; a bare f loses a few eps of the numbers that it subtracts, taken to be as large as 1, u, log u.
    Both are held to 60-digit arithmetic in the tests.

    Args:
        divergence: which f.
        log_p: log-probabilities, float64, in [-690, 0].
        log_ratio: log-ratios, float64, same shape; above -log_p they count as -log_p.

    Returns:
        (g_f, error), same shape.
    """
    log_ratio = torch.minimum(log_ratio, -log_p)
    least = torch.finfo(torch.float64).tiny
    p, rest = torch.exp(log_p), (-torch.expm1(log_p)).clamp(min=least)
    q, rest_q = p * torch.exp(log_ratio), -torch.expm1(log_p + log_ratio)
    moved = torch.where(log_ratio > 1, q - p, p * torch.expm1(log_ratio))
    near = moved > 0.5 * rest  # to q = 1: there (1 - q) / (1 - p) keeps its digits, else the difference from 1 does
    log_v = torch.where(near, torch.log((rest_q / rest).clamp(min=least)), torch.log1p(-(moved / rest).clamp(max=0.9)))
    mine = divergence.part(Outcome(p, q, moved, log_ratio))
    other = divergence.part(Outcome(rest, rest_q, torch.where(near, rest_q - rest, -moved), log_v))
    value = mine + other
    # what a bare f makes of its logarithm and its powers; past e^-700 neither has a digit left to lose
    logs = log_ratio.abs().clamp(max=700.0), log_v.abs().clamp(max=700.0)
    scale = mine.abs() * (1 + logs[0] / 16) + other.abs() * (1 + logs[1] / 16)
    if divergence.perspective is None:
        scale = scale + p * (1 + logs[0]) + q + rest * (1 + logs[1]) + rest_q
    return value, ROUNDING * scale
