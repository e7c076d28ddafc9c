"""Bounds of many tokens at one radius: solved at a few thousand nodes, interpolated between them.

At one radius the bounds are functions of p alone, and smooth ones, save where the region reaches the simplex's end.
Over the logarithm of the distance to that point, in log-odds of p, they are smooth there too, so that cubics between a
few thousand nodes keep all of float32's digits, in a fraction of the time that solving takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bandpo.divergences import Divergence, continued, floored
from bandpo.move import LARGE, above
from bandpo.side import LEAST, Side, evaluations, limit

NODES = 4096
CLOSEST = 1e-10  # to the simplex's end, in log-odds; nearer, even float64 cannot tell how near
LEAST_ODDS = -700.0
SCALE = 4.0  # of log-odds, where the bounds of a region that never reaches the simplex's end turn


class Table:
    """The fall and the rise that a region allows, as log(-log r), log(log r), by log-odds of the outcome that falls.

    Args:
        divergence: which f; smooth.
        delta: the radius, float64, of one element.
    """

    def __init__(self, divergence: Divergence, delta: Tensor) -> None:
        delta = delta.reshape(1)
        last = torch.full_like(delta, divergence.shape.reach)
        self.edge = _edge(divergence, delta) if divergence.shape.at_zero < math.inf else None
        self.first = self._coordinate(torch.full_like(delta, LEAST_ODDS))
        self.scale = (NODES - 1) / (self._coordinate(last) - self.first).clamp_(min=1.0)
        t = torch.arange(NODES, dtype=delta.dtype, device=delta.device) / self.scale + self.first
        log_odds = SCALE * torch.sinh(t) if self.edge is None else self.edge + torch.exp(t)
        side = Side(divergence, torch.sigmoid(log_odds), torch.sigmoid(-log_odds), delta)
        w = side.fall(evaluations(divergence, wide=True)).clamp_(max=1 / LEAST)
        self.falls = _cubics(torch.log(w))
        self.rises = _cubics(torch.log(torch.log1p(torch.expm1(-w).neg_().mul_(log_odds.exp_()))))

    def low(self, log_odds: Tensor) -> Tensor:
        """Return log_low of tokens with these log-odds, -inf where their ratio may be 0."""
        return self._look(self.falls, log_odds).neg_()

    def high(self, log_odds: Tensor) -> Tensor:
        """Return log_high of tokens with these log-odds, `LARGE` where they may reach probability 1."""
        return self._look(self.rises, -log_odds).clamp_(max=LARGE)

    def _look(self, cubics: list[Tensor], log_odds: Tensor) -> Tensor:
        place = (self._coordinate(log_odds) - self.first).mul_(self.scale).clamp_(0.0, NODES - 1.0)
        cell = place.long().clamp_(max=NODES - 2)
        place.sub_(cell)
        value = torch.index_select(cubics[3], 0, cell)
        for coefficients in cubics[2::-1]:
            value = torch.addcmul(torch.index_select(coefficients, 0, cell), value, place)
        value = value.exp_()
        return value if self.edge is None else value.div_(above(log_odds, self.edge))

    def _coordinate(self, log_odds: Tensor) -> Tensor:
        if self.edge is not None:
            return (log_odds - self.edge).clamp_(min=CLOSEST).log_()
        size = log_odds.abs().div_(SCALE)  # asinh, which torch computes one number at a time
        return torch.addcmul(torch.ones_like(size), size, size).sqrt_().add_(size).log_().copysign_(log_odds)


def table_bounds(divergence: Divergence, log_p: Tensor, low: Table, high: Table) -> tuple[Tensor, Tensor]:
    """Return the bounds as `Divergence.bounds` would, from two tables.

    Args:
        divergence: the tables' divergence.
        log_p: log-probabilities in nats, float64, any shape.
        low: the table for the lower bounds.
        high: the table for the upper bounds; the same one where the radii are the same.

    Returns:
        (log_low, log_high).
    """
    flat = log_p.flatten()  # as look-ups want it
    floor, rest = floored(flat, divergence.shape.reach)
    log_odds = floor - rest.log_()
    log_high = continued(high.high(log_odds), floor, flat, divergence.shape)
    return low.low(log_odds).view(log_p.shape), log_high.view(log_p.shape)


def _edge(divergence: Divergence, delta: Tensor) -> Tensor:
    """Return the log-odds up to which the shrinking outcome may lose all its mass."""
    low, high = torch.full_like(delta, LEAST_ODDS), torch.full_like(delta, divergence.shape.reach)
    parts = torch.linspace(0.0, 1.0, 257, dtype=delta.dtype, device=delta.device)
    for _ in range(8):
        grid = torch.lerp(low, high, parts)
        out = above(limit(divergence, torch.sigmoid(grid), torch.sigmoid(-grid)), delta)
        first = (len(parts) - out.sum(0, keepdim=True)).long().clamp_(1, len(parts) - 1)
        low, high = grid.index_select(0, first - 1), grid.index_select(0, first)
    return high


def _cubics(values: Tensor) -> list[Tensor]:
    """Return the four coefficients of each cell's cubic through its two nodes and their neighbours."""
    first, last = (3 * (x[:1] - x[1:2]) + x[2:3] for x in (values[:3], values[-3:].flip(0)))
    padded = torch.cat([first, values, last])
    a, b, c, d = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    return [b.clone(), (6 * c - 2 * a - 3 * b - d) / 6, (a - 2 * b + c) / 2, (3 * b - a - 3 * c + d) / 6]
