"""Bounds of any f-divergence, by secants in coordinates that make the equation nearly straight.

Fixed iteration count, no branch on values, no host synchronisation, no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bandpo.divergences import Divergence, by_tail
from bandpo.move import above

LEAST = 1e-300  # keeps logarithms and quotients finite
PIECE = 1 << 14  # tokens at a time on a CPU: the dozen tensors of a step then stay in its cache


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
    if divergence.narrow:
        assert divergence.bounds is not None
        return divergence.bounds(log_p, delta_low.to(log_p.dtype), delta_high.to(log_p.dtype))
    # f itself loses digits near 1, and a lower bound that nears ratio 0 hangs on the last digits of delta: float32 has
    # none to spare. Apple's GPUs have nothing wider.
    wide = log_p.dtype if log_p.device.type == "mps" else torch.float64
    bounds, sides = divergence.bounds or _solver(divergence, log_p.dtype), []
    for piece in _pieces(log_p, delta_low, delta_high):
        sides.append([x.to(log_p.dtype) for x in bounds(*(x.to(wide) for x in piece))])
    low, high = (torch.cat(side).view(log_p.shape) if len(side) > 1 else side[0] for side in zip(*sides, strict=True))
    return low, high


def _solver(divergence: Divergence, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the `bounds` of a divergence that has none, good enough for that dtype."""
    # After so many evaluations of g_f the error is .3, .03, 3e-4, 1e-6, 6e-11: somewhat later where f grows steeply or
    # falls like a logarithm
    shape, least = divergence.shape, 4 if dtype == torch.float32 else 6
    steps = least + (3 if shape.growth > 2 else 2 if shape.fall < 0.01 else 0)

    def tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
        return _Side(divergence, shrink, grow, delta).fall(steps).mul_(shrink)

    return by_tail(tail, shape.growth, shape.reach)


def _pieces(log_p: Tensor, *deltas: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if torch.compiler.is_compiling() or log_p.device.type != "cpu" or log_p.numel() <= PIECE:
        yield log_p, *deltas
        return
    flat = [d if d.numel() == 1 else d.expand(log_p.shape).flatten() for d in deltas]
    for i, piece in enumerate(torch.split(log_p.flatten(), PIECE)):
        yield piece, *(d if d.numel() == 1 else d[i * PIECE : (i + 1) * PIECE] for d in flat)


class _Side:
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
            limit = self._rising(self.odds, 1 / grow).mul_(grow).add_(shrink, alpha=self.shape.at_zero)
            over_limit = limit.clamp_(min=self.least).reciprocal_()
            self.within = above(-delta * over_limit, -1.0)  # 0 where the region reaches the simplex's end
            target = delta / (1 - delta * over_limit).clamp_(min=self.least)
            self.over_limit = over_limit.mul_(target)
        self.start = self._start(shrink, grow, delta)
        self.shrink, self.grow = shrink / target, grow / target

    def fall(self, steps: int) -> Tensor:
        """Return w at the edge of the region; inf where even that is inside."""
        w = (self._secant(steps) if self.shape.curvature else self._halve()).exp_()
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

    def _halve(self) -> Tensor:
        """Return z by halving, for an f that is 0 around u = 1, where the logit has no slope."""
        low, high = torch.full_like(self.shrink, -self.far), torch.full_like(self.shrink, self.far)
        for _ in range(64):
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
        high = self._rising(x * self.odds).mul_(self.grow)
        x.neg_()
        low = self.divergence.plain(u, x) if self.divergence.term is None else self.divergence.term(w.neg_(), x)
        g = low.mul_(self.shrink).add_(high).clamp_(self.least, 1 / self.least)
        share = high.div_(g)
        if self.over_limit is not None:
            g.div_((g * self.over_limit).neg_().add_(1.0).clamp_(min=self.epsilon))
        return g.log_(), share, u

    def _rising(self, rise: Tensor, u: Tensor | None = None) -> Tensor:
        """Return f(1 + rise)."""
        if self.divergence.term is None:
            return self.divergence.plain(1 + rise if u is None else u, rise)
        return self.divergence.term(torch.log1p(rise), rise)
