"""One side of the band, for any f: secants in coordinates that make its equation nearly straight.

Fixed iteration count, no branch on values, no host synchronisation, no state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bandpo.divergences import Divergence
from bandpo.move import above

LEAST = 1e-300  # keeps logarithms and quotients finite


def evaluations(divergence: Divergence, wide: bool) -> int:
    """Return how many evaluations of g_f `Side.fall` needs for the digits of float32, or of float64 if `wide`."""
    shape = divergence.shape
    if not shape.smooth:
        return 52 if wide else 34  # halvings
    # By secants the error is .3, .03, 3e-4, 1e-6, 6e-11: somewhat later where f grows steeply or falls like a logarithm
    return (6 if wide else 4) + (3 if shape.growth > 2 else 2 if shape.fall < 0.01 else 0)


def rising(divergence: Divergence, rise: Tensor, u: Tensor | None = None) -> Tensor:
    """Return f(1 + rise), for rise >= 0; `u` is 1 + rise where that is known better."""
    if divergence.term is None:
        return divergence.plain(1 + rise if u is None else u, rise)
    return divergence.term(torch.log1p(rise), rise)


def limit(divergence: Divergence, shrink: Tensor, grow: Tensor) -> Tensor:
    """Return S, the divergence at which the shrinking outcome is gone; needs an f with a finite f(0)."""
    return rising(divergence, shrink / grow, 1 / grow).mul_(grow).add_(shrink, alpha=divergence.shape.at_zero)


class Side:
    """One side of the band: an outcome of probability A = shrink falls to A e^-w, the other of B = grow takes the mass.

    The equation is  G(w) = A f(e^-w) + B f(1 + (A/B)(1 - e^-w)) = delta.  G goes as w^2 for small w, and for large w
    either as e^(k w) or, towards a limit S, as S - e^(-k w). So the logit of G / S is nearly straight over
    z = log((e^(k w) - 1) / k), whatever p, delta and f are, and a secant finds its root.
    """

    def __init__(self, divergence: Divergence, shrink: Tensor, grow: Tensor, delta: Tensor) -> None:
        self.divergence, self.shape, self.odds = divergence, divergence.shape, shrink / grow
        self.least = max(torch.finfo(shrink.dtype).tiny, LEAST)
        self.epsilon, self.far = torch.finfo(shrink.dtype).eps, math.log(1 / self.least)
        self.last = self.far
        if divergence.term is None:  # an f without logarithms of its own ends where u underflows, at w = far
            self.last = min(self.last, math.log(math.expm1(min(self.shape.fall, 1.0) * self.far) / self.shape.fall))
        self.within = self.over_limit = None
        target = delta
        if self.shape.at_zero < math.inf:
            over_limit = limit(divergence, shrink, grow).clamp_(min=self.least).reciprocal_()
            self.within = above(-delta * over_limit, -1.0)  # 0 where the region reaches the simplex's end
            target = delta / (1 - delta * over_limit).clamp_(min=self.least)
            self.over_limit = over_limit.mul_(target)
        self.start = self._start(shrink, grow, delta)
        self.shrink, self.grow = shrink / target, grow / target

    def fall(self, steps: int) -> Tensor:
        """Return w at the edge of the region, inf where even that is inside, after so many evaluations of g_f."""
        w = (self._secant(steps) if self.shape.smooth else self._halve(steps)).exp_()
        w = w.mul_(self.shape.fall).log1p_().div_(self.shape.fall)
        return w if self.within is None else w.div_(self.within)

    def _secant(self, steps: int) -> Tensor:
        """Return z after so many evaluations."""
        z, (residual, share, u) = self.start, self._residual(self.start)
        # The slope from here to the root falls as u does, and is steeper where the growing outcome has the larger part;
        # the two numbers leave the family the smallest worst error.
        step = residual / share.mul_(max(self.shape.growth, 1.5) - 1.5).add_(u, alpha=0.6).add_(0.95)
        del share, u
        for _ in range(steps - 1):
            z.sub_(step).clamp_(-self.far, self.last)
            before, residual = residual, self._residual(z)[0]
            step.div_(before.sub_(residual).add_(self.least)).clamp_(0.0, 100.0).mul_(residual)
        return z.sub_(step).clamp_(-self.far, self.last)

    def _halve(self, steps: int) -> Tensor:
        """Return z by halving: for an f with a bend or a flat piece, where the logit is far from straight."""
        low, high = torch.full_like(self.shrink, -self.far), torch.full_like(self.shrink, self.far)
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
        grown = law((reach + square) / 2, reach / self.shape.growth).add_(log_grow).sub_(log_shrink)
        shrunk = (log_delta - log_shrink).add_(square)
        z = torch.minimum(grown, shrunk.div_(2)).sub_(0.15)
        # past this the logit is flat, or f overflows
        return z.clamp_(-self.far, 5.0 - math.log(self.shape.fall) if self.within is None else 36.0)

    def _residual(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logit of G / S less that of delta / S, the growing outcome's share of G, and u = e^-w."""
        e = torch.exp(z)
        if self.shape.fall == 1.0:
            u = (e + 1).reciprocal_()
            x, w = u * e, e if self.divergence.term is None else e.log1p_()
        else:
            w = e.mul_(self.shape.fall).log1p_().div_(self.shape.fall)
            u, x = torch.exp(-w), torch.expm1(-w).neg_()
        high = rising(self.divergence, x * self.odds).mul_(self.grow)
        x.neg_()
        low = self.divergence.plain(u, x) if self.divergence.term is None else self.divergence.term(w.neg_(), x)
        g = low.mul_(self.shrink).add_(high).clamp_(self.least, 1 / self.least)
        share = high.div_(g)
        if self.over_limit is not None:
            g.div_((g * self.over_limit).neg_().add_(1.0).clamp_(min=self.epsilon))
        return g.log_(), share, u
