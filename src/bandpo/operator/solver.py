"""The roots of g_f = delta on both sides of r = 1, for any f: secants where f is smooth, else halving.

One side of the band is: an outcome of probability A = shrink falls to A e^-w, the other, of B = grow = 1 - A, takes up
its mass, until the divergence is delta:

    G(w) = A f(e^-w) + B f(1 + (A/B)(1 - e^-w)) = delta

That is the lower bound with A = p and, by the mirror identity, the upper one with A = 1 - p.

Fixed iteration count, no branch on values, no host synchronisation, no state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bandpo.operator.shape import Shape
from bandpo.operator.tokens import TINY, Outcome, above, expm1

if TYPE_CHECKING:
    from bandpo.operator.divergence import Divergence

LEAST = 1e-300  # keeps logarithms and quotients finite
Tail = Callable[[Tensor, Tensor, Tensor], Tensor]


def log_bounds(divergence: Divergence, log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the roots of g_f(p, r) = delta on both sides of r = 1, as log-ratios.

    Args:
        divergence: which f.
        log_p: log-probabilities in nats, <= 0 and finite, any shape.
        delta_low: radius for the lower bound, broadcasts with `log_p`.
        delta_high: radius for the upper bound, broadcasts with `log_p`.

    Returns:
        (log_low, log_high) in the dtype of `log_p`; -inf and -log_p or more where the region reaches the simplex's end.

    Source: arXiv 2603.04918, section 3.
    """
    # f itself loses digits near 1, and a lower bound that nears ratio 0 hangs on the last digits of delta: float32 has
    # none to spare. Apple's GPUs have nothing wider.
    wide = log_p.dtype if divergence.narrow or log_p.device.type == "mps" else torch.float64
    steps = evaluations(divergence, log_p.dtype == torch.float64)
    bounds = divergence.bounds or functools.partial(
        tail_bounds, functools.partial(fall, divergence, steps), divergence.shape
    )
    low, high = bounds(log_p.to(wide), delta_low.to(wide), delta_high.to(wide))
    return low.to(log_p.dtype), high.to(log_p.dtype)


def tail_bounds(
    tail: Tail, shape: Shape, log_p: Tensor, delta_low: Tensor, delta_high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the bounds of a divergence from the solution of its one-sided problem.

    Args:
        tail: `(A, B, delta) -> A w`, inf where the region reaches the simplex's end.
        shape: of f; its `growth`, `reach` and `far` count.
        log_p: as in `log_bounds`.
        delta_low: as in `log_bounds`.
        delta_high: as in `log_bounds`.

    Returns:
        (log_low, log_high).
    """
    floor = log_p.clamp(min=-87.0 if log_p.dtype == torch.float32 else -shape.reach)  # that p has all its digits
    p, rest = torch.exp(floor), (-expm1(floor)).clamp(min=TINY)
    log_low = -tail(p, rest, delta_low) / p
    fall = -tail(rest, p, delta_high) / rest
    log_high = torch.log1p(-expm1(fall) * rest / p)
    return log_low, _continued(log_high, floor - log_p, shape)


def _continued(log_high: Tensor, below: Tensor, shape: Shape) -> Tensor:
    """Return the upper bound of a p that is e^-below of the one it was solved at: there p f(r) is the same for all p.

    The lower bound needs nothing of the kind: its ratio is zero for any use, long before. It stays what it is at that
    p, which is narrower than the region.
    """
    if shape.far is None:  # a power law
        return log_high + below / shape.growth
    far = shape.far(log_high)
    y = log_high + below / shape.growth
    for _ in range(2):
        y = y - (y - log_high + shape.far(y) - far - below) / shape.growth
    return y


def evaluations(divergence: Divergence, wide: bool) -> int:
    """Return how many evaluations of G the digits of float32 need, or those of float64 if `wide`."""
    shape = divergence.shape
    if not shape.smooth:
        return 52 if wide else 34  # halvings
    # By secants the error is .3, .03, 3e-4, 1e-6, 6e-11: later where f grows steeply or falls like a logarithm
    steep = (2.0, 2.0, 2.0) if wide else (2.0, 3.5, 12.0)
    later = 2 if shape.fall < 0.01 else sum(shape.growth > power for power in steep)
    return (6 if wide else 4) + later


def fall(divergence: Divergence, steps: int, shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    """Return the `tail` of `tail_bounds`: A w at the edge of the region, inf where even w = inf is inside.

    Args:
        divergence: which f.
        steps: how often G is evaluated.
        shrink: A.
        grow: B.
        delta: the radius.

    Returns:
        Tensor of the shape that the last three broadcast to.
    """
    side = _Side(divergence, shrink, grow, delta)
    z = side.secant(steps) if divergence.shape.smooth else side.halve(steps)
    w = torch.log1p(torch.exp(z) * divergence.shape.fall) / divergence.shape.fall * shrink
    return w if side.within is None else w / side.within


class _Side:
    """The equation in coordinates that make it nearly straight.

    G goes as w^2 for small w, and for large w either as e^(k w) or, towards a limit S, as S - e^(-k w). So the logit
    of G / S is nearly straight over  z = log((e^(k w) - 1) / k),  whatever p, delta and f are: secants find its root.
    """

    def __init__(self, divergence: Divergence, shrink: Tensor, grow: Tensor, delta: Tensor) -> None:
        self.divergence, self.shape, self.odds = divergence, divergence.shape, shrink / grow
        self.least = max(torch.finfo(shrink.dtype).tiny, LEAST)
        self.epsilon, self.far = torch.finfo(shrink.dtype).eps, math.log(1 / self.least)
        self.last = self.far
        if divergence.perspective is None:  # an f without logarithms of its own ends where u underflows, at w = far
            self.last = min(self.last, math.log(math.expm1(min(self.shape.fall, 1.0) * self.far) / self.shape.fall))
        self.within = self.over_limit = None
        target = delta
        if self.shape.at_zero < math.inf:
            over_limit = 1 / self._limit(shrink, grow).clamp(min=self.least)
            self.within = above(-delta * over_limit, -1.0)  # 0 where the region reaches the simplex's end
            target = delta / (1 - delta * over_limit).clamp(min=self.least)
            self.over_limit = over_limit * target
        self.start = self._start(shrink, grow, delta)
        self.shrink, self.grow = shrink / target, grow / target

    def secant(self, steps: int) -> Tensor:
        """Return z after so many evaluations."""
        z, (residual, share, u) = self.start, self._residual(self.start)
        # The slope from here to the root falls as u does, and is steeper where the growing outcome has the larger part;
        # the two numbers leave the family the smallest worst error.
        step = residual / (share * (max(self.shape.growth, 1.5) - 1.5) + 0.6 * u + 0.95)
        for _ in range(steps - 1):
            z = (z - step).clamp_(-self.far, self.last)
            before, residual = residual, self._residual(z)[0]
            step = step.div_((before - residual).add_(self.least)).clamp_(0.0, 100.0).mul_(residual)
        return (z - step).clamp(-self.far, self.last)

    def halve(self, steps: int) -> Tensor:
        """Return z by halving: for an f with a bend or a flat piece, where the logit is far from straight."""
        low, high = torch.full_like(self.start, -self.far), torch.full_like(self.start, self.far)
        for _ in range(steps):
            middle = (low + high) / 2
            outside = above(self._residual(middle)[0], 0.0)
            low, high = torch.lerp(middle, low, outside), torch.lerp(high, middle, outside)
        return low

    def _start(self, shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
        """Return z from two rough solutions, each outcome alone, as a square or as its power law."""
        log_delta, log_grow, log_shrink = torch.log(delta), torch.log(grow), torch.log(shrink)
        square = math.log(2 / max(self.shape.curvature, LEAST))
        reach = log_delta - log_grow
        law = torch.maximum if self.shape.growth <= 2 else torch.minimum
        grown = law((reach + square) / 2, reach / self.shape.growth) + log_grow - log_shrink
        shrunk = (log_delta - log_shrink + square) / 2
        z = torch.minimum(grown, shrunk) - 0.15
        # past this the logit is flat, or f overflows
        return z.clamp(-self.far, 5.0 - math.log(self.shape.fall) if self.within is None else 36.0)

    def _residual(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logit of G / S less that of delta / S, the growing outcome's share of G, and u = e^-w."""
        e = torch.exp(z)
        if self.shape.fall == 1.0:
            u = (e + 1).reciprocal_()
            x, minus_w = u * e, e.log1p_().neg_()
        else:
            minus_w = e.mul_(self.shape.fall).log1p_().div_(-self.shape.fall)
            u, x = torch.exp(minus_w), torch.expm1(minus_w).neg_()
        fallen = Outcome(self.shrink, self.shrink * u, self.shrink * -x, minus_w)
        high = self._risen(self.grow, self.shrink * x, x.mul_(self.odds).log1p_())
        g = self.divergence.part(fallen, digits=False).add_(high).clamp_(self.least, 1 / self.least)
        share = high.div_(g)
        if self.over_limit is not None:
            g.div_((g * self.over_limit).neg_().add_(1.0).clamp_(min=self.epsilon))
        return g.log_(), share, u

    def _risen(self, grow: Tensor, moved: Tensor, log_r: Tensor) -> Tensor:
        """Return B f(1 + moved / B), the part of the growing outcome."""
        return self.divergence.part(Outcome(grow, grow + moved, moved, log_r), digits=False)

    def _limit(self, shrink: Tensor, grow: Tensor) -> Tensor:
        """Return S, the divergence at which the shrinking outcome is gone; needs an f with a finite f(0)."""
        return self._risen(grow, shrink, torch.log1p(self.odds)) + shrink * self.shape.at_zero
